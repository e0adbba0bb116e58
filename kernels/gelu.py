"""GELU in its tanh form, the activation of FLUX's feed-forwards."""

from torch import Tensor
from torch.nn import functional as F


def gelu_ref(x: Tensor) -> Tensor:
    """Tanh-approximated GELU, elementwise."""
    return F.gelu(x, approximate="tanh")
