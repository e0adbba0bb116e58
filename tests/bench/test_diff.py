"""`bench diff`: slower is caught, noise is not, and what cannot be compared is refused."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench.diff import ALL, FALSE_ALARMS, compare, main
from fluxkontext.bench.document import distribution, memory, warning
from fluxkontext.bench.measure import Effort, interleaved
from fluxkontext.runtime.errors import InvalidInputError

from .documents import ENVIRONMENT, MODEL, gpu, measured, run

Json = dict[str, Any]


def saved(folder: Path, **documents: Json) -> list[str]:
    files = [folder / f"{name}.json" for name in documents]
    for file, document in zip(files, documents.values(), strict=True):
        file.write_text(json.dumps(document), encoding="utf-8")
    return [str(file) for file in files]


def verdicts(old: Json, new: Json, threshold: float = 0.03) -> dict[str, str]:
    return {change.name: change.verdict for change in compare(old, new, threshold)}


def test_slower_faster_and_same_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = run(*(measured(name, seed=i) for i, name in enumerate(("a", "b", "c"))))
    new = run(measured("a", 0.22, seed=7), measured("b", 0.18, seed=8), measured("c", seed=9))
    files = saved(tmp_path, old=old, new=new)
    assert main(files) == 1
    out, err = capsys.readouterr()
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if line[0] == "|"}
    assert "REGRESSION" in lines["a"]
    assert "+9.8%" in lines["a"]
    assert "improvement" in lines["b"]
    assert "same" in lines["c"]
    assert err.startswith("worse beyond noise and 3.0%: a\n")
    assert main([*files, "--threshold", "20%"]) == 0
    assert main([files[0], files[0]]) == 0


def test_what_makes_a_difference_less_certain_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubts = [warning("other_load", "others used 50%"), warning("dirty_tree", "changes")]
    files = saved(tmp_path, old=run(measured("a")), new=run(measured("a", seed=3), warnings=doubts))
    assert main(files) == 0
    assert capsys.readouterr().err == "the new run: others used 50%\n"


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, old=run(measured("a"), measured("b")), new=run(measured("a", 0.3)))
    assert main([*files, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["b"]
    (change,) = found["changes"]
    assert change["verdict"] == "REGRESSION"
    assert change["ratio"] == pytest.approx(1.5, rel=0.05)


def test_a_workload_slowed_on_purpose_is_caught() -> None:
    """Really timed, by the benchmarks' own sampler. Both wait: a processor that others share would
    make arithmetic last as long as it likes."""
    works = {"old": partial(time.sleep, 0.01), "new": partial(time.sleep, 0.02)}
    taken = interleaved(works, Effort(warmup=3, rounds=40))
    old, new = (run(measured("work", latency=distribution(taken[name]))) for name in works)
    assert verdicts(old, new) == {"work": "REGRESSION"}
    assert verdicts(new, old) == {"work": "improvement"}


def test_runs_that_do_not_differ_rarely_raise_an_alarm() -> None:
    """Of 500 diffs of 6 results each, at most the promised share, and what chance adds to it: four
    standard deviations. Without a threshold, so that the test itself is on trial."""
    diffs, results, samples = 500, 6, 12
    rng = np.random.default_rng(0)
    settings = [measured(str(i)) for i in range(results)]
    alarms = 0
    for _ in range(diffs):
        old, new = (
            {"results": [{**s, "latency": {"values": values.tolist()}} for s, values in pairs]}
            for pairs in (
                list(zip(settings, rng.lognormal(-2, 0.1, (results, samples)), strict=True))
                for _ in range(2)
            )
        )
        alarms += "REGRESSION" in verdicts(old, new, threshold=0).values()
    assert alarms <= diffs * FALSE_ALARMS + 4 * (diffs * FALSE_ALARMS) ** 0.5, alarms


def test_a_slowdown_of_five_percent_is_found_in_twenty_samples() -> None:
    """Of a 2% noise, in each of 100 runs."""
    for seed in range(100):
        old, new = run(measured("a", seed=seed)), run(measured("a", 0.21, seed=1000 + seed))
        assert verdicts(old, new) == {"a": "REGRESSION"}


def test_a_little_everywhere_shows_in_the_sum_of_all() -> None:
    """Three samples of each result cannot convict any of them."""
    old = run(*(measured(str(i), count=3, seed=i) for i in range(12)))
    new = run(*(measured(str(i), 0.22, count=3, seed=100 + i) for i in range(12)))
    found = verdicts(old, new)
    assert found.pop(ALL) == "REGRESSION"
    assert set(found.values()) == {"too few samples"}


def test_cold_starts_and_peaks_count() -> None:
    def document(start: float, peak: int) -> Json:
        cold = distribution([start * (1 + 0.001 * i) for i in range(8)])
        return run(
            measured(
                "a",
                cold={"process_start_to_picture": cold, "load": None, "first_edit": None},
                memory={"total": memory(max_allocated=peak)},
            )
        )

    found = verdicts(document(2.0, 10 << 30), document(2.5, 11 << 30))
    assert found == {
        "a": "same",
        "a: process start to picture": "REGRESSION",
        "a: peak VRAM": "REGRESSION",
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"suite": ("edit", 2)}, "different suites: edit v1 and edit v2"),
        ({"environment": {**ENVIRONMENT, "cpu": "Another"}}, "different devices"),
        ({"environment": {**ENVIRONMENT, "threads": 8}}, "different devices"),
        ({"model": {**MODEL, "digest": "abc"}}, "different models: synthetic and abc"),
    ],
)
def test_different_conditions_are_refused(
    tmp_path: Path, changed: Json, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = saved(tmp_path, old=run(measured("a")), new=run(measured("a"), **changed))
    with pytest.raises(InvalidInputError, match=said) as refused:
        main(files)
    assert refused.value.exit_code == 2
    assert "--force" in str(refused.value)
    assert main([*files, "--force"]) == 0


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"steps": 8}, "different work as a: steps 4 and 8"),
        ({"backend": "onnx"}, "different backend of a: native and onnx"),
        ({"precision": "bf16"}, "different precision of a"),
    ],
)
def test_different_work_is_refused(tmp_path: Path, parameters: Json, said: str) -> None:
    new = run(measured("a", parameters=parameters))
    with pytest.raises(InvalidInputError, match=said):
        main(saved(tmp_path, old=run(measured("a")), new=new))


def test_different_gpus_are_refused(tmp_path: Path) -> None:
    old, new = (
        run(
            measured("a", parameters={"device": "cuda:0"}),
            environment={**ENVIRONMENT, "gpu": gpu(name)},
        )
        for name in ("One", "Two")
    )
    with pytest.raises(InvalidInputError, match="different devices: One and Two"):
        main(saved(tmp_path, old=old, new=new))


def test_nothing_in_common_is_refused_even_by_force(tmp_path: Path) -> None:
    files = saved(tmp_path, old=run(measured("a")), new=run(measured("b")))
    with pytest.raises(InvalidInputError, match="a result that both runs measured"):
        main([*files, "--force"])


@pytest.mark.parametrize("threshold", ["-1%", "100%", "x", "nan"])
def test_thresholds_are_checked(threshold: str) -> None:
    with pytest.raises(InvalidInputError, match="expected a share like 3%"):
        main(["old", "new", f"--threshold={threshold}"])


def test_a_diff_takes_no_time() -> None:
    """A large one: 60 results of 30 samples each."""
    old = run(*(measured(str(i), count=30, seed=i) for i in range(60)))
    start = time.process_time()
    compare(old, old, 0.03)
    assert time.process_time() - start < 5
