"""The measuring itself: known durations, allocations and loads are found as they are."""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench import environment, measure
from fluxkontext.bench.document import distribution
from fluxkontext.bench.measure import Effort, OtherLoad, Shared, interleaved, sample_warnings
from fluxkontext.bench.memory import Peak, larger, resident
from fluxkontext.bench.nvml import Nvml, reasons_of, state_warnings
from fluxkontext.bench.scenarios import works
from fluxkontext.bench.stages import StageClock, Stages, timed
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.errors import InvalidInputError
from fluxkontext.runtime.geometry import Grid

from .sensors import Library

ATTEMPTS = 5
"""Of a whole measurement: other processes of this machine may spoil one, never its tolerance."""


def lasts(seconds: float) -> None:
    """Sleep for the most, so that a scheduler has no reason to interrupt, and wait out the rest."""
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - 0.005))
    while time.perf_counter() < end:
        pass


def settled(measured: Callable[[], tuple[Sequence[float], Sequence[float]]], share: float) -> None:
    """Some attempt finds every value, and knows it, within its share. measured: both."""
    seen = []
    for _ in range(ATTEMPTS):
        found, known = measured()
        assert len(found) == len(known) > 0
        seen.append(max(abs(f / k - 1) for f, k in zip(found, known, strict=True)))
        if seen[-1] <= share:
            return
    raise AssertionError(f"expected to be at most {share} off, found {seen}")


def test_known_durations_are_measured_within_2_percent() -> None:
    """What each call took is noted by itself: a busy machine makes some longer than they ask."""
    least = {"short": 0.01, "long": 0.03}

    def measured() -> tuple[list[float], list[float]]:
        noted: dict[str, list[float]] = {name: [] for name in least}

        def work(name: str) -> None:
            start = time.perf_counter()
            lasts(least[name])
            noted[name].append(time.perf_counter() - start)

        works = {"short": lambda: work("short"), "long": lambda: work("long")}
        taken = interleaved(works, Effort(0, 15))
        assert all(min(taken[name]) >= least[name] for name in least)
        medians = [distribution(taken[name])["p50"] for name in least]
        known = [float(np.median(noted[name])) for name in least]
        return (
            [*taken["short"], *taken["long"], *medians],
            [*noted["short"], *noted["long"], *known],
        )

    settled(measured, 0.02)


class Slow:
    """A backend whose text and steps take known times, which it notes as they were."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.texts: list[float] = []
        self.steps: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_text(self, prompt: Any) -> Any:
        start = time.perf_counter()
        handle = self._backend.encode_text(prompt)
        lasts(0.03)
        self.texts.append(time.perf_counter() - start)
        return handle

    def step(self, state: Any, i: int) -> None:
        start = time.perf_counter()
        lasts(0.01 * (i + 1))
        self.steps.append(time.perf_counter() - start)


def test_known_stages_and_steps_are_measured_within_2_percent(small_model: Path) -> None:
    (work,) = works(["text-to-image"], _grid(small_model), [3], [1])
    with KontextPipeline.from_pretrained(small_model, memo_entries=0) as pipe:
        ours = pipe.backend
        arguments = work.arguments()

        def measured() -> tuple[list[float], list[float]]:
            slow = pipe.backend = pipe.encoder.backend = Slow(ours)
            stages = Stages()
            with timed(pipe) as clock:
                for _ in range(5):
                    start = time.perf_counter()
                    timings = pipe(**arguments).timings
                    stages.add(clock, timings, time.perf_counter() - start)
            by_call = np.reshape(slow.steps, (5, 3)).sum(axis=1).tolist()
            return (
                [*stages.steps, *stages.stages["text"], *stages.stages["denoise"]],
                [*slow.steps, *slow.texts, *by_call],
            )

        settled(measured, 0.02)
        pipe.backend = pipe.encoder.backend = ours


def test_the_stages_add_up_to_the_call(small_model: Path) -> None:
    (work,) = works(["edit"], _grid(small_model), [4], [2])
    with KontextPipeline.from_pretrained(small_model, memo_entries=0) as pipe:
        arguments = work.arguments()
        stages, walls = Stages(), []
        with timed(pipe) as clock:
            for _ in range(4):
                start = time.perf_counter()
                timings = pipe(**arguments).timings
                walls.append(time.perf_counter() - start)
                stages.add(clock, timings, walls[-1])
            assert clock.tokens == sum(work.tokens(pipe.grid, 64).values())
        assert pipe.backend.name == "native"
        assert not isinstance(pipe.backend, type(clock))
    # what a pipeline does between its stages is not measured, and small unless others compute then
    sums = [sum(values[i] for values in stages.stages.values()) for i in range(4)]
    shares = [total / wall for total, wall in zip(sums, walls, strict=True)]
    assert 0.9 <= max(shares) <= 1.0001
    assert len(stages.steps) == 16
    assert all(values[0] > 0 for name, values in stages.stages.items() if name != "image_out")


def test_marks_are_made_where_the_backend_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream of its GPU, which need not be the process's current one."""
    import torch

    streams = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str | None = None) -> None:
            streams.append(stream)

    class Second:
        name, device, precision = "native", "cuda:1", "bf16"

        def step(self, state: Any, i: int) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    backend: Any = Second()
    StageClock(backend).step(None, 0)
    assert streams == ["stream of cuda:1"] * 2


def test_a_known_allocation_is_measured_within_1_percent() -> None:
    now = resident()[0]
    if now is None:
        pytest.skip("needs /proc/self/status, which only Linux has")
    size = 256 * 2**20
    peak = Peak("cpu", None)

    def found() -> tuple[list[float], list[float]]:
        before = resident()[0] or 0
        peak.start()
        block = np.ones(size, np.uint8)  # touched, and gone before the end
        del block
        return [(peak.stop()["max_ram"] or 0) - before], [size]

    settled(found, 0.01)


def test_a_peak_forgets_what_was_before_it() -> None:
    if resident()[0] is None:
        pytest.skip("needs /proc/self/status, which only Linux has")
    block = np.ones(256 * 2**20, np.uint8)
    del block
    peak = Peak("cpu", None)
    peak.start()
    assert peak.stop()["max_ram"] < (resident()[0] or 0) + 2**26


@pytest.mark.gpu
def test_a_known_allocation_on_a_gpu_is_measured_within_1_percent() -> None:
    import torch

    torch.ones(1, device="cuda")
    peak = Peak("cuda:0", environment.reader_of("cuda:0"))
    before = torch.cuda.memory_allocated()
    peak.start()
    block = torch.ones(256 * 2**20, dtype=torch.uint8, device="cuda")
    del block
    assert peak.stop()["max_allocated"] - before == pytest.approx(256 * 2**20, rel=0.01)


def test_larger_takes_what_is_known() -> None:
    a = {"x": 1, "y": None, "z": None}
    assert larger(a, {"x": 3, "y": 2, "z": None}) == {"x": 3, "y": 2, "z": None}


def test_rounds_are_interleaved_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    after: list[str] = []
    taken = interleaved(
        {"A": lambda: calls.append("A"), "B": lambda: calls.append("B")},
        Effort(1, 4),
        warmed=lambda: calls.append("|"),
        after=lambda name, seconds: after.append(name),
    )
    assert "".join(calls) == "AB|ABBAABBA"
    assert "".join(after) == "ABBAABBA"
    assert [len(values) for values in taken.values()] == [4, 4]


@pytest.mark.parametrize(
    ("rounds", "seconds", "expected"),
    [(7, None, 7), (1, None, 1), (None, 1e-9, 3), (5, 1e-9, 3), (2, 1e-9, 2), (4, 60.0, 4)],
)
def test_how_long_it_measures(rounds: int | None, seconds: float | None, expected: int) -> None:
    assert len(interleaved({"": lambda: None}, Effort(0, rounds, seconds))[""]) == expected


def test_a_time_is_kept() -> None:
    """Rounds go on until it is over, and no longer; how many fit is the machine's affair."""
    start = time.perf_counter()
    taken = interleaved({"": lambda: lasts(0.01)}, Effort(0, None, 0.2))[""]
    assert time.perf_counter() - start >= 0.2
    assert sum(taken[:-1]) < 0.2
    assert len(taken) <= 21


def test_a_time_is_shared_equally_and_what_one_leaves_is_the_others() -> None:
    spare = Shared(6.0, 3)
    given = []
    for _ in range(3):
        with spare.share() as seconds:
            given.append(seconds)
    assert given == [pytest.approx(share, rel=0.1) for share in (2.0, 3.0, 6.0)]
    with Shared(None, 2).share() as seconds:
        assert seconds is None


def test_some_limit_has_to_be_there() -> None:
    with pytest.raises(InvalidInputError, match="found neither"):
        Effort(0, None)


@pytest.mark.parametrize(
    ("taken", "kinds"),
    [
        ([1.0] * 9, ["few_samples"]),
        ([1.0] * 10, []),
        ([1.0] * 10 + [1.2] * 10, ["spread"]),
        ([1.2] * 10 + [1.0] * 10, ["spread"]),
        ([1.0] * 10 + [1.05] * 10, []),
        ([1.0, 1.5] * 10, []),
        ([1.0, 2.0], ["few_samples"]),
    ],
)
def test_samples_that_raise_doubts(taken: list[float], kinds: list[str]) -> None:
    assert [found["kind"] for found in sample_warnings(taken, "x")] == kinds


def test_load_of_others_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A recorded /proc/stat of a machine with two processors: one second, one of them taken."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr(measure.os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    stat.write_text("cpu  1000 10 500 80000 40 0 20 0 0 0\ncpu0 ...\n")
    load = OtherLoad()
    assert load.share() is None  # no time has passed
    stat.write_text("cpu  1080 10 510 80090 50 0 20 10 0 0\ncpu0 ...\n")
    assert load.share() == pytest.approx(0.5)
    ticks = 50 / os.sysconf("SC_CLK_TCK")  # a quarter of all, by this process and its children
    monkeypatch.setattr(
        measure.os, "times", lambda: (ticks / 2, ticks / 4, ticks / 8, ticks / 8, 0)
    )
    assert load.share() == pytest.approx(0.25)
    monkeypatch.setattr(measure.os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    assert [w["kind"] for w in load.warnings()] == ["other_load"]
    assert "50%" in load.warnings()[0]["text"]
    stat.unlink()
    assert load.share() is None
    assert load.warnings() == []


def test_load_is_read_from_this_machine() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("needs /proc/stat, which only Linux has")
    load = OtherLoad()
    time.sleep(0.1)  # ten ticks of each processor
    share = load.share()
    assert share is not None
    assert 0 <= share <= 1


def test_readings_of_a_gpu() -> None:
    reader = Nvml(Library(), "handle")
    uuid = hashlib.sha256(b"GPU-01234567-89ab-cdef-0123-456789abcdef").hexdigest()[:16]
    assert reader.facts() == {
        "name": "NVIDIA H200",
        "uuid_hash": uuid,
        "power_limit_w": 700.0,
        "driver": "580.00",
    }
    assert reader.state() == {
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 3201,
        "temperature_c": 61,
        "power_w": 698.5,
        "throttle_reasons": ["power cap"],
    }
    assert reader.memory() == (None, 17 * 2**30)
    assert reader.joules() is None


def test_a_gpu_that_was_held_back_or_changed_its_clock_says_so() -> None:
    fast, slow = (Nvml(Library(sm, bits), "").state() for sm, bits in ((1980, 0), (1755, 0x24)))
    almost = Nvml(Library(1950, 0x1), "").state()
    assert state_warnings([fast, almost, fast], "x") == []
    assert state_warnings([None, None], "x") == []
    throttled, changed = state_warnings([fast, slow], "x")
    assert throttled["kind"] == "throttled"
    assert "power cap, thermal slowdown" in throttled["text"]
    assert changed == {
        "kind": "clock_changed",
        "text": "the SM clock went from 1980 to 1755 MHz",
        "result": "x",
    }
    assert "1755 MHz between" in state_warnings([fast, slow, fast], "x")[1]["text"]
    assert reasons_of(0x1 | 0x40) == ["idle", "hardware thermal slowdown"]


def test_where_it_ran() -> None:
    found = environment.environment("cpu", None, None)
    assert found["numpy"] == np.__version__
    assert found["cores"] >= 1
    assert found["gpu"] is None
    assert found["ram"] > 2**28


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.git_state() == {"commit": None, "dirty": None}
    git("init", "--quiet")
    assert environment.git_state()["commit"] is None  # somebody else's repository, around us
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    assert environment.git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new").touch()
    state = environment.git_state()
    assert state["dirty"] is True
    assert [w["kind"] for w in environment.git_warnings(state)] == ["dirty_tree"]
    monkeypatch.setenv("FLUXKONTEXT_COMMIT", "0" * 40)
    assert environment.git_state() == state
    (tmp_path / ".git").rename(tmp_path / "gone")  # as of a copy without history
    assert environment.git_state() == {"commit": "0" * 40, "dirty": False}


def _grid(model: Path) -> Grid:
    with KontextPipeline.from_pretrained(model) as pipe:
        return pipe.grid
