"""Edit pictures with FLUX.1 Kontext. Importing this loads no torch."""

from .about import VERSION as __version__
from .errors import (
    BackendUnavailableError,
    CancelledError,
    CheckpointError,
    ClosedError,
    CorruptedError,
    DeadlineError,
    EngineMismatchError,
    InvalidInputError,
    KontextError,
    OutOfMemoryError,
    QueueFullError,
)
from .geometry import Transform
from .pipeline import KontextPipeline
from .result import EditResult

__all__ = [
    "BackendUnavailableError",
    "CancelledError",
    "CheckpointError",
    "ClosedError",
    "CorruptedError",
    "DeadlineError",
    "EditResult",
    "EngineMismatchError",
    "InvalidInputError",
    "KontextError",
    "KontextPipeline",
    "OutOfMemoryError",
    "QueueFullError",
    "Transform",
    "__version__",
]
