"""The denoising loop: right, in its buffers, without traffic to the host, one edit at a time."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluxkontext.kernels import proven
from fluxkontext.runtime import KontextError
from fluxkontext.runtime.config import TransformerConfig
from fluxkontext.runtime.executor import Branch, Bucket, Edit, Executor, Run
from fluxkontext.runtime.loading import build
from fluxkontext.runtime.models.transformer import Flux

from .live_bytes import LiveBytes

STEPS = 4
CONFIG = TransformerConfig(
    hidden_size=128, num_heads=2, depth=1, depth_single_blocks=2, mlp_hidden=256,
    context_in_dim=32, vec_in_dim=16, axes_dim=(16, 24, 24),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_flux(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Flux:
    draw = torch.Generator().manual_seed(0)
    at = torch.device(device)
    ops = proven(at, dtype, CONFIG.head_dim, CONFIG.hidden_size)
    flux = build(lambda: Flux(CONFIG, ops))
    state = {
        name: (torch.randn(t.shape, generator=draw) / t.shape[-1] ** 0.5).to(at, dtype)
        for name, t in flux.state_dict().items()
    }
    flux.load_state_dict(state, assign=True)
    return flux


@pytest.fixture(scope="module")
def flux() -> Flux:
    return make_flux()


def make_edit(
    flux: Flux,
    target: int = 12,
    context: int = 8,
    text: tuple[int, ...] = (5,),
    batch: int = 1,
    steps: int = STEPS,
    seed: int = 0,
) -> Edit:
    """Random latents and conditions, on the model's device."""
    draw = torch.Generator().manual_seed(seed)
    at = flux.img_in.weight

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(at)

    positions = torch.randint(0, 20, (target + context, 3), generator=draw).to(at.device)
    sigmas = torch.linspace(1, 0, steps + 1, device=at.device)
    guidance = torch.tensor([2.5], device=at.device)
    branches = [
        Branch(
            flux.txt_in(randn(batch, tokens, CONFIG.context_in_dim)),
            flux.modulation(sigmas[:-1], guidance, randn(batch, CONFIG.vec_in_dim)),
            flux.rope(positions, tokens),
        )
        for tokens in text
    ]
    contexts = flux.img_in(randn(batch, context, CONFIG.in_channels))
    latents = randn(batch, target, CONFIG.in_channels).float()
    return Edit(latents, contexts, branches, sigmas.diff(), 3.0)


def by_hand(flux: Flux, edit: Edit, steps: int) -> Tensor:
    """The same steps, spelled out."""
    latents = edit.latents.clone()
    for i in range(steps):
        first, *second = (
            flux(latents.to(b.text.dtype), edit.context, b.text, b.modulation[i], b.rope).float()
            for b in edit.branches
        )
        velocity = second[0] + edit.true_cfg_scale * (first - second[0]) if second else first
        latents = latents + velocity * edit.dts[i]
    return latents


def finish(executor: Executor, edit: Edit, record: bool = True) -> Tensor:
    run = executor.begin(edit, record)
    for i in range(len(edit.dts)):
        executor.step(run, i)
    return executor.latents(run).clone()


def make_executor(flux: Flux, max_graphs: int = 8) -> Executor:
    at = flux.img_in.weight
    return Executor(flux, at.device, at.dtype, max_graphs)


SIZES: list[dict[str, Any]] = [
    {},
    {"context": 0},
    {"text": (5, 5)},
    {"text": (5, 3), "batch": 2},
    {"batch": 3},
    {"steps": 33},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_loop_by_hand(flux: Flux, size: dict[str, Any]) -> None:
    edit = make_edit(flux, **size)
    found = finish(make_executor(flux), edit)
    torch.testing.assert_close(found, by_hand(flux, edit, len(edit.dts)), rtol=1e-5, atol=1e-5)


def test_one_size_after_another_in_the_same_memory(flux: Flux) -> None:
    """What a larger or an earlier edit left in the buffers is never seen."""
    alone = [finish(make_executor(flux), make_edit(flux, **size)) for size in SIZES]
    executor = make_executor(flux)
    for _ in range(2):
        for size, wanted in zip(SIZES, alone, strict=True):
            assert torch.equal(finish(executor, make_edit(flux, **size)), wanted)


def test_buffers_are_as_large_as_the_largest(flux: Flux) -> None:
    executor = make_executor(flux)

    def place(**size: Any) -> int:
        return executor.latents(executor.begin(make_edit(flux, **size))).data_ptr()

    large = place(target=20)
    assert place(target=12) == place(target=20) == place(target=4, text=(3,)) == large
    run = executor.begin(make_edit(flux, target=24))
    assert executor.latents(run).shape == (1, 24, CONFIG.in_channels)


def test_steps_can_be_taken_in_any_order(flux: Flux) -> None:
    edit = make_edit(flux)
    executor = make_executor(flux)
    run = executor.begin(edit)
    for i in (2, 3, 0, 1):
        executor.step(run, i)
    order = torch.tensor([2, 3, 0, 1])
    branches = [replace(b, modulation=b.modulation[order]) for b in edit.branches]
    shuffled = replace(edit, branches=branches, dts=edit.dts[order])
    assert torch.equal(executor.latents(run), finish(make_executor(flux), shuffled))


def test_latents_can_be_replaced_between_steps(flux: Flux) -> None:
    edit, other = make_edit(flux), make_edit(flux, seed=1).latents
    executor = make_executor(flux)

    def rest(run: Run) -> Tensor:
        for i in range(1, STEPS):
            executor.step(run, i)
        return executor.latents(run).clone()

    wanted = rest(executor.begin(replace(edit, latents=other)))
    run = executor.begin(edit)
    executor.step(run, 0)
    executor.latents(run).copy_(other)
    assert torch.equal(rest(run), wanted)
    assert not torch.equal(finish(executor, edit), wanted)


def test_an_older_edit_is_refused(flux: Flux) -> None:
    """Two edits at once would share buffers; the newer one is not disturbed."""
    edit = make_edit(flux, seed=1)
    executor = make_executor(flux)
    older = executor.begin(make_edit(flux))
    executor.step(older, 0)
    newer = executor.begin(edit)
    uses: list[Callable[[], Any]] = [
        lambda: executor.step(older, 1),
        lambda: executor.latents(older),
    ]
    for i in range(STEPS):
        executor.step(newer, i)
        for use in uses:
            with pytest.raises(KontextError, match="found an older one"):
                use()
    assert torch.equal(executor.latents(newer), finish(make_executor(flux), edit))


def test_a_failed_step_leaves_a_working_executor(flux: Flux) -> None:
    executor = make_executor(flux)
    edit = make_edit(flux)
    wanted = finish(executor, edit)
    run = executor.begin(edit)
    with pytest.raises(IndexError):
        executor.step(run, 32)  # beyond the buffers
    assert torch.equal(finish(executor, edit), wanted)


def test_release_frees_the_buffers(flux: Flux) -> None:
    executor = make_executor(flux)
    with LiveBytes() as live:
        run = executor.begin(make_edit(flux))
        gc.collect()
        assert live.now > 10_000
        executor.release()
        with pytest.raises(KontextError):
            executor.latents(run)
        del run
        gc.collect()
        assert live.now == 0


class _Ops(TorchDispatchMode):
    """Counts operators, and those of their tensors that lie elsewhere than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


HOST = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_pin_memory"}


@pytest.mark.parametrize("size", [{}, {"text": (5, 5)}], ids=str)
def test_a_step_asks_the_host_nothing_and_keeps_nothing(flux: Flux, size: dict[str, Any]) -> None:
    executor = make_executor(flux)
    run = executor.begin(make_edit(flux, **size))
    executor.step(run, 0)
    gc.collect()
    with LiveBytes() as live:
        for i in range(1, STEPS):
            executor.step(run, i)
            assert live.now == 0
    assert live.peak > 0
    with _Ops() as ops:
        executor.step(run, 1)
    assert not HOST & ops.names.keys()
    assert "index_select" in ops.names  # or what is not seen could not be missed
    with _Ops() as ops:
        run.recording.buffers.step.item()
    assert HOST & ops.names.keys()


def test_a_step_is_the_same_work_every_time(flux: Flux) -> None:
    executor = make_executor(flux)
    run = executor.begin(make_edit(flux))
    found = []
    for i in range(STEPS):
        with _Ops() as ops:
            executor.step(run, i)
        found.append(ops.names)
    assert found == [found[0]] * STEPS


class Replayer:
    """In place of the CUDA recorder: capturing runs nothing, replaying runs what was captured."""

    def __init__(self, fails: int = 0) -> None:
        self.fails = fails
        self.alive = 0

    def capture(self, work: Callable[[], None]) -> "Replayer._Graph":
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.alive += 1
        return Replayer._Graph(self, work)

    class _Graph:
        def __init__(self, owner: "Replayer", work: Callable[[], None]) -> None:
            self.owner, self.replay = owner, work

        def reset(self) -> None:
            self.owner.alive -= 1
            del self.replay


def recording(flux: Flux, max_graphs: int = 8, fails: int = 0) -> tuple[Executor, Replayer]:
    executor = make_executor(flux, max_graphs)
    replayer = Replayer(fails)
    executor._recorder = replayer  # type: ignore[assignment]
    return executor, replayer


def test_a_size_is_captured_once(flux: Flux) -> None:
    executor, _ = recording(flux)
    wanted = [finish(make_executor(flux), make_edit(flux, seed=seed)) for seed in range(3)]
    assert torch.equal(finish(executor, make_edit(flux)), wanted[0])
    assert (executor.captures, executor.replays) == (1, STEPS - 1)
    for seed in (1, 2):
        assert torch.equal(finish(executor, make_edit(flux, seed=seed)), wanted[seed])
    assert (executor.captures, executor.replays) == (1, 3 * STEPS - 1)
    finish(executor, make_edit(flux, steps=3))  # a number of steps is no size of its own
    assert executor.captures == 1
    finish(executor, make_edit(flux, target=13))
    assert executor.captures == 2
    finish(executor, make_edit(flux, target=14), record=False)
    assert executor.captures == 2


def test_a_graph_works_on_after_the_memory_grew(flux: Flux) -> None:
    executor, _ = recording(flux)
    small, large = make_edit(flux), make_edit(flux, target=40, context=30, text=(9,))
    wanted = finish(make_executor(flux), small), finish(make_executor(flux), large)
    for edit, result in zip((small, large) * 2, wanted * 2, strict=True):
        assert torch.equal(finish(executor, edit), result)
    assert executor.captures == 2


def test_the_graph_used_longest_ago_goes_first(flux: Flux) -> None:
    executor, replayer = recording(flux, max_graphs=2)
    a, b, c = (make_edit(flux, target=target) for target in (8, 9, 10))
    for edit in (a, b, a, c):  # which drops b
        finish(executor, edit)
    assert (executor.captures, replayer.alive) == (3, 2)
    finish(executor, a)
    assert executor.captures == 3
    finish(executor, b)
    assert (executor.captures, replayer.alive) == (4, 2)
    executor.release()
    assert replayer.alive == 0


def test_no_memory_for_a_graph(flux: Flux, caplog: pytest.LogCaptureFixture) -> None:
    """All graphs are freed, the edit goes on without, and the next one tries again."""
    executor, replayer = recording(flux)
    finish(executor, make_edit(flux, target=9))
    assert replayer.alive == 1
    replayer.fails = 1
    edit = make_edit(flux)
    wanted = finish(make_executor(flux), edit)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(finish(executor, edit), wanted)
    assert (replayer.alive, executor.captures, len(caplog.records)) == (0, 1, 1)
    assert torch.equal(finish(executor, edit), wanted)
    assert (replayer.alive, executor.captures) == (1, 2)


def test_what_else_fails_in_a_capture_is_not_hidden(flux: Flux) -> None:
    executor, replayer = recording(flux)

    def capture(work: Callable[[], None]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    replayer.capture = capture  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not permitted"):
        finish(executor, make_edit(flux))


def test_steps_of_one_bucket(flux: Flux) -> None:
    assert Bucket.of(make_edit(flux, steps=1)) == Bucket.of(make_edit(flux, steps=32))
    assert Bucket.of(make_edit(flux, steps=32)) != Bucket.of(make_edit(flux, steps=33))
    assert Bucket.of(make_edit(flux, text=(5, 5))) != Bucket.of(make_edit(flux))


@pytest.fixture(scope="module")
def gpu_flux() -> Flux:
    return make_flux("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_replayed_equals_eager_on_a_gpu(gpu_flux: Flux, size: dict[str, Any]) -> None:
    """Bit for bit, without a synchronisation, and with one capture."""
    edits = [make_edit(gpu_flux, seed=seed, **size) for seed in (1, 2)]
    eager = make_executor(gpu_flux, max_graphs=0)
    wanted = [finish(eager, edit) for edit in edits]
    executor = make_executor(gpu_flux)
    finish(executor, edits[0])
    runs: list[Run] = []
    for edit, result in zip(edits, wanted, strict=True):
        runs.append(executor.begin(edit))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(len(edit.dts)):
                executor.step(runs[-1], i)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(executor.latents(runs[-1]), result)
    assert executor.captures == 1
    assert executor.replays == 3 * len(edits[0].dts) - 1
    assert eager.captures == 0


@pytest.mark.gpu
def test_graphs_share_memory_and_give_it_back_on_a_gpu(gpu_flux: Flux) -> None:
    tokens, workspaces = 32768, 64 * 2**20
    finish(make_executor(gpu_flux, max_graphs=0), make_edit(gpu_flux, target=tokens))

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    executor = make_executor(gpu_flux, max_graphs=2)
    found = []
    for fewer in range(4):
        finish(executor, make_edit(gpu_flux, target=tokens - 100 * fewer))
        found.append(reserved() - before)
    assert executor.captures == 4
    assert max(found) < 1.5 * found[0] + workspaces
    executor.release()
    assert reserved() - before < workspaces


@pytest.mark.gpu
def test_a_step_allocates_nothing_on_a_gpu(gpu_flux: Flux) -> None:
    executor = make_executor(gpu_flux)
    edit = make_edit(gpu_flux)
    finish(executor, edit)
    run = executor.begin(edit)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for i in range(STEPS):
        executor.step(run, i)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
