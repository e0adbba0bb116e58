"""Plans carried out: streamed weights give the bits of resident ones, within the budget."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fluxkontext.bench.synthetic import write_checkpoint
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.budget import Budget
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.errors import BackendUnavailableError, OutOfMemoryError
from fluxkontext.runtime.memory_model import CPU, Workload
from fluxkontext.runtime.placement import Placed
from fluxkontext.runtime.plan import Placement, Plan, Planner
from fluxkontext.runtime.tensor_shapes import ModelShapes

from .live_bytes import LiveBytes

NATIVE = (128, 128)
STEPS = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def resident(tiny: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(tiny, device="cpu", precision="fp32", memo_entries=0)


def within(tiny: Path, limit: int | str, precision: str = "fp32") -> KontextPipeline:
    return KontextPipeline.from_pretrained(
        tiny, device="cpu", precision=precision, memo_entries=0, vram_budget=limit
    )


def native(pipe: KontextPipeline) -> NativeBackend:
    assert isinstance(pipe.backend, NativeBackend)
    return pipe.backend


def edit(pipe: KontextPipeline, prompt: str = "a cat", **options: object) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    arguments = {"num_inference_steps": STEPS, "seed": 0, "output_type": "np", **options}
    return np.stack(pipe(picture, prompt, **arguments).images)


def plans(tiny: Path) -> list[Plan]:
    """What budgets of all sizes make of the tiny model: every placement that some budget gets."""
    from fluxkontext.runtime.checkpoint import find

    planner = Planner(ModelShapes.of(find(tiny, {})), "fp32", CPU, graphs=False)
    work = Workload(NATIVE, (NATIVE,), text_tokens=64)
    found: list[Plan] = []
    for plan in planner.plans(work):
        if not found or plan.peak < min(p.peak for p in found):
            found.append(plan)
    return found


def test_every_plan_gives_the_bits_of_resident_weights(
    tiny: Path, resident: KontextPipeline
) -> None:
    found = plans(tiny)
    places = [plan.placement for plan in found]
    assert any(p.text_streamed for p in places)
    assert any(p.modulation_streamed for p in places)
    assert any(p.vae_on_host for p in places)
    assert any(p.tile for p in places)
    assert places[-1].streamed_blocks
    wanted, latents = edit(resident), edit(resident, output_type="latent")
    firsts = {  # of every kind of placement
        (bool(p.placement.streamed_blocks), p.placement.tile, p.placement.text_streamed): p
        for p in reversed(found)
    }
    for plan in firsts.values():
        with within(tiny, plan.peak) as pipe:
            assert pipe.budget is not None
            assert pipe.budget.plan.placement == plan.placement
            pictures = edit(pipe)
            untiled = not pipe.budget.plan.placement.tile
            if untiled:
                np.testing.assert_array_equal(pictures, wanted)
                np.testing.assert_array_equal(edit(pipe, output_type="latent"), latents)
            else:  # tiles are blended: close, not the same
                assert 0 < np.abs(pictures - wanted).mean() < 0.1


def test_all_streamed_within_every_stage(tiny: Path, resident: KontextPipeline) -> None:
    """True CFG, two prompts and a batch, with everything that can be on the host there."""
    options = {"negative_prompt": "a dog", "true_cfg_scale": 3.0, "num_images_per_prompt": 2}
    with everything_streamed(tiny) as pipe:
        np.testing.assert_array_equal(edit(pipe, **options), edit(resident, **options))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "bf16"])
def test_quantised_and_narrow_weights_stream_as_they_are(tiny: Path, precision: str) -> None:
    plain = within(tiny, "1GiB", precision)
    assert plain.budget is not None
    assert plain.budget.plan.placement == Placement()
    total, _ = weights_at_rest(native(plain))
    # but for rounding up to whole aligned pieces
    assert total <= plain.budget.plan.stages[0].weights <= 1.002 * total
    options = {"num_inference_steps": 1}
    with plain, everything_streamed(tiny, precision) as pipe:
        np.testing.assert_array_equal(edit(pipe, **options), edit(plain, **options))
        _, away = weights_at_rest(native(pipe))
        assert pipe.budget is not None
        assert away == pytest.approx(sum(pipe.budget.plan.host.values()), rel=0.002)
        assert away > 0.85 * total


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_the_vae_beside_fp16_is_planned_as_it_loads(
    tiny: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU before Ampere: quantised layers beside fp16, and a VAE that wants fp32."""
    from fluxkontext.runtime.backends import native as backend
    from fluxkontext.runtime.backends import precision as chosen

    for module in (backend, chosen):
        monkeypatch.setattr(module, "plain", lambda _: "fp16")
    with within(tiny, "1GiB", precision) as pipe:
        assert native(pipe)._dtype == torch.float16
        assert native(pipe)._vae_dtype == torch.float32
        total, _ = weights_at_rest(native(pipe))
        assert pipe.budget is not None
        assert total <= pipe.budget.plan.stages[0].weights <= 1.002 * total


def everything_streamed(tiny: Path, precision: str = "fp32") -> KontextPipeline:
    """A pipeline whose weights are all on the host, and whose limit is no matter."""
    pipe = within(tiny, "1GiB", precision)
    stream_all(pipe, torch.device("cpu"))
    return pipe


def stream_all(pipe: KontextPipeline, device: torch.device) -> None:
    """Place all that can be on the host there."""
    backend = native(pipe)
    assert pipe.budget is not None
    blocks = len(pipe.budget.planner.blocks)
    budget = Budget(8 << 30, pipe.budget.planner, Workload(NATIVE))
    placement = Placement(blocks, 0, True, True, True)
    budget.plan = budget.planner.evaluate(placement, Workload(NATIVE))
    backend._placed = Placed(budget, device)
    for component, network in networks(backend).items():
        backend._placed.place(component, network)
    pipe.budget = budget


def networks(backend: NativeBackend) -> dict[str, nn.Module]:
    return {
        "text_encoder": backend._clip,
        "text_encoder_2": backend._t5,
        "vae": backend._vae,
        "transformer": backend._flux,
    }


def weights_at_rest(backend: NativeBackend) -> tuple[int, int]:
    """Bytes of all weights, and of those that live in the host's memory of streams."""
    every = [t for n in networks(backend).values() for t in (*n.parameters(), *n.buffers())]
    host = {u.host.untyped_storage()._cdata for s in backend._placed._streams for u in s.units}
    tables = (backend._t5.shared.weight, backend._clip.embeddings.token_embedding.weight)
    looked_up = {id(t) for t in tables} if backend._placed._host.get("lookup", 0) is None else set()
    sizes = [(t, t.numel() * t.element_size()) for t in every]
    away = sum(
        size for t, size in sizes if t.untyped_storage()._cdata in host or id(t) in looked_up
    )
    return sum(size for _, size in sizes), away


def test_the_budget_is_kept(tiny: Path) -> None:
    """Weights on the device, and all that lives beside them while an edit runs."""
    for plan in plans(tiny)[::4]:
        with within(tiny, plan.peak) as pipe:
            total, away = weights_at_rest(native(pipe))
            assert total == pytest.approx(
                plan.stages[0].weights + sum(plan.host.values()), rel=0.01
            )
            assert total - away <= plan.stages[0].weights
            with LiveBytes() as live:
                edit(pipe, output_type="pil")
            assert total - away + live.peak <= plan.peak
            # and what was predicted is not a lazy number either
            assert plan.peak <= 1.35 * (total - away + live.peak)


def test_no_staging_buffer_outlives_its_stage(tiny: Path) -> None:
    with everything_streamed(tiny) as pipe:
        placed = native(pipe)._placed
        assert len(placed._streams) == 6  # two text encoders, two halves, modulation, blocks
        seen = []

        def look(*_: object) -> None:
            seen.append([len(stream.buffers) for stream in placed._streams])

        edit(pipe, callback_on_step_end=look)
        assert all(sum(map(bool, stream)) == 1 for stream in seen)  # the blocks' alone
        assert not any(stream.buffers for stream in placed._streams)


def test_the_next_edit_works_after_one_that_failed(tiny: Path, resident: KontextPipeline) -> None:
    with everything_streamed(tiny) as pipe:
        backend = native(pipe)

        def fail(*_: object) -> None:
            raise RuntimeError("on purpose")

        for module in (backend._flux.double_blocks[1], backend._flux.single_blocks[0].linear2):
            hook = module.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                edit(pipe)
            hook.remove()
            np.testing.assert_array_equal(edit(pipe), edit(resident))


class Chain(nn.Module):
    """Units in turn, with all that a unit may hold: types, a scalar, a buffer, a nested module."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(Link(i) for i in range(3))

    def forward(self, x: torch.Tensor, order: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
        for i in order:
            x = self.double_blocks[i](x)
        return x


class Link(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.packed = nn.Parameter(torch.arange(5, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.0 + i))
        self.register_buffer("eighth", torch.ones(7).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + self.packed.sum() + self.eighth.float().sum()


@pytest.fixture
def chain() -> Iterator[tuple[Chain, Placed, torch.Tensor]]:
    torch.manual_seed(0)
    planner = Planner(ModelShapes(), "fp32", CPU, graphs=False)
    budget = Budget(1 << 40, planner, Workload(NATIVE))
    budget.plan = planner.evaluate(Placement(len(planner.blocks)), Workload(NATIVE))
    placed = Placed(budget, torch.device("cpu"))
    chain, x = Chain().requires_grad_(False), torch.randn(2, 3)
    wanted = chain(x)
    placed.place("transformer", chain)
    yield chain, placed, wanted
    placed.close()


def test_units_hold_any_tensor_and_come_in_any_order(
    chain: tuple[Chain, Placed, torch.Tensor],
) -> None:
    module, placed, wanted = chain
    torch.manual_seed(0)
    Chain()
    x = torch.randn(2, 3)
    with torch.inference_mode():
        assert torch.equal(module(x), wanted)
        assert torch.equal(module(x), wanted)  # an odd number of units: buffers change roles
        for order in ((2, 0, 1), (1,), (1, 1, 2), (0, 2)):
            alone = x
            for i in order:
                alone = module(alone, (i,))
            assert torch.equal(module(x, order), alone)
    names = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    assert names["double_blocks.0.packed"] == torch.uint8
    assert names["double_blocks.0.eighth"] == torch.float8_e4m3fn
    assert isinstance(module.double_blocks[0].scale, nn.Parameter)
    assert len(placed._streams) == 1


def test_closed_modules_are_let_go(tiny: Path) -> None:
    pipe = everything_streamed(tiny)
    block = weakref.ref(native(pipe)._flux.double_blocks[0])
    pipe.close()
    assert block() is None


# Refusals


def test_a_model_that_does_not_load_lets_its_limit_go(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's limit is the process's: what is loaded next would be refused its memory."""
    closed: list[Placed] = []
    close = Placed.close
    monkeypatch.setattr(Placed, "close", lambda placed: (closed.append(placed), close(placed)))
    with pytest.raises(BackendUnavailableError, match="kernels: "):
        KontextPipeline.from_pretrained(
            tiny, device="cpu", vram_budget="8GiB", kernels={"attend": "none"}
        )
    assert len(closed) == 1


def test_what_cannot_fit_is_refused_before_any_work(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with within(tiny, plans(tiny)[-1].peak) as pipe:
        for stage in ("encode_text", "encode_image", "begin"):
            monkeypatch.setattr(pipe.backend, stage, None)
        with pytest.raises(OutOfMemoryError, match=r"use .*one image at once") as caught:
            edit(pipe, num_images_per_prompt=64)
        assert caught.value.exit_code == 5
        monkeypatch.undo()
        edit(pipe)
    with pytest.raises(OutOfMemoryError, match="vram_budget: expected an edit of 128x128"):
        within(tiny, "1MB")


def test_only_the_native_backend_keeps_a_budget(small_bundle: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="vram_budget: expected the native backend"):
        KontextPipeline.from_pretrained(small_bundle, backend="onnx", vram_budget="1GiB")


def test_the_command_line_takes_a_budget(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "-p", "a cat", "--model", str(tiny), "--size", "128x128", "--steps", "1"]
    for budget, code in ((f"{plans(tiny)[-1].peak}", 0), ("1MB", 5), ("a lot", 2)):
        out = tmp_path / f"{code}.png"
        assert main([*common, "-o", str(out), "--vram-budget", budget, "--device", "cpu"]) == code
        assert out.exists() == (code == 0)
    assert "use " in capsys.readouterr().err


# On a GPU: pinned memory, a stream of copies, and the allocator's own limit


def on_gpu(tiny: Path, limit: int | str | None = None) -> KontextPipeline:
    return KontextPipeline.from_pretrained(
        tiny, device="cuda", precision="bf16", memo_entries=0, vram_budget=limit
    )


@pytest.mark.gpu
def test_streams_of_copies_give_the_bits_of_resident_weights(tiny: Path) -> None:
    with on_gpu(tiny) as resident:
        wanted = edit(resident, num_inference_steps=8)
    with on_gpu(tiny, "8GiB") as pipe:
        stream_all(pipe, torch.device("cuda"))
        units = [unit for stream in native(pipe)._placed._streams for unit in stream.units]
        assert all(unit.host.is_pinned() for unit in units)
        for _ in range(3):
            np.testing.assert_array_equal(edit(pipe, num_inference_steps=8), wanted)
        assert native(pipe).captures == 0


@pytest.mark.gpu
def test_the_allocator_refuses_what_is_beyond_the_budget(tiny: Path) -> None:
    with on_gpu(tiny, "2GiB") as pipe:
        edit(pipe)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        edit(pipe)
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")  # the limit went with the pipeline
    with pytest.raises(BackendUnavailableError, match="kernels: "):
        KontextPipeline.from_pretrained(
            tiny, device="cuda", vram_budget="2GiB", kernels={"attend": "none"}
        )
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")  # and with one that never was


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_within_the_plan(tiny: Path) -> None:
    with on_gpu(tiny, "2GiB") as pipe:
        torch.cuda.reset_peak_memory_stats()
        edit(pipe)
        assert pipe.budget is not None
        plan, fixed = pipe.budget.plan, pipe.budget.planner.overhead.fixed
        assert torch.cuda.max_memory_reserved() <= plan.budget - fixed
        assert torch.cuda.max_memory_allocated() <= plan.peak - fixed
