"""Gated residual: ``x + gate * y`` (adaLN-Zero, DiT)."""

import torch
from torch import Tensor


def gate_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Add ``y [B, S, D]`` to ``x [B, S, D]`` through ``gate [B, 1, D]``."""
    return torch.addcmul(x, gate, y)
