"""Inputs and outputs of the six graphs: the one source of names, types, axes and their ranges."""

from collections.abc import Mapping
from dataclasses import dataclass

from .geometry import Grid, Size

Axis = str | int
Triple = tuple[int, int, int]
"""Least, usual and greatest extent of an axis: an engine runs between the ends."""
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input of a graph -> its least, usual and greatest shape."""
CLIP_TOKENS = 77
"""Of the published text encoder; a bundle's own tokenizer says what its is."""
STEPS = (1, 28, 100)
"""Steps of one edit for which modulation is computed at once; 28 is the published default."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at a graph's boundary; an axis is a number, or the name of what varies."""

    dtype: str
    shape: tuple[Axis, ...]

    def sized(self, sizes: Mapping[str, int]) -> "TensorSpec":
        """The same with the axes that a model fixes as numbers."""
        return TensorSpec(
            self.dtype, tuple(sizes.get(a, a) if isinstance(a, str) else a for a in self.shape)
        )


def _floats(*shape: Axis) -> TensorSpec:
    return TensorSpec("float32", shape)


Tensors = Mapping[str, TensorSpec]

GRAPHS: Mapping[str, tuple[Tensors, Tensors]] = {
    "clip": (
        {"ids": TensorSpec("int64", ("batch", "clip_tokens"))},
        {"pooled": _floats("batch", "vec_in_dim")},
    ),
    "t5": (
        {"ids": TensorSpec("int64", ("batch", "text_tokens"))},
        {"text": _floats("batch", "text_tokens", "context_in_dim")},
    ),
    "vae_encoder": (
        {"pixels": TensorSpec("uint8", ("batch", "height", "width", 3))},
        {"context": _floats("batch", "context_tokens", "features")},
    ),
    "modulation": (
        {
            "sigmas": _floats("steps"),
            "guidance": _floats(1),
            "pooled": _floats("batch", "vec_in_dim"),
        },
        {"modulation": _floats("steps", "rows", "batch", 1, "hidden")},
    ),
    "transformer": (
        {
            "latents": _floats("batch", "target_tokens", "features"),
            "sample": _floats("batch", "target_tokens", "features"),
            "context": _floats("batch", "context_tokens", "features"),
            "text": _floats("batch", "text_tokens", "context_in_dim"),
            "modulation": _floats("rows", "batch", 1, "hidden"),
            "positions": TensorSpec("int32", ("image_tokens", 3)),
            "dt": _floats(),
        },
        {
            "next": _floats("batch", "target_tokens", "features"),
            "velocity": _floats("batch", "target_tokens", "features"),
        },
    ),
    "vae_decoder": (
        {"latents": _floats("batch", "grid_height", "grid_width", "features")},
        {"pixels": TensorSpec("uint8", ("batch", "height", "width", 3))},
    ),
}
"""Graph name -> (inputs, outputs), in the order of the graph's arguments."""


@dataclass(frozen=True)
class Workload:
    """The edits that engines are built for.

    sizes: of results, (w, h) in pixels; the first is what engines are tuned for. contexts: fewest
    and most pictures of one edit. batch: most edits at once. text_tokens: the longest prompt.
    clip_tokens: of every prompt.
    static: contexts have the sizes of results, and prompts the full length; otherwise contexts
    also have any preferred size of the model, and prompts any length.
    """

    sizes: tuple[Size, ...]
    contexts: tuple[int, int]
    batch: int
    text_tokens: int
    static: bool = False
    clip_tokens: int = CLIP_TOKENS

    def axes(self, grid: Grid) -> Mapping[str, Triple]:
        """The range of every axis that varies."""
        pictures = self.sizes if self.static else (*self.sizes, *grid.preferred)
        tokens = [grid.tokens(size) for size in self.sizes]
        seen = [w * h for w, h in map(grid.tokens, pictures)]
        usual = min(max(self.contexts[0], 1), self.contexts[1])
        target = _triple([w * h for w, h in tokens])
        context = (self.contexts[0] * min(seen), usual * seen[0], self.contexts[1] * max(seen))
        return {
            "batch": (self.batch if self.static else 1, self.batch, self.batch),
            "clip_tokens": (self.clip_tokens,) * 3,
            "text_tokens": (self.text_tokens if self.static else 1, *(self.text_tokens,) * 2),
            "steps": STEPS,
            "width": _triple([w for w, _ in pictures]),
            "height": _triple([h for _, h in pictures]),
            "target_tokens": target,
            "context_tokens": context,
            "image_tokens": (
                target[0] + context[0],
                target[1] + context[1],
                target[2] + context[2],
            ),
            "grid_width": _triple([w for w, _ in tokens]),
            "grid_height": _triple([h for _, h in tokens]),
        }

    def profile(self, name: str, inputs: Tensors, grid: Grid) -> Profile:
        """The range of each input of graph ``name``; ``inputs`` has the model's own numbers.

        Prompts and pictures are encoded, and results decoded, one at a time: only ``modulation``
        and ``transformer`` see a batch.
        """
        axes = dict(self.axes(grid))
        if name not in ("modulation", "transformer"):
            axes["batch"] = (1, 1, 1)
        ranges = {
            key: [(axis,) * 3 if isinstance(axis, int) else axes[axis] for axis in spec.shape]
            for key, spec in inputs.items()
        }
        return {
            key: (
                tuple(least for least, _, _ in triples),
                tuple(usual for _, usual, _ in triples),
                tuple(most for _, _, most in triples),
            )
            for key, triples in ranges.items()
        }


def _triple(extents: list[int]) -> Triple:
    return min(extents), extents[0], max(extents)
