"""Joint attention over text, target and context tokens: no mask, not causal."""

from torch import Tensor
from torch.nn import functional as F


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; ``q [B, Sq, H, d]`` and ``k, v [B, Sk, H, d]`` give ``[B, Sq, H * d]``."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
