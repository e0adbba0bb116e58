"""Attention by the kernels of cuDNN and FlashAttention-3, where these are installed.

Published rates in 16 bits on an H100 at 8k tokens: FlashAttention-3 646 TFLOP/s, cuDNN 600, Triton
392, FlashAttention-2 370 (flash-attention, ``assets``). So the fastest that runs comes first.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import attention_ref

FA3_HEAD_DIM = 128
"""Of the kernels in the wheel ``fa3-fwd`` 0.0.3, which are for sm_90a alone."""


def has_fa3() -> bool:
    """Whether ``fa3-fwd`` is installed."""
    return find_spec("fa3_fwd_interface") is not None


def attention_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`attention_ref` by cuDNN; which kernel torch would take depends on its version."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention_ref(q, k, v)


@torch.library.custom_op("fluxkontext::attention_fa3", mutates_args=())
def _attention_fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out.flatten(2)


@_attention_fa3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(*q.shape[:2], q.shape[2] * q.shape[3], dtype=q.dtype, device=q.device)


def attention_fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`attention_ref` by FlashAttention-3 (arXiv 2407.08608)."""
    out: Tensor = _attention_fa3(q, k, v)
    return out
