"""Modulated LayerNorm: ``LN(x) * (1 + scale) + shift`` without affine parameters (adaLN, DiT)."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
"""LayerNorm epsilon of FLUX (BFL ``layers.py``, diffusers ``AdaLayerNormZero``)."""


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the last axis of ``x [B, S, D]``, then scale and shift it by ``[B, 1, D]``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)
