"""The six graphs of the contract as torch modules on the meta device.

A graph's boundary tensors are plain: float32, uint8 pixels, int64 token ids, int32 positions. What
lies between computes in the graph's own precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import KernelSet
from ..runtime.checkpoint import Checkpoint, Component
from ..runtime.contract import GRAPHS, TensorSpec
from ..runtime.loading import build, kinds
from ..runtime.models.clip import ClipText
from ..runtime.models.t5 import T5Encoder
from ..runtime.models.transformer import Flux
from ..runtime.models.vae import Vae, pack, scale, unpack, unscale
from ..runtime.weights import match
from .split import split_projections

_DTYPES = {
    "float32": torch.float32,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "int32": torch.int32,
}
# Sizes at which a graph is traced: all different, and none of 1, which the exporter would fix.
_EXAMPLE = {
    "batch": 2,
    "steps": 3,
    "clip_tokens": 11,
    "text_tokens": 5,
    "target_tokens": 12,
    "context_tokens": 7,
    "image_tokens": 19,
    "grid_height": 4,
    "grid_width": 6,
    "height": 64,
    "width": 96,
}


@dataclass(frozen=True)
class Graph:
    """One graph to export: a meta module whose parameters are those of ``component``."""

    name: str
    component: Component[Any]
    module: nn.Module
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def example(self) -> tuple[Tensor, ...]:
        """Inputs on the meta device to trace with."""
        return tuple(
            torch.empty(
                [dim if isinstance(dim, int) else _EXAMPLE[dim] for dim in spec.shape],
                dtype=_DTYPES[spec.dtype],
                device="meta",
            )
            for spec in self.inputs.values()
        )


def graphs(checkpoint: Checkpoint, dtype: torch.dtype, ops: KernelSet) -> list[Graph]:
    """All graphs of a checkpoint, computing in ``dtype`` with the given kernels; what leaves
    float16's range does so in float32, as on the native backend."""
    transformer, vae = checkpoint.transformer, checkpoint.vae
    sizes = {
        "hidden": transformer.config.hidden_size,
        "features": transformer.config.in_channels,
        "rows": 12 * transformer.config.depth + 3 * transformer.config.depth_single_blocks + 2,
        "context_in_dim": transformer.config.context_in_dim,
        "vec_in_dim": transformer.config.vec_in_dim,
    }
    makers: dict[str, tuple[Component[Any], Callable[[], nn.Module]]] = {
        "clip": (
            checkpoint.text_encoder,
            lambda: ClipGraph(ClipText(checkpoint.text_encoder.config)),
        ),
        "t5": (
            checkpoint.text_encoder_2,
            lambda: T5Graph(T5Encoder(checkpoint.text_encoder_2.config)),
        ),
        "vae_encoder": (vae, lambda: VaeEncoderGraph(Vae(vae.config))),
        "modulation": (transformer, lambda: ModulationGraph(Flux(transformer.config, ops), dtype)),
        "transformer": (
            transformer,
            lambda: TransformerGraph(Flux(transformer.config, ops), dtype),
        ),
        "vae_decoder": (vae, lambda: VaeDecoderGraph(Vae(vae.config))),
    }
    made = []
    for name, (component, make) in makers.items():
        module = build(make)
        stored = {
            k.removeprefix("network."): tuple(t.shape) for k, t in module.state_dict().items()
        }
        match(component.name, stored, component.weights, component.locate)
        _cast(split_projections(module.get_submodule("network")), dtype)
        inputs, outputs = ({k: s.sized(sizes) for k, s in io.items()} for io in GRAPHS[name])
        made.append(Graph(name, component, module, inputs, outputs))
    return made


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    wanted = kinds(network, dtype)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.to(wanted[name])


class ClipGraph(nn.Module):
    """Token ids to the pooled vector."""

    def __init__(self, clip: ClipText) -> None:
        super().__init__()
        self.network = clip

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.network(ids)
        return pooled.float()


class T5Graph(nn.Module):
    """Token ids to text embeddings."""

    def __init__(self, t5: T5Encoder) -> None:
        super().__init__()
        self.network = t5

    def forward(self, ids: Tensor) -> Tensor:
        tokens: Tensor = self.network(ids)
        return tokens.float()


class VaeEncoderGraph(nn.Module):
    """Pixels to packed, scaled context tokens."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.network = vae

    def forward(self, pixels: Tensor) -> Tensor:
        vae = self.network
        x = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1  # TensorRT only casts uint8
        mean, _ = vae.encoder(x.to(vae.encoder.conv_in.weight.dtype)).chunk(2, dim=1)
        return pack(scale(mean.float(), vae.config))


class ModulationGraph(nn.Module):
    """Noise levels, guidance and pooled text to all steps' modulation."""

    def __init__(self, flux: Flux, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = flux
        self.dtype = dtype

    def forward(self, sigmas: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        return self.network.modulation(sigmas, guidance, pooled.to(self.dtype)).float()


class TransformerGraph(nn.Module):
    """One Euler step. ``sample`` is what the step is added to: the latents themselves, or, in the
    second pass of true CFG, the outcome of the first."""

    def __init__(self, flux: Flux, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = flux
        self.dtype = dtype

    def forward(
        self,
        latents: Tensor,
        sample: Tensor,
        context: Tensor,
        text: Tensor,
        modulation: Tensor,
        positions: Tensor,
        dt: Tensor,
    ) -> tuple[Tensor, Tensor]:
        flux, dtype = self.network, self.dtype
        angles = torch.float64 if dtype == torch.float32 else torch.float32
        velocity = flux(
            latents.to(dtype),
            flux.img_in(context.to(dtype)),
            flux.txt_in(text.to(dtype)),
            modulation.to(dtype),
            flux.rope(positions, text.shape[1], angles),
        ).float()
        return sample + dt * velocity, velocity


class VaeDecoderGraph(nn.Module):
    """Latent tokens on their grid to pixels."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.network = vae

    def forward(self, latents: Tensor) -> Tensor:
        vae = self.network
        _, height, width, _ = latents.shape
        z = unscale(unpack(latents.flatten(1, 2), width, height), vae.config)
        z = z.to(vae.decoder.conv_in.weight.dtype)
        image = vae.decoder(z).float().permute(0, 2, 3, 1)
        levels: Tensor = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels
