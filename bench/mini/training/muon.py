"""Muon: momentum whose update is made orthogonal, for every matrix of a network at once.

After Keller Jordan (https://kellerjordan.github.io/posts/muon/), with the step size of Moonshot's
report (arXiv:2502.16982), under which one learning rate serves Muon and AdamW. ``torch.optim.Muon``
does the same matrix by matrix, some thousand small kernels a step for this model; here a fused
matrix (qkv, the rows of a modulation) is cut into its square parts and all parts of one shape go
through the iteration together.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2  # of an update's elements, about that of AdamW's
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions or more; a convolution counts as ``[out, in * kernel]``."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; Nesterov's momentum, decoupled weight decay."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            grads = local(p.grad for p in params)
            buffers = local(self.state[p]["momentum_buffer"] for p in params)
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
            whole = [_whole(u, p) for u, p in zip(ahead, params, strict=True)]
            updates = [_share(u, p) for u, p in zip(_orthogonal(whole), params, strict=True)]
            values = local(params)
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(values, updates, alpha=-group["lr"])


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The shares of this process, where FSDP2 has spread tensors over several; views."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """All processes' shares of a matrix together: it is orthogonal only as a whole."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of an update that every process has computed whole."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


def _orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix as square parts with all singular values about equal, and elements of RMS 0.2."""
    parts = [_cut(matrix.flatten(1)) for matrix in matrices]
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        alike[part.shape[1:]].append(i)
    results = list(matrices)
    for shape, indices in alike.items():
        stack = newton_schulz(torch.cat([parts[i] for i in indices]))
        stack = stack * (_RMS * max(shape) ** 0.5)
        for i, part in zip(indices, stack.split([len(parts[i]) for i in indices]), strict=True):
            matrix = matrices[i]
            results[i] = _join(part, matrix.flatten(1).shape).reshape(matrix.shape).to(matrix.dtype)
    return results


def _cut(matrix: Tensor) -> Tensor:
    """``[m, n]`` as squares ``[parts, s, s]`` where one side is a multiple of the other."""
    m, n = matrix.shape
    if m % n == 0:
        return matrix.reshape(-1, n, n)
    if n % m == 0:
        return matrix.reshape(m, -1, m).transpose(0, 1)
    return matrix[None]


def _join(parts: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_cut`."""
    m, n = shape
    return parts.transpose(0, 1).reshape(m, n) if m % n and n % m == 0 else parts.reshape(m, n)


def newton_schulz(stack: Tensor) -> Tensor:
    """Move all singular values of every matrix of ``[n, a, b]`` to between about 0.7 and 1.2."""
    a, b, c = _QUINTIC
    wide = stack.shape[1] <= stack.shape[2]
    x = stack if wide else stack.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + _EPS)).bfloat16()
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
