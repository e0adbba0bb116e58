"""A model of any size with random weights that are made where they are used: no file holds them."""

import math
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime import KontextPipeline
from ..runtime.backends.native import NativeBackend
from ..runtime.checkpoint import Checkpoint, Component
from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ..runtime.layouts import identity
from ..runtime.schedule import SchedulerConfig
from ..runtime.stored import StoredTensor, WeightIndex
from ..runtime.tokenizer import load_tokenizer
from .checkpoint_writer import Spec, meta_networks, write_model
from .document import Json
from .mini.training.spec import MINI
from .mini.training.tokenizer_files import write_tokenizers as write_mini_tokenizers
from .synthetic import CLIP_LENGTH, spread, write_tokenizers

FULL = Spec(TransformerConfig(), VaeConfig(), ClipConfig(), T5Config(), text_length=512)
"""The published shapes of FLUX.1 Kontext [dev]."""


@dataclass(frozen=True)
class Drawn:
    """What can be drawn: its name in a document, its shapes, and tokenizers that fit it."""

    name: str
    spec: Spec
    tokenizers: Callable[[Path], None]

    def facts(self) -> Json:
        """As the schema's ``model``."""
        count = sum(
            math.prod(tensor.shape)
            for network in meta_networks(self.spec).values()
            for tensor in network.state_dict().values()
        )
        return {"name": self.name, "digest": "synthetic", "synthetic": True, "parameters": count}

    def pipeline(
        self,
        precision: str,
        device: str,
        vram_budget: int | None = None,
        kernels: Mapping[str, str] | None = None,
    ) -> KontextPipeline:
        """Loaded as from bf16 files, on the native backend; nothing is remembered between calls."""
        with tempfile.TemporaryDirectory(prefix="fluxkontext-") as name:
            folder = Path(name)
            self.tokenizers(folder)
            clip = load_tokenizer(folder / "tokenizer", CLIP_LENGTH)
            t5 = load_tokenizer(folder / "tokenizer_2", self.spec.text_length)
            checkpoint = self._checkpoint(folder, torch.device(device))
        length = self.spec.text_length
        backend = NativeBackend(checkpoint, device, precision, vram_budget, length, kernels=kernels)
        return KontextPipeline(
            backend,
            clip,
            t5,
            self.spec.vae,
            checkpoint.scheduler,
            name=self.name,
            memo_entries=0,
            budget=backend.budget,
        )

    def write(self, folder: Path, device: str) -> None:
        """The same weights as a diffusers folder in bf16, drawn on ``device``, for those who read
        files. The folder must not exist."""
        folder.mkdir(parents=True)
        where = torch.device(device)
        networks = {
            part: {
                name: _draw(name, tuple(tensor.shape), _seed(part, name), where).cpu()
                for name, tensor in network.state_dict().items()
            }
            for part, network in meta_networks(self.spec).items()
        }
        write_model(folder, self.spec, networks, torch.bfloat16)
        self.tokenizers(folder)

    def _checkpoint(self, folder: Path, where: torch.device) -> Checkpoint:
        spec = self.spec
        configs = {
            "transformer": spec.transformer,
            "vae": spec.vae,
            "text_encoder": spec.text_encoder,
            "text_encoder_2": spec.text_encoder_2,
        }
        found: dict[str, Any] = {}
        for part, network in meta_networks(spec).items():
            tensors = {
                name: drawn_tensor(part, name, tuple(tensor.shape), where)
                for name, tensor in network.state_dict().items()
            }
            found[part] = Component(part, WeightIndex(tensors), configs[part], "drawn", identity)
        return Checkpoint(
            self.name,
            **found,
            tokenizer=folder / "tokenizer",
            tokenizer_2=folder / "tokenizer_2",
            scheduler=SchedulerConfig(),
        )


def drawn_tensor(part: str, name: str, shape: tuple[int, ...], where: torch.device) -> StoredTensor:
    """A tensor that is drawn when it is loaded, on ``where``: a GPU draws what stays in RAM too,
    so that the values are the same. They depend on the tensor's name and on ``where``."""

    def made(device: torch.device) -> Tensor:
        return _draw(name, shape, _seed(part, name), where).to(device)

    return replace(StoredTensor(Path("drawn"), name, "BF16", shape), made=made)


def _seed(part: str, name: str) -> int:
    return zlib.crc32(f"{part}.{name}".encode())


def _draw(name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    mean, deviation = spread(name, shape)
    return values.mul_(deviation).add_(mean)


MODELS = {
    "full": Drawn(
        "FLUX.1 Kontext [dev] shapes, random weights",
        FULL,
        lambda folder: write_tokenizers(folder, FULL.text_length),
    ),
    "mini": Drawn("miniature shapes, random weights", MINI, write_mini_tokenizers),
}
