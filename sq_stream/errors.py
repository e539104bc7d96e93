"""Every error that sq-stream raises on purpose, with the exit code that the command line gives for it.

A message says what is wrong, where, with the numbers, and what to do about it.
"""

from __future__ import annotations


class SqStreamError(Exception):
    """Base of all errors that a user can cause or meet; `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(SqStreamError):
    """The options contradict each other or name something that does not exist."""

    exit_code = 2


class UnsupportedModelError(SqStreamError):
    """The architecture or tokenizer is one that sq-stream does not know."""

    exit_code = 3


class BadInputError(SqStreamError):
    """A file is damaged, foreign, or holds values that cannot be used (NaN, Inf)."""

    exit_code = 4


class DoesNotFitError(SqStreamError):
    """The job cannot be done in the memory or the disk space that it may use."""

    exit_code = 5


class StorageError(SqStreamError):
    """Reading or writing failed: full disk, read-only folder, vanished file."""

    exit_code = 6


class VerificationError(SqStreamError):
    """A finished file is not what it should be."""

    exit_code = 7


class InterruptedJobError(SqStreamError):
    """The job was stopped before its end, or another job holds its lock; the same command resumes it."""

    exit_code = 75


RESUMES = "interrupted: what is finished is kept, and the same command goes on from there"
"""What an interrupted job says that can be resumed."""

RESTARTS = "interrupted: run the same command again, it starts over"
"""What the others say."""
