"""Everything that can go wrong for a user, each with the exit code of the command line.

A message is one line: what was expected, what was found, what to do.
"""


class KontextError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        """Names out of files may hold line breaks and control characters; a message does not."""
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class BackendUnavailableError(KontextError):
    """A backend, device or precision was asked for that this machine cannot run."""


class QueueFullError(KontextError):
    """More calls wait for a pipeline than its ``max_queue`` allows."""


class ClosedError(KontextError):
    """A pipeline was called after ``close()``."""


class InvalidInputError(KontextError, ValueError):
    """An argument or a picture cannot be used."""

    exit_code = 2


class CheckpointError(KontextError):
    """Weights or tokenizers are missing, malformed or of another model."""

    exit_code = 3


class EngineMismatchError(KontextError):
    """An engine was built for another GPU, version or range of sizes: it has to be rebuilt."""

    exit_code = 4


class CorruptedError(KontextError):
    """A file of a bundle is not what its manifest says: damaged, or tampered with."""

    exit_code = 6


class OutOfMemoryError(KontextError, MemoryError):
    """The device or the host has too little memory for this work."""

    exit_code = 5


class DeadlineError(KontextError, TimeoutError):
    """The deadline of a call passed before it was done."""

    exit_code = 7


class CancelledError(KontextError):
    """The ``cancel`` event of a call was set."""

    exit_code = 130
