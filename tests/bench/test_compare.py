"""Comparisons: equal work on both sides, counted; anything else is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxkontext.bench import compare
from fluxkontext.bench.contestants import (
    MEMO,
    NATIVE,
    OURS,
    Contestant,
    agreement,
    ours,
    same_work,
)
from fluxkontext.bench.document import read
from fluxkontext.bench.launched import launching, of_our_kernels
from fluxkontext.bench.peers import PEERS, Peer
from fluxkontext.bench.scenarios import Work
from fluxkontext.runtime.errors import BackendUnavailableError, InvalidInputError, KontextError

WORK = Work("edit", (64, 64), ((64, 64),), 2)


def _fail(name: str) -> None:
    raise RuntimeError(f"no kernel for {name}")


def _broken(pipe: Any) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: _fail("broken"))


@pytest.fixture(scope="module")
def document(
    small_model: Path,
    small_bundle: Path,
    namespace_env: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", namespace_env["PYTHONPATH"])
        patch.chdir(folder)
        for one in (
            Peer("absent", needs=("no_such_package",)),
            Peer("unloadable", adapt=lambda _: _fail("unloadable")),
            Peer("broken", adapt=_broken),
        ):
            patch.setitem(PEERS, one.name, one)
        patch.setattr(compare, "NAMES", (*compare.NAMES, "absent", "unloadable", "broken"))
        options = ["--model", str(small_model), "--steps", "2", "--rounds", "4", "--warmup", "1"]
        peers = [MEMO, NATIVE, "unloadable", "broken", "diffusers", "diffusers-bf16", "absent"]
        options += ["--peers", ",".join(peers), "--cold", "1", "--bundle", str(small_bundle)]
        assert compare.main([*options, "--out", str(folder / "compare.json")]) == 1
    return read(folder / "compare.json")


def test_all_do_the_same_work(document: dict[str, Any]) -> None:
    rows = {row["parameters"]["implementation"]: row for row in document["results"]}
    measured = [OURS, MEMO, NATIVE, "diffusers", "diffusers-bf16"]
    assert [name for name in rows if rows[name]["latency"]] == measured
    works = {name: row["work"] for name, row in rows.items() if row["work"]}
    assert {work["forwards"] for work in works.values()} == {2}
    assert len({work["tokens"] for work in works.values()}) == 1
    assert works[OURS]["tokens"] == sum(rows[OURS]["parameters"]["tokens"].values())
    assert rows[OURS]["parameters"]["backend"] == "onnx"  # as a user of a bundle on a CPU has it
    assert len({work["flop"] for work in works.values()}) == 1
    assert {row["latency"]["count"] for row in rows.values() if row["latency"]} == {4}


def test_outputs_agree(document: dict[str, Any]) -> None:
    warm = {c["other"].split(", ")[-1]: c for c in document["comparisons"] if c["what"] == "warm"}
    assert warm["diffusers fp32"]["agreement"]["max_levels"] <= 1
    assert warm[f"{NATIVE} fp32"]["agreement"]["max_levels"] <= 1
    assert warm[f"{MEMO} fp32"]["agreement"] == {"max_levels": 0, "psnr_db": None}
    assert warm["diffusers-bf16 bf16"]["agreement"]["psnr_db"] > 10
    for found in warm.values():
        assert found["interval"][0] <= found["ratio"] <= found["interval"][1]


def test_ratios_are_of_the_medians(document: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in document["results"]}
    for found in document["comparisons"]:
        base, other = rows[found["base"]], rows[found["other"]]
        key = "process_start_to_picture"
        if found["what"] == "warm":
            ratio = other["latency"]["p50"] / base["latency"]["p50"]
        else:
            ratio = other["cold"][key]["p50"] / base["cold"][key]["p50"]
        assert found["ratio"] == pytest.approx(ratio)


def test_new_processes_are_compared_too(document: dict[str, Any]) -> None:
    cold = [c["other"].split(", ")[-1] for c in document["comparisons"] if c["what"] == "cold"]
    assert cold == [f"{NATIVE} fp32", "diffusers fp32", "diffusers-bf16 bf16"]


def test_who_is_not_there_is_a_row_that_says_so(document: dict[str, Any]) -> None:
    (row,) = (r for r in document["results"] if r["parameters"]["implementation"] == "absent")
    assert row["status"] == "skipped"
    assert row["reason"] == "not installed: no_such_package"
    assert "not_installed" in {w["kind"] for w in document["warnings"]}


def contestant(name: str, forwards: int = 2, tokens: int = 96, level: int = 100) -> Contestant:
    """Says that it did so much, and gives a grey picture."""
    picture = np.full((64, 64, 3), level, np.uint8)
    done = {"forwards": forwards, "tokens": tokens, "flop": None}
    return Contestant(name, "fp32", "x", "cpu", lambda _: picture, lambda _: (picture, done))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (contestant("lazy", forwards=1), "lazy: .*found forwards: ours 2, lazy 1"),
        (contestant("short", tokens=64), "short: .*found tokens: ours 96, short 64"),
        (contestant("wrong", level=110), "wrong: .*pictures that differ by 10 levels"),
    ],
)
def test_other_work_is_refused(other: Contestant, words: str) -> None:
    with pytest.raises(KontextError, match=words):
        compare._counted(WORK, [contestant("ours"), other])


def test_the_same_work_is_not() -> None:
    pair = [contestant("ours"), contestant("x", level=101)]
    counts, agreements, failed = compare._counted(WORK, pair)
    assert list(counts) == ["ours", "x"]
    assert agreements["x"]["max_levels"] == 1
    assert not failed
    assert same_work(counts["ours"], counts["x"], ("ours", "x")) is None


def test_a_peer_that_fails_is_a_row(document: dict[str, Any]) -> None:
    """And the others are measured: one fails as it loads, one at its first picture."""
    reasons = {
        row["parameters"]["implementation"]: row["reason"]
        for row in document["results"]
        if row["status"] == "skipped"
    }
    assert reasons["unloadable"] == "RuntimeError: no kernel for unloadable"
    assert reasons["broken"] == "RuntimeError: no kernel for broken"
    failed = {w["text"] for w in document["warnings"] if w["kind"] == "failed"}
    assert failed == {f"{name}: {reasons[name]}" for name in ("unloadable", "broken")}


def test_agreement_is_psnr() -> None:
    a = np.zeros((8, 8, 3), np.uint8)
    assert agreement(a, a + 255)["psnr_db"] == pytest.approx(0.0)
    assert agreement(a, a + 1) == {"max_levels": 1, "psnr_db": pytest.approx(48.13, abs=0.01)}


def test_what_cannot_be_compared(small_model: Path) -> None:
    options = ["--model", str(small_model), "--steps", "1", "--backend", "native"]
    with pytest.raises(InvalidInputError, match="found photoshop"):
        compare.main([*options, "--peers", "photoshop"])
    with pytest.raises(BackendUnavailableError, match="torchao-fp8: runs on cuda, not on cpu"):
        compare.main([*options, "--peers", "diffusers-torchao-fp8", "--device", "cpu"])
    with pytest.raises(InvalidInputError, match="found two-contexts"):
        compare.main([*options, "--scenario", "two-contexts"])


def test_a_kernel_that_did_not_run_is_a_fallback() -> None:
    a = torch.ones(4, 4)
    with launching("x", ["aten::mm"], "cpu"):
        a @ a
    with (
        pytest.raises(KontextError, match="x: expected a kernel like _scaled_mm, found none"),
        launching("x", ["aten::mm", "_scaled_mm"], "cpu"),
    ):
        a @ a


def test_what_has_to_run_is_what_the_backend_says() -> None:
    said = "modulate=triton norm_rope=torch attention=torch linear_fp8=triton"
    assert of_our_kernels(said, "bf16") == ["_modulate_kernel"]
    assert len(of_our_kernels(said, "fp8")) == 2
    assert of_our_kernels("", "fp32") == []


class Recorder:
    """Like CUDA's: capturing calls the work, replaying calls nothing."""

    def capture(self, work: Any) -> "Recorder":
        work()
        return self

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


def test_steps_that_a_graph_replays_are_counted(small_model: Path) -> None:
    with ours(OURS, small_model, "native", "fp32", "cpu") as (one, pipe):
        pipe.backend._executor._recorder = Recorder()  # type: ignore[attr-defined]
        for _ in range(2):  # with the capture, and with replays alone
            work = one.counted(replace(WORK, steps=5))[1]
            assert work["forwards"] == 5
        pipe.backend._executor._recorder = None  # type: ignore[attr-defined]


def test_the_full_size_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="--spec full: expected an NVIDIA GPU"):
        compare.main(["--spec", "full"])
