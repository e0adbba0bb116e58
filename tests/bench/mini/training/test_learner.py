"""The learner: masters and averages, the same with and without FSDP2, and after a restart."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fluxkontext.bench.mini.training.learner import Learner


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone: what is sharded is sharded into one shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).to(dtype)


def teach(module: nn.Module, learner: Learner, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        module(x.to(next(module.parameters()).dtype)).float().square().mean().backward()
        learner.step(0.01)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])


def test_sharded_is_the_same(one_process: None) -> None:
    plain, sharded = network(), fully_shard(network())
    learners = Learner(plain), Learner(sharded)
    assert all(isinstance(m, DTensor) for m in learners[1].masters.values())
    for module, learner in zip((plain, sharded), learners, strict=True):
        teach(module, learner, range(3))
    equal(learners[0].averages(), learners[1].averages())

    again = fully_shard(network())
    learner = Learner(again)
    learner.resume(learners[0].state())  # whole states fit any number of processes
    teach(again, learner, range(3, 5))
    teach(plain, learners[0], range(3, 5))
    equal(learner.averages(), learners[0].averages())


def test_weights_are_the_masters_rounded() -> None:
    module = network(torch.bfloat16)
    learner = Learner(module)
    before = {name: value.clone() for name, value in learner.masters.items()}
    for step in range(20):
        teach(module, learner, range(step, step + 1))
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, learner.masters[name].bfloat16())
            assert parameter.grad is None
    moved = [(learner.masters[name] - value).abs().max() for name, value in before.items()]
    assert min(moved) > 0


def test_the_average_lags_behind() -> None:
    module = network()
    learner = Learner(module, average=0.9)
    start = {name: value.clone() for name, value in learner.masters.items()}
    teach(module, learner, range(30))
    for name, average in learner.averages().items():
        whole = (learner.masters[name] - start[name]).norm()
        assert 0.5 * whole < (average - start[name]).norm() < whole


def test_other_weights_are_refused() -> None:
    learner = Learner(network())
    with pytest.raises(ValueError, match="same names"):
        learner.start_from({"0.weight": torch.zeros(12, 6)})
