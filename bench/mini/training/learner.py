"""What turns gradients into weights: float32 masters, Muon and AdamW, and a running average.

The module itself computes in its own dtype (bf16, as it will be shipped and run); after every step
its weights are the masters, rounded. Under FSDP2 all of these are shards, and nothing changes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .muon import Muon, local

_NOT_MUON = (
    "embedding",
    "shared",
    "attention_bias",
    "img_in",
    "final_layer.linear",
    "conv_in",
    "reader",
)
"""Tables, and the first and last layers: their inputs or outputs are no mixtures of features."""
_CLIP = 1.0
_MOMENTS = (0.9, 0.95)


class Learner:
    """Optimises the parameters of one module."""

    def __init__(self, module: nn.Module, average: float = 0.999, weight_decay: float = 0.01):
        """average: how much of the running average stays at each step, once there are many."""
        self.params = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.masters = {k: p.detach().float().clone() for k, p in self.params.items()}
        self.average = {k: m.clone() for k, m in self.masters.items()}
        self.average_decay = average
        self.steps = 0
        named = self.masters.items()
        matrices = [m for k, m in named if m.ndim > 1 and not any(part in k for part in _NOT_MUON)]
        chosen = set(map(id, matrices))
        rest = [m for m in self.masters.values() if id(m) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=0.0, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=0.0, betas=_MOMENTS, weight_decay=0.0),
        ]

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Update from the gradients of the module's parameters, and clear them.

        Returns the norm of all gradients before clipping.
        """
        for name, param in self.params.items():
            master = self.masters[name]
            master.grad = torch.zeros_like(master) if param.grad is None else param.grad.float()
            param.grad = None
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), _CLIP)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        self.steps += 1
        decay = min(self.average_decay, (1 + self.steps) / (10 + self.steps))
        masters = local(self.masters.values())
        torch._foreach_lerp_(local(self.average.values()), masters, 1 - decay)
        torch._foreach_copy_(local(self.params.values()), masters)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, whole, float32; a collective under FSDP2."""
        return {name: _whole(value) for name, value in self.average.items()}

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights under the same names; strict."""
        if weights.keys() != self.params.keys():
            odd = sorted(weights.keys() ^ self.params.keys())
            raise ValueError(f"weights: expected the same names, found a difference in {odd[:3]}")
        for name, value in weights.items():
            for kept in (self.masters[name], self.average[name], self.params[name]):
                kept.copy_(_shard(value.to(kept.device, kept.dtype), kept))

    def state(self) -> dict[str, Any]:
        """All that a stopped run needs to go on, whole, on the CPU; a collective under FSDP2."""
        return {
            "steps": self.steps,
            "masters": {k: _whole(v).cpu() for k, v in self.masters.items()},
            "average": {k: _whole(v).cpu() for k, v in self.average.items()},
            "optimisers": [_moments(optimiser) for optimiser in self.optimisers],
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.start_from(state["masters"])
        self.steps = state["steps"]
        for name, value in state["average"].items():
            kept = self.average[name]
            kept.copy_(_shard(value.to(kept.device), kept))
        for optimiser, moments in zip(self.optimisers, state["optimisers"], strict=True):
            params = [p for group in optimiser.param_groups for p in group["params"]]
            for param, values in zip(params, moments, strict=True):
                optimiser.state[param] = {
                    name: _shard(value.to(param.device), param) if value.ndim else value.clone()
                    for name, value in values.items()
                }


def _moments(optimiser: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of every parameter in order; Muon and AdamW keep tensors only."""
    params = [p for group in optimiser.param_groups for p in group["params"]]
    return [{k: _whole(v).cpu() for k, v in optimiser.state[p].items()} for p in params]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """The whole value as ``like`` is laid out over processes."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
