"""Samples of how long something takes, and the doubts that the samples themselves raise."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import InvalidInputError
from .document import Json, warning
from .report.wording import seconds

FEW = 10
"""Fewer samples hardly show their own spread."""
LEAST = 3
"""Rounds of most benchmarks, however long they take."""
DRIFT = 0.1
"""Of the median between the halves of a run: with more, the machine itself changed."""
OTHER_LOAD = 0.1
"""Of the machine's processors, used by others."""

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``rounds`` or ``seconds``, whichever ends first (None: no such limit),
    but ``least`` rounds however long they take; after ``warmup`` rounds that do not count."""

    warmup: int
    rounds: int | None
    seconds: float | None = None
    least: int = LEAST

    def __post_init__(self) -> None:
        """One limit has to be there."""
        if self.rounds is None and self.seconds is None:
            raise InvalidInputError("expected a number of rounds or a time, found neither")

    def goes_on(self, done: int, since: float) -> bool:
        """Whether another round is due. since: ``time.perf_counter()`` at the first."""
        if self.rounds is not None and done >= self.rounds:
            return False
        if done < self.least or self.seconds is None:
            return True
        return time.perf_counter() - since < self.seconds


@dataclass
class Shared:
    """Seconds (None: no limit) for ``works``, of which each has an equal share of what those before
    it have left."""

    seconds: float | None
    works: int

    @contextmanager
    def share(self) -> Iterator[float | None]:
        """Of the next work, which is done in this block."""
        begun = time.perf_counter()
        try:
            yield None if self.seconds is None else self.seconds / self.works
        finally:
            self.works -= 1
            if self.seconds is not None:
                self.seconds = max(0.0, self.seconds - (time.perf_counter() - begun))


def interleaved(
    works: Mapping[str, Callable[[], object]],
    effort: Effort,
    *,
    warmed: Callable[[], object] = lambda: None,
    after: Callable[[str, float], object] = lambda *_: None,
) -> dict[str, list[float]]:
    """Wall-clock seconds of every call of each work, which returns when all it does is done.

    A round calls each once, in order (A B), the next in reverse (B A): a machine that gets slower
    does not favour one of them. warmed: called after the warm-up. after: called with each work's
    name and sample, outside of the time.
    """
    for _ in range(effort.warmup):
        for work in works.values():
            work()
    warmed()
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    since = time.perf_counter()
    done = 0
    while effort.goes_on(done, since):
        for name in order:
            start = time.perf_counter()
            works[name]()
            taken[name].append(time.perf_counter() - start)
            after(name, taken[name][-1])
        order.reverse()
        done += 1
    return taken


def sample_warnings(taken: Sequence[float], about: str) -> list[Json]:
    """Too few of them, or a machine that changed between the first and the last."""
    found = []
    if len(taken) < FEW:
        found.append(
            warning("few_samples", f"{len(taken)} samples; {FEW} or more show a spread", about)
        )
    half = len(taken) // 2
    if half >= FEW // 2:
        first, second = statistics.median(taken[:half]), statistics.median(taken[-half:])
        if abs(second / first - 1) > DRIFT:
            text = f"the median went from {seconds(first)} to {seconds(second)} between the halves"
            found.append(warning("spread", text, about))
    return found


class OtherLoad:
    """The share of this machine's processors that other processes use. Linux; else unknown."""

    def __init__(self) -> None:
        self._start = _ticks()

    def share(self) -> float | None:
        """0..1 since this object was made."""
        start, now = self._start, _ticks()
        if start is None or now is None or now[0] <= start[0]:
            return None
        total, busy, own = (b - a for a, b in zip(start, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / total))

    def warnings(self, about: str | None = None) -> list[Json]:
        share = self.share()
        if share is None or share <= OTHER_LOAD:
            return []
        text = f"other processes used {share:.0%} of the processors while this was measured"
        return [warning("other_load", text, about)]


def _ticks() -> tuple[float, float, float] | None:
    """Of all processors since boot: all ticks and the busy ones; and this process's, and its
    finished children's. See proc_stat(5); time stolen by the hypervisor counts as busy."""
    try:
        line = _STAT.read_text(encoding="ascii").partition("\n")[0]
        ticks = [int(value) for value in line.split()[1:9]]
    except (OSError, ValueError):
        return None
    times = os.times()
    own = sum(times[:4]) * os.sysconf("SC_CLK_TCK")
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own


def throughput(pictures: int, taken: float) -> Json:
    """Pictures finished in so many seconds."""
    return {"unit": "images/s", "value": pictures / taken}


def energy(joules: float | None, calls: int, pictures: int) -> dict[str, Any]:
    """``energy`` of a call and ``efficiency`` of a result; empty where nothing was read."""
    if joules is None or joules <= 0:
        return {}
    return {
        "energy": {"unit": "J", "gpu": joules / calls, "total": joules / calls},
        "efficiency": {"unit": "images/kWh", "value": pictures / (joules / 3.6e6)},
    }
