"""Plans from shapes alone: exact weights, activations held to torch's, and what fits into what."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxkontext.bench.checkpoint_writer import Spec, meta_networks
from fluxkontext.bench.synthetic import TINY
from fluxkontext.kernels import KernelSet, reference
from fluxkontext.kernels.gate_residual import gate_residual
from fluxkontext.kernels.gelu import gelu, gelu_beside
from fluxkontext.kernels.modulate import modulate, residual_modulate
from fluxkontext.kernels.norm_rope import norm_rope
from fluxkontext.runtime.budget import Budget, parse_bytes
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from fluxkontext.runtime.errors import InvalidInputError, OutOfMemoryError
from fluxkontext.runtime.loading import build
from fluxkontext.runtime.memory_model import CPU, Workload, activations, t5_peak, vae_part
from fluxkontext.runtime.memory_model import decoder_peak as decoder_model
from fluxkontext.runtime.memory_model import encoder_peak as encoder_model
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.models.vae import Vae
from fluxkontext.runtime.plan import Placement, Planner
from fluxkontext.runtime.tensor_shapes import ModelShapes
from fluxkontext.runtime.weight_model import PRECISIONS, component_bytes, weigh

from .live_bytes import LiveBytes

GiB = 2**30
PUBLISHED = ModelShapes()
EDIT = Workload((1024, 1024), ((1024, 1024),))
FULL = Spec(TransformerConfig(), VaeConfig(), ClipConfig(), T5Config(), 512)
MARGIN = 1.25
"""How far a prediction may lie above what torch keeps alive; it may not lie below."""


def shapes_of(spec: Spec) -> ModelShapes:
    return ModelShapes(spec.transformer, spec.vae, spec.text_encoder, spec.text_encoder_2)


def assert_holds(predicted: int, measured: int) -> None:
    assert measured <= predicted <= MARGIN * measured, (predicted, measured, predicted / measured)


@pytest.mark.parametrize("spec", [FULL, TINY], ids=["full", "tiny"])
def test_the_tables_name_every_tensor_of_the_modules(spec: Spec) -> None:
    predicted = shapes_of(spec).tensors()
    for component, network in meta_networks(spec).items():
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert predicted[component] == wanted


def test_the_published_model_has_its_published_shapes_and_bytes() -> None:
    published = json.loads((Path(__file__).parent / "flux_dev_shapes.json").read_text())
    found = PUBLISHED.tensors()
    for component, key in (("transformer", "bfl"), ("vae", "vae_bfl")):
        wanted = {name: tuple(shape) for name, shape in published[key].items()}
        assert found[component] == wanted
    numbers = {k: sum(map(math.prod, v.values())) for k, v in found.items()}
    assert component_bytes(PUBLISHED, "bf16") == {k: 2 * n for k, n in numbers.items()}
    assert component_bytes(PUBLISHED, "fp32") == {k: 4 * n for k, n in numbers.items()}
    # performance.md §2: 8.6 B numbers in block linears, 3.23 B in modulation
    weights = weigh(PUBLISHED, "bf16")
    assert sum(weights.groups["modulation"].values()) / 2e9 == pytest.approx(3.23, abs=0.01)
    assert sum(weights.groups["blocks"].values()) / 2e9 == pytest.approx(8.6, abs=0.05)


@pytest.mark.parametrize(
    ("precision", "block_bits", "text_bits"), [("fp8", 8, 8), ("nvfp4", 4.5, 8), ("bf16", 16, 16)]
)
def test_quantised_weights_take_the_bits_of_their_format(
    precision: str, block_bits: float, text_bits: float
) -> None:
    weights, plain = weigh(PUBLISHED, precision).groups, weigh(PUBLISHED, "bf16").groups
    for group, bits in (("blocks", block_bits), ("text", text_bits), ("modulation", 16)):
        ratio = sum(weights[group].values()) / sum(plain[group].values())
        # CLIP, biases and norms stay bf16; scales come on top
        assert ratio == pytest.approx(bits / 16, abs=0.012), group


def test_the_published_peak_of_text_to_image_is_met() -> None:
    """performance.md [4], [11]: bf16 resident 33.9 GB (diffusers) and 35.7 GB (TensorRT's demo)."""
    planner = Planner(PUBLISHED, "bf16", CPU, graphs=False)  # their allocator's peaks
    plan = planner.plan(Workload((1024, 1024), remembered=0))
    assert 33.7e9 < plan.peak < 35.7e9
    assert planner.weights.total == pytest.approx(33.74e9, rel=1e-3)


# Activations, against the tensors that torch keeps alive


def attention_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What any attention allocates; torch's own on the meta device would make the matrix."""
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


FUSED = replace(
    reference(),
    modulate=modulate,
    norm_rope=norm_rope,
    gate_residual=gate_residual,
    residual_modulate=residual_modulate,
    gelu=gelu,
    gelu_beside=gelu_beside,
    attention=attention_shape,
)
PLAIN = replace(reference(), attention=attention_shape)


@pytest.mark.parametrize("kernels", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("target", "contexts", "text", "batch"),
    [
        ((1024, 1024), ((1024, 1024),), 512, 1),
        ((1024, 1024), (), 512, 1),
        ((512, 512), ((1568, 672), (1024, 1024)), 128, 2),
    ],
)
def test_a_step_of_the_full_width(
    kernels: KernelSet,
    target: tuple[int, int],
    contexts: tuple[tuple[int, int], ...],
    text: int,
    batch: int,
) -> None:
    config = replace(PUBLISHED.transformer, depth=2, depth_single_blocks=3)
    shapes = replace(PUBLISHED, transformer=config)
    work = Workload(target, contexts, batch, text_tokens=text)
    flux = build(lambda: Flux(config, kernels)).to(torch.bfloat16)
    T, C = target[0] * target[1] // 256, sum(w * h for w, h in contexts) // 256

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = 12 * config.depth + 3 * config.depth_single_blocks + 2
    inputs = (
        meta(batch, T, 64),
        meta(batch, C, 3072),
        meta(batch, text, 3072),
        meta(rows, batch, 1, 3072),
        meta(text + T + C, 64, 2, dtype=torch.float32),
    )
    with torch.inference_mode(), LiveBytes() as live:
        flux(*inputs)
    assert_holds(activations(shapes, work, "bf16").denoise, live.peak)


def test_the_modulation_of_all_steps() -> None:
    flux = build(lambda: Flux(PUBLISHED.transformer, PLAIN)).to(torch.bfloat16)
    sigmas, guidance = (torch.empty(n, device="meta") for n in (28, 1))
    pooled = torch.empty(1, 768, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        flux.modulation(sigmas, guidance, pooled)
    # a picture of one token: what is left is the modulation
    assert_holds(activations(PUBLISHED, Workload((16, 16), text_tokens=1), "bf16").begin, live.peak)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1568, 672)])
def test_the_decoder_at_full_width(size: tuple[int, int]) -> None:
    """Its middle, where torch's attention on the meta device would make a matrix, is left out."""
    vae = build(lambda: Vae(PUBLISHED.vae)).to(torch.bfloat16)
    vae.decoder.mid.attn_1.forward = lambda x: x.clone()
    latents = torch.empty(1, 16, size[1] // 8, size[0] // 8, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        vae.decode(latents)
    assert_holds(decoder_model(PUBLISHED.vae, size, 2), live.peak)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1568, 672)])
def test_the_encoder_at_full_width(size: tuple[int, int]) -> None:
    vae = build(lambda: Vae(PUBLISHED.vae)).to(torch.bfloat16)
    vae.encoder.mid.attn_1.forward = lambda x: x.clone()
    pixels = torch.empty(1, 3, size[1], size[0], dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        vae.encode(pixels)
    assert_holds(encoder_model(PUBLISHED.vae, size, 2), live.peak)


@pytest.mark.parametrize("widths", [(8, 8, 16, 16), (32, 32, 64, 64)])
def test_a_whole_vae_on_a_cpu(widths: tuple[int, ...]) -> None:
    config = VaeConfig(widths, layers_per_block=1, norm_num_groups=4, sample_size=128)
    vae = Vae(config).eval()
    with torch.inference_mode(), LiveBytes() as live:
        vae.decode(torch.zeros(1, 16, 16, 16))
    assert_holds(decoder_model(config, (128, 128), 4), live.peak)
    pixels = torch.zeros(1, 3, 128, 128)
    with torch.inference_mode(), LiveBytes() as live:
        vae.encode(pixels)
    assert_holds(encoder_model(config, (128, 128), 4), live.peak)


@pytest.mark.parametrize("tokens", [32, 256])
def test_t5_on_a_cpu(tokens: int) -> None:
    config = T5Config(vocab_size=64, d_model=64, d_kv=8, d_ff=160, num_layers=2, num_heads=8)
    t5 = T5Encoder(config).eval()
    with torch.inference_mode(), LiveBytes() as live:
        t5(torch.zeros(1, tokens, dtype=torch.int64))
    assert_holds(t5_peak(config, tokens, 4), live.peak)


def test_tiles_make_the_vae_small() -> None:
    planner = Planner(PUBLISHED, "bf16", CPU)
    whole, tiled = (activations(PUBLISHED, EDIT, "bf16", tile) for tile in (0, planner.tile))
    assert vae_part(PUBLISHED.vae, (1568, 672), planner.tile) == (512, 512)
    assert tiled.decode < 0.4 * whole.decode
    assert tiled.image < 0.4 * whole.image
    assert tiled.denoise == whole.denoise


# Plans

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


def test_a_budget_admits_by_request() -> None:
    planner = Planner(PUBLISHED, "fp8")
    budget = Budget(12 * GiB, planner, EDIT)
    placed = budget.plan.placement
    budget.admit(replace(EDIT, contexts=()))
    assert budget.plan.placement == replace(placed, graphs=budget.plan.placement.graphs)
    budget.admit(replace(EDIT, target=(2048, 1024)))  # only in tiles
    assert budget.plan.placement.tile == 512
    with pytest.raises(OutOfMemoryError, match="one image at once"):
        budget.admit(replace(EDIT, batch=8))
    budget.admit(EDIT)
    assert budget.plan.placement == placed


def test_a_budget_too_small_for_the_native_size_still_takes_smaller_edits() -> None:
    planner = Planner(PUBLISHED, "bf16")
    limit = planner.least(EDIT).peak - 2**20
    budget = Budget(limit, planner, EDIT)
    with pytest.raises(OutOfMemoryError, match="use fp8 or "):
        budget.admit(EDIT)
    budget.admit(Workload((512, 512), ((512, 512),)))
    with pytest.raises(OutOfMemoryError):
        Budget(GiB, planner, EDIT)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * GiB),
        ("8GB", 8 * 10**9),
        ("16384MiB", 16 * GiB),
        ("1.5 gib", 3 * GiB // 2),
        (1000, 1000),
        ("1000", 1000),
    ],
)
def test_budgets_as_text(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12 apples", "-1GiB", "GiB", "0", 0, True, "1e9", "12Gi"])
def test_budgets_that_are_none(text: str | int) -> None:
    with pytest.raises(InvalidInputError, match="vram_budget"):
        parse_bytes(text)


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
