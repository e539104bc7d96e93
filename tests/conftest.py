"""Settings and fixtures of all tests."""

import pytest
import tiny_models
from faults import Forge
from gguf_files import describe
from histories import Whole
from hypothesis import settings

from sq_stream.formats.checkpoint import Checkpoint

settings.register_profile("sq-stream", deadline=None)  # a busy machine is no failure
settings.load_profile("sq-stream")


@pytest.fixture(scope="module")
def open_model(tmp_path_factory):
    """Tiny models by name, as (checkpoint, spec)."""
    opened = {}

    def open_(name):
        if name not in opened:
            folder = tiny_models.write(name, tmp_path_factory.mktemp("tiny") / name)
            checkpoint = Checkpoint.open(folder)
            opened[name] = checkpoint, describe(checkpoint, mtp=tiny_models.MODELS[name].mtp)
        return opened[name]

    yield open_
    for checkpoint, _ in opened.values():
        checkpoint.close()


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    """Runs of the command line to which something happens."""
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def whole(forge):
    """A calibrated job on the forge's model, to which nothing happened."""
    return Whole(forge)


@pytest.fixture(scope="session")
def best(forge):
    """The same of the effort best."""
    return Whole(forge, "--effort=best")
