"""The fused operations of the model: torch references and, beside them, their Triton kernels."""

from .kernel_set import KernelSet, reference, select
from .proof import proven

__all__ = ["KernelSet", "proven", "reference", "select"]
