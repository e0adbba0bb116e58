"""QK-RMSNorm, then rotary position embedding from integer ``(frame, h, w)`` positions."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
"""RMSNorm epsilon of FLUX's query and key norms (BFL ``layers.py``)."""


def rope_table(positions: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Cosine and sine of every rotation angle.

    positions: ``[S, len(axes_dim)]`` integers, one column an axis (FLUX: frame, h, w).
    axes_dim: channels of a head that each axis rotates (FLUX: 16, 56, 56); even, in sum head_dim.
    Returns ``[S, head_dim / 2, 2]`` float32 as (cos, sin). Angles are taken in float64, as in
    diffusers, so that they stay exact far from the origin.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(torch.outer(positions[:, axis].double(), theta**-exponent))
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def norm_rope_ref(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    """RMS-normalise ``x [B, S, H, head_dim]``, times ``scale [head_dim]``, and rotate its pairs.

    rope: ``[S, head_dim / 2, 2]`` float32 of :func:`rope_table`. The rotation is done in float32.
    """
    normed = F.rms_norm(x, scale.shape, scale, EPS)
    even, odd = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
