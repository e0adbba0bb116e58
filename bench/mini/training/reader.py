"""What a picture holds, read from the middle of the transformer while it is being trained.

The flow's loss says how far a velocity is off; which thing an instruction means reaches the blocks
only through that. Here they are told outright: a linear map of the tokens half-way through has to
name what lies in each token's cell of the finished picture. It is the idea of REPA
(arXiv:2410.06940), with the scene itself in place of another network's features. What reads is
left behind when the model ships.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backdrops import BACKGROUNDS, CANVAS
from ..scenes import COLOURS, MARGIN, SHAPES, SIZES, TILE

CLASSES = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES), len(BACKGROUNDS))
"""Of a token: shape, colour and size, 0 where the cell is empty, and background."""


class Reader(nn.Module):
    """Logits of all CLASSES from tokens ``[B, T, D]``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, sum(CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.layer_norm(tokens, tokens.shape[-1:]))
        return logits


def contents(things: Tensor, backgrounds: Tensor, side: int) -> Tensor:
    """The class indices ``[n, side * side, 4]`` of every token of scenes as ``encode`` has them.

    things: ``[n, 9, 3]``. backgrounds: ``[n]``. A token belongs to the cell of its centre.
    """
    centres = (torch.arange(side, device=things.device) + 0.5) * (CANVAS / side)
    cells = ((centres - MARGIN) / TILE).long().clamp(0, 2)
    cells = (3 * cells[:, None] + cells).flatten()
    sprite = things[:, cells, 0].long()  # [n, tokens]; see scenes.sprite_index
    index = sprite - 1
    size, pair = index % len(SIZES), index // len(SIZES)
    parts = (pair // len(COLOURS), pair % len(COLOURS), size)
    named = [torch.where(sprite > 0, 1 + part, 0) for part in parts]
    return torch.stack((*named, backgrounds.long()[:, None].expand_as(sprite)), dim=-1)


def read_right(logits: Tensor, wanted: Tensor) -> Tensor:
    """Whether the likeliest classes of logits ``[..., sum(CLASSES)]`` are ``[..., 4]``."""
    found = [part.argmax(-1) for part in logits.split(CLASSES, dim=-1)]
    return (torch.stack(found, dim=-1) == wanted).all(-1)


def misread(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy ``[...]`` float32 of logits ``[..., sum(CLASSES)]`` for class indices
    ``[..., 4]``, the mean of the four."""
    parts = logits.float().split(CLASSES, dim=-1)
    losses = [
        F.cross_entropy(part.flatten(0, -2), right.flatten(), reduction="none")
        for part, right in zip(parts, wanted.unbind(-1), strict=True)
    ]
    return torch.stack(losses).mean(0).view(wanted.shape[:-1])
