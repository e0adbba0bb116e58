"""The fused operations of the model: torch references and, beside them, their Triton kernels."""

from .attend import Stream
from .kernel_set import Before, KernelSet, reference
from .proof import proven

__all__ = ["Before", "KernelSet", "Stream", "proven", "reference"]
