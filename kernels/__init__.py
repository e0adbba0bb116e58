"""The fused operations of the model: torch references and, beside them, their Triton kernels."""

from .candidates import select
from .kernel_set import Before, KernelSet, reference
from .proof import proven

__all__ = ["Before", "KernelSet", "proven", "reference", "select"]
