"""Every op of a step at the miniature's sizes, on a CPU: all that can run it there."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.candidates import CANDIDATES, Situation
from ..kernels.norm_rope import rope_table
from .kernel_timed import Timed, size
from .mini.training.spec import MINI

TOKENS = 160
"""A target and a context of 128² pixels, and the text: 64 + 64 + 32."""


def problems() -> Iterator[Timed]:
    """In fp32, on random numbers; the last implementation of each is the reference."""
    config = MINI.transformer
    heads, dim = config.num_heads, config.head_dim
    situation = Situation(torch.device("cpu"), torch.float32, dim)
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    x, y = (randn(1, TOKENS, config.hidden_size) for _ in range(2))
    shift, scale, gate = (randn(1, 1, config.hidden_size) for _ in range(3))
    q, k, v = randn(1, TOKENS, 3, heads, dim).unbind(2)
    rope = rope_table(torch.arange(TOKENS)[:, None], (dim,), 1e4)
    up = randn(1, TOKENS, config.mlp_hidden)
    width, side = MINI.vae.block_out_channels[0], MINI.vae.sample_size
    picture, affine = randn(1, width, side, side), randn(width)
    arguments: dict[str, tuple[Any, ...]] = {
        "modulate": (x, shift, scale),
        "residual_modulate": (x, gate, y, shift, scale),
        "norm_rope": (q, 1 + 0.2 * randn(dim), rope),
        "attention": (q, k, v),
        "gate_residual": (x, gate, y),
        "gelu": (up,),
        "gelu_beside": (x, up),
        "group_norm_silu": (picture, MINI.vae.norm_num_groups, affine, affine, 1e-6),
    }
    for op, given in arguments.items():
        runs: dict[str, Callable[[], object]] = {
            candidate.name: partial(candidate.run, *given)
            for candidate in CANDIDATES[op]
            if candidate.supports(situation) is None
        }
        made = runs["torch"]()
        out = (made,) if isinstance(made, Tensor) else tuple(made)  # type: ignore[arg-type]
        flops = 4 * TOKENS**2 * config.hidden_size if op == "attention" else 0
        taken = [argument for argument in given if isinstance(argument, Tensor)]
        yield Timed(op, size(*taken, *out), flops, "fp32", runs)
