"""What limits a call, its cancellation and its deadline, and how long its stages took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from threading import Event

from .arguments import shown
from .errors import CancelledError, DeadlineError, InvalidInputError


class Watch:
    """Started when a call arrives; looked at while it waits and before every step."""

    def __init__(self, cancel: Event | None, deadline: float | None) -> None:
        """deadline: seconds from now."""
        if deadline is not None and not (isinstance(deadline, Real) and deadline > 0):
            raise InvalidInputError(f"deadline: expected seconds above 0, found {shown(deadline)}")
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise InvalidInputError(
                f"cancel: expected a threading.Event, found {type(cancel).__name__}"
            )
        self.cancel = cancel
        self.deadline = deadline
        self.start = time.perf_counter()
        self.timings: dict[str, float] = {}
        """Seconds by stage, as the host saw them: a GPU may still be busy when a stage ends, so
        that `decode`, which waits for the picture, carries the rest of `denoise`."""

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def check(self) -> None:
        """Raise when the call was cancelled or is too late."""
        if self.cancel is not None and self.cancel.is_set():
            raise CancelledError("expected to finish, found the call cancelled")
        if self.deadline is not None and self.elapsed > self.deadline:
            raise DeadlineError(
                f"expected to finish in {self.deadline:g} s, found {self.elapsed:.2f} s gone; "
                "allow more time, or use fewer steps or a smaller size"
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
