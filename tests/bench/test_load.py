"""Load: arrivals, the waits of those behind a slow one, and the verdict."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fluxkontext.bench import load
from fluxkontext.bench.document import read
from fluxkontext.bench.load import Served, arrivals, closed_loop, open_loop
from fluxkontext.runtime.errors import InvalidInputError, QueueFullError


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(50.0, 200.0, seed=0)
    gaps = np.diff([0.0, *times])
    assert times[-1] < 200
    assert len(times) == pytest.approx(10_000, abs=4 * 100)  # four standard deviations
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # as its mean, where arrivals are free
    assert times == arrivals(50.0, 200.0, seed=0)
    assert times != arrivals(50.0, 200.0, seed=1)
    assert len(arrivals(0.001, 1.0, seed=0)) == 1  # a run without a request says nothing


class Server:
    """Serves one at a time, each in ``seconds``; up to ``queue`` may wait."""

    def __init__(self, seconds: float, queue: int = 1000) -> None:
        self.seconds, self.queue = seconds, queue
        self.most = 0  # that were there at once
        self._turn, self._count, self._waiting = threading.Lock(), threading.Lock(), 0

    def __call__(self) -> float:
        with self._count:
            if self._waiting > self.queue:
                raise QueueFullError("full")
            self._waiting += 1
            self.most = max(self.most, self._waiting)
        start = time.perf_counter()
        with self._turn:
            waited = time.perf_counter() - start
            time.sleep(self.seconds)
        with self._count:
            self._waiting -= 1
        return waited


def test_latency_runs_from_the_intended_arrival() -> None:
    """Ten arrive at once where each takes 20 ms: the last is answered after 200 ms, or later where
    other work makes sleeps longer."""
    served = open_loop(Server(0.02), [0.0] * 10, callers=2)
    assert all(found >= 0.02 * (i + 1) for i, found in enumerate(sorted(served.latency)))
    assert max(served.latency) <= served.wall
    assert max(served.queue) >= 0.1  # of 0.18: from a call to its place in the queue nobody counts
    assert min(served.queue) < max(served.queue) / 2


def test_an_idle_server_makes_nobody_wait() -> None:
    served = open_loop(Server(0.01), [0.0, 0.1, 0.2, 0.3], callers=4)
    assert float(np.median(served.latency)) < 0.09
    assert served.arrivals == 4


def test_callers_ask_again_when_they_are_answered() -> None:
    """Three at a time, all the time. A lock is not fair and a busy machine makes any sleep longer,
    so what one call waits is left to chance; what all of them wait is not."""
    server, duration = Server(0.02), 0.5
    served = closed_loop(server, callers=3, duration=duration)
    assert served.rejected == 0
    assert server.most == 3  # none asks before it is answered
    assert 0.02 * served.arrivals <= served.wall  # and the server takes one at a time
    assert served.arrivals >= 5
    assert 0.8 * 3 * duration <= sum(served.latency) <= 3 * served.wall  # none pauses
    assert served.wall >= duration


def test_who_is_refused_is_never_served() -> None:
    served = open_loop(Server(0.05, queue=0), [0.0] * 10, callers=10)
    assert served.rejected >= 7
    assert served.arrivals == 10
    assert served.quantile(0.95) == float("inf")


def test_the_quantile_is_of_all_arrivals() -> None:
    served = Served(latency=[float(i) for i in range(1, 20)])
    assert served.quantile(0.95) == 19
    assert served.quantile(0.5) == 10
    served.rejected = 1
    assert served.quantile(0.95) == float("inf")
    assert served.quantile(0.9) == 19


@pytest.mark.parametrize(("slo", "code"), [("60", 0), ("0.000001", 1)])
def test_the_exit_code_says_whether_the_objective_was_met(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], slo: str, code: int
) -> None:
    out = tmp_path / "load.json"
    options = ["--model", str(small_model), "--steps", "1", "--warmup", "1", "--out", str(out)]
    assert load.main([*options, "--rate", "30", "--duration", "0.5", "--slo", slo]) == code
    found = read(out)
    (row,) = found["results"]
    assert row["load"]["slo_met"] is (code == 0)
    assert row["load"]["completed"] == row["latency"]["count"] == row["stages"]["queue"]["count"]
    assert ("missed" if code else "met") in capsys.readouterr().out


def test_callers_and_no_objective(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(small_model), "--steps", "1", "--concurrency", "2"]
    assert load.main([*options, "--duration", "0.3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["load"]["slo_met"] is None
    assert row["load"]["concurrency"] == 2


def test_a_pace_is_one_of_two() -> None:
    for options in ([], ["--rate", "1", "--concurrency", "1"]):
        with pytest.raises(InvalidInputError, match="--rate or --concurrency"):
            load.main(options)


@pytest.mark.parametrize("options", [["--rate", "0"], ["--rate", "x"], ["--quantile", "1.5"]])
def test_options_that_mean_nothing(options: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="found"):
        load.main(options)
