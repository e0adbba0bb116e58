"""The fused operations of the model: torch references and, beside them, their Triton kernels."""

from .kernel_set import KernelSet, reference, select

__all__ = ["KernelSet", "reference", "select"]
