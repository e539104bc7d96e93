"""Settings for all tests."""

from hypothesis import settings

settings.register_profile("sq-stream", deadline=None)  # a busy machine is no failure
settings.load_profile("sq-stream")
