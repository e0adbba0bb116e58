"""Fused projections as separate ones: a graph's weight is then one range of rows of one file."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..runtime.models.transformer import FusedLinear


class SplitLinear(nn.ModuleList):
    """Stands in for a :class:`FusedLinear`; its parts are named 0, 1, ... in row order."""

    def __init__(self, fused: FusedLinear) -> None:
        device = fused.weight.device
        super().__init__(
            nn.Linear(fused.in_features, width, device=device) for width in fused.widths
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.part(x, 0, len(self))

    def part(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Only the projections ``start`` to ``stop``."""
        parts: Sequence[nn.Module] = list(self)[start:stop]
        return tuple(part(x) for part in parts)


def split_projections(module: nn.Module) -> nn.Module:
    """Replace every fused projection in ``module``, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedLinear):
                setattr(parent, name, SplitLinear(child))
    return module
