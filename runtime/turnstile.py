"""One call at a time, in the order of arrival, with a bounded queue."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .errors import ClosedError, KontextError, QueueFullError

_TICK = 0.05
"""Seconds between looks at a waiting call's own cancellation and deadline."""


@dataclass(eq=False)
class _Ticket:
    thread: int = field(default_factory=threading.get_ident)


class Turnstile:
    """A fair lock that refuses to queue more than ``max_queue`` waiting calls."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._condition = threading.Condition()
        self._line: deque[_Ticket] = deque()  # the first one is inside
        self._closed = False

    @contextmanager
    def enter(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for this call's turn. ``check`` is called while waiting and may raise to give up."""
        ticket = _Ticket()
        try:
            with self._condition:
                self._admit(ticket)
                while self._line[0] is not ticket:
                    check()
                    self._refuse_if_closed()
                    self._condition.wait(_TICK)
            yield
        finally:
            with self._condition:
                if ticket in self._line:
                    self._line.remove(ticket)
                self._condition.notify_all()

    def _admit(self, ticket: _Ticket) -> None:
        self._refuse_if_closed()
        self._refuse_if_inside("a call")
        if len(self._line) > self.max_queue:
            raise QueueFullError(
                f"expected at most {self.max_queue} waiting calls, found {len(self._line) - 1}; "
                "try again later or raise max_queue"
            )
        self._line.append(ticket)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClosedError("expected an open pipeline, found a closed one; load it again")

    def _refuse_if_inside(self, what: str) -> None:
        if self._line and self._line[0].thread == threading.get_ident():
            raise KontextError(
                f"expected {what} from outside, found one from inside its own callback"
            )

    def close(self) -> bool:
        """Refuse all other calls, and wait for the one inside; False if closed already."""
        with self._condition:
            self._refuse_if_inside("close()")
            if self._closed:
                return False
            self._closed = True
            self._condition.notify_all()
            while self._line:
                self._condition.wait(_TICK)
            return True
