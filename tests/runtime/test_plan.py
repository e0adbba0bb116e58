"""Plans from shapes alone: what fits into what, and what a refusal says would."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkontext.runtime.cli import main
from fluxkontext.runtime.errors import OutOfMemoryError
from fluxkontext.runtime.memory_model import CPU, Workload
from fluxkontext.runtime.plan import Placement, Planner
from fluxkontext.runtime.tensor_shapes import ModelShapes
from fluxkontext.runtime.weight_model import PRECISIONS

GiB = 2**30
PUBLISHED = ModelShapes()
EDIT = Workload((1024, 1024), ((1024, 1024),))


def test_the_published_peak_of_text_to_image_is_met() -> None:
    """performance.md [4], [11]: bf16 resident 33.9 GB (diffusers) and 35.7 GB (TensorRT's demo)."""
    planner = Planner(PUBLISHED, "bf16", CPU, graphs=False)  # their allocator's peaks
    plan = planner.plan(Workload((1024, 1024), remembered=0))
    assert 33.7e9 < plan.peak < 35.7e9
    assert planner.weights.total == pytest.approx(33.74e9, rel=1e-3)


RESIDENT = Placement(graphs=True)
CARDS: dict[str, dict[int, tuple[int, bool, bool]]] = {
    # precision -> GiB -> (streamed blocks, text encoders streamed, modulation streamed)
    "fp32": {24: (25, True, True), 16: (39, True, True), 12: (46, True, True), 8: (53, True, True)},
    "bf16": {24: (0, True, True), 16: (12, True, True), 12: (27, True, True), 8: (41, True, True)},
    "fp16": {24: (0, True, True), 16: (12, True, True), 12: (27, True, True), 8: (41, True, True)},
    "fp8": {24: (0, False, False), 16: (0, False, True), 12: (0, True, True), 8: (21, True, True)},
    "nvfp4": {24: (0, False, False), 16: (0, False, True), 12: (0, True, True), 8: (0, True, True)},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_edit_of_full_size_on_common_cards(precision: str) -> None:
    planner = Planner(PUBLISHED, precision)
    found = {}
    for card in (24, 16, 12, 8):
        plan = planner.plan(EDIT, card * GiB)
        assert plan.fits
        assert plan.peak <= card * GiB
        place = plan.placement
        assert not (place.graphs and place.streamed_blocks)
        found[card] = place.streamed_blocks, place.text_streamed, place.modulation_streamed
    assert found == CARDS[precision]


def test_no_budget_means_everything_resident() -> None:
    plan = Planner(PUBLISHED, "bf16").plan(EDIT)
    assert plan.placement == RESIDENT
    assert (plan.host, plan.transfer, plan.reasons) == ({}, 0, [])
    assert {stage.name for stage in plan.stages} == {"text", "image", "begin", "denoise", "decode"}
    assert all(stage.weights == Planner(PUBLISHED, "bf16").weights.total for stage in plan.stages)


def test_what_comes_from_the_host_is_counted() -> None:
    planner = Planner(PUBLISHED, "bf16", CPU)
    weights = planner.weights.groups
    placement = Placement(streamed_blocks=57, modulation_streamed=True)
    plan = planner.evaluate(placement, replace(EDIT, steps=4, branches=2))
    blocks, modulation = (sum(weights[group].values()) for group in ("blocks", "modulation"))
    assert plan.host == {"blocks": blocks, "modulation": modulation}
    assert plan.transfer == 8 * blocks + 2 * modulation
    assert len(plan.reasons) == 2


def test_streamed_blocks_are_spread() -> None:
    blocks = Planner(PUBLISHED, "bf16").blocks
    assert [b.split(".", 1)[1] for b in blocks[18:20]] == ["double_blocks.18", "single_blocks.0"]
    chosen = Placement(streamed_blocks=19).on_host(blocks)["blocks"]
    assert chosen == frozenset(blocks[2::3])
    assert Placement(streamed_blocks=57).on_host(blocks)["blocks"] == frozenset(blocks)
    assert Placement().on_host(blocks) == {}


CASES = st.tuples(
    st.sampled_from(PRECISIONS),
    st.sampled_from([(512, 512), (1024, 1024), (1568, 672)]),
    st.integers(0, 2),
    st.integers(1, 4),
)


@settings(max_examples=20)
@given(CASES, st.integers(3 * GiB, 90 * GiB), st.integers(0, 20 * GiB))
def test_more_budget_never_gives_a_worse_placement(
    case: tuple[str, tuple[int, int], int, int], budget: int, more: int
) -> None:
    precision, size, contexts, batch = case
    planner = Planner(PUBLISHED, precision)
    work = Workload(size, ((1024, 1024),) * contexts, batch)
    try:
        little = planner.plan(work, budget)
    except OutOfMemoryError:
        assert planner.least(work).peak > budget
        return
    much = planner.plan(work, budget + more)
    order = [plan.placement for plan in planner.plans(work)]
    assert order.index(much.placement) <= order.index(little.placement)
    assert much.placement.streamed_blocks <= little.placement.streamed_blocks
    assert little.peak <= budget


@given(
    CASES,
    st.integers(0, 57),
    st.sampled_from([0, 512]),
    st.tuples(*[st.booleans()] * 3),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_a_larger_request_never_needs_less(
    case: tuple[str, tuple[int, int], int, int],
    blocks: int,
    tile: int,
    moved: tuple[bool, bool, bool],
    wider: int,
    higher: int,
) -> None:
    precision, (width, height), contexts, batch = case
    planner = Planner(PUBLISHED, precision)
    placement = Placement(blocks, tile, *moved)
    work = Workload((width, height), ((1024, 1024),) * contexts, batch)
    peak = planner.evaluate(placement, work).peak
    # up to twice the native side, beyond which the VAE tiles by its own rule
    larger = min(width + 16 * wider, 2048), min(height + 16 * higher, 2048)
    for change in (
        replace(work, target=larger),
        replace(work, contexts=(*work.contexts, (1024, 1024))),
        replace(work, batch=batch + 1),
        replace(work, steps=work.steps + 1),
        replace(work, branches=2),
    ):
        assert planner.evaluate(placement, change).peak >= peak


def test_a_refusal_says_what_would_fit() -> None:
    planner = Planner(PUBLISHED, "bf16")
    work = replace(EDIT, batch=4)
    limit = int(0.8 * planner.least(work).peak)
    with pytest.raises(OutOfMemoryError, match=r"needs \d+\.\d+ GiB at bf16") as caught:
        planner.plan(work, limit)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    assert "one image at once" in text
    size = tuple(map(int, text.rpartition(" ")[2].split("x")))
    assert planner.plan(replace(work, target=size), limit).fits
    assert planner.plan(replace(work, batch=1), limit).fits


def test_a_refusal_names_a_precision_only_if_it_fits() -> None:
    least = {p: Planner(PUBLISHED, p).least(EDIT).peak for p in ("bf16", "fp8", "nvfp4")}
    for limit, wanted in (
        ((least["bf16"] + least["fp8"]) // 2, "use fp8"),
        ((least["fp8"] + least["nvfp4"]) // 2, "use nvfp4"),
    ):
        with pytest.raises(OutOfMemoryError, match=wanted):
            Planner(PUBLISHED, "bf16").plan(EDIT, limit)
    with pytest.raises(OutOfMemoryError, match=r"use a budget of \d\.\d\d GiB"):
        Planner(PUBLISHED, "nvfp4").plan(EDIT, GiB)


def test_copies_in_16_bits_count_for_the_precisions_that_a_gpu_does_not_multiply() -> None:
    def denoise(precision: str, upcast: tuple[str, ...]) -> int:
        plan = Planner(PUBLISHED, precision, upcast=upcast).evaluate(Placement(), EDIT)
        return next(stage.total for stage in plan.stages if stage.name == "denoise")

    assert denoise("fp8", ("nvfp4",)) == denoise("fp8", ())
    assert denoise("nvfp4", ("nvfp4",)) > denoise("nvfp4", ())


# The command line


def test_plan_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    for precision in PRECISIONS:
        assert f"\n{precision} " in text
    assert "8 GiB" in text
    assert "predicted peak" in text
    assert "assumed, not measured" in text


def test_plan_as_json(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(small_model), "--size", "64x48", "--vram-budget", "4GiB", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == [64, 48]
    assert report["chosen"]["precision"] == "bf16"
    assert [plan["precision"] for plan in report["plans"]] == list(PRECISIONS)
    for plan in report["plans"]:
        assert plan["fits"]
        assert plan["peak"] == max(stage["total"] for stage in plan["stages"].values())


def test_plan_that_cannot_be_exits_with_5(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vram-budget", "3GiB", "--precision", "bf16"]) == 5
    assert main(["plan", "--vram-budget", "1GiB"]) == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "use fp8" in error
    assert main(["plan", "--vram-budget", "lots"]) == 2
    assert main(["plan", "--precision", "int3"]) == 2
