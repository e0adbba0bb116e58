"""Inputs and outputs of the six graphs: the one source of names, types and axes."""

from collections.abc import Mapping
from dataclasses import dataclass

Axis = str | int


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
