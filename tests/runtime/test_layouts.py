"""Every layout of a checkpoint gives the same tensors, and the published shapes fit exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxkontext.kernels import reference
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.checkpoint import KINDS, Component, find, open_component, recognise
from fluxkontext.runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from fluxkontext.runtime.errors import CheckpointError
from fluxkontext.runtime.loading import build, load
from fluxkontext.runtime.models.clip import ClipText
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.models.vae import Vae
from fluxkontext.runtime.weights import StoredTensor, WeightIndex, match

from . import peers
from .traces import picture, size

MAKE: dict[str, Callable[[Any], nn.Module]] = {
    "transformer": lambda config: Flux(config, reference()),
    "vae": Vae,
    "text_encoder": ClipText,
    "text_encoder_2": T5Encoder,
}
FILES = {"model": "transformer"} | {part: part for part in KINDS if part != "transformer"}


def loaded(component: Component[Any]) -> dict[str, Tensor]:
    module = load(component, MAKE[component.name], torch.device("cpu"), torch.float32)
    return module.state_dict()


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


@pytest.fixture(scope="module")
def exact(hub: Path) -> dict[str, Tensor]:
    """The transformer's tensors under BFL's names, renamed by the tests' own writer."""
    return peers.bfl_transformer(peers.load_folder(hub / "transformer"))


@pytest.mark.parametrize("file", FILES)
def test_single_files_give_the_same_bits(
    hub: Path, single_files: dict[str, Path], file: str
) -> None:
    part = FILES[file]
    single = open_component(part, single_files[file])
    folder = open_component(part, hub / part)
    if part in ("transformer", "vae"):
        assert (folder.layout, single.layout) == ("diffusers", "bfl")
    assert_same_bits(loaded(single), loaded(folder))


def test_canonical_names_are_bfls(hub: Path, exact: dict[str, Tensor]) -> None:
    assert_same_bits(loaded(open_component("transformer", hub / "transformer")), exact)
    wanted = peers.bfl_vae(peers.load_folder(hub / "vae"))
    assert_same_bits(loaded(open_component("vae", hub / "vae")), wanted)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_comfy_prefixes(tmp_path: Path, exact: dict[str, Tensor], prefix: str) -> None:
    file = peers.write(exact, tmp_path / "model.safetensors", prefix)
    assert_same_bits(loaded(open_component("transformer", file)), exact)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfy_fp8(tmp_path: Path, exact: dict[str, Tensor], prefix: str, newer: bool) -> None:
    """Scaled fp8 loads as exactly the values that it stands for."""
    file = tmp_path / "model.safetensors"
    wanted = peers.write_comfy_fp8(exact, file, prefix, newer)
    assert_same_bits(loaded(open_component("transformer", file)), wanted)


def test_comfy_fp8_by_row(tmp_path: Path, exact: dict[str, Tensor]) -> None:
    """A scale for each row of a matrix."""
    name = "single_blocks.0.linear1.weight"
    scale = exact[name].abs().amax(1, keepdim=True) / 448
    values = (exact[name] / scale).to(torch.float8_e4m3fn)
    stored = {**exact, name: values, "single_blocks.0.linear1.weight_scale": scale[:, 0]}
    file = peers.write(stored, tmp_path / "model.safetensors")
    wanted = {**exact, name: values.float() * scale}
    assert_same_bits(loaded(open_component("transformer", file)), wanted)


def test_one_file_of_everything(tmp_path: Path, hub: Path, exact: dict[str, Tensor]) -> None:
    """ComfyUI's checkpoint of all networks; the tokenizers come from elsewhere."""
    clip = peers.load_folder(hub / "text_encoder")
    everything = {f"model.diffusion_model.{k}": v for k, v in exact.items()}
    vae = peers.bfl_vae(peers.load_folder(hub / "vae"))
    everything |= {f"vae.{name}": value for name, value in vae.items()}
    everything |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in clip.items()}
    t5 = peers.load_folder(hub / "text_encoder_2")
    everything |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5.items()}
    file = peers.write(everything, tmp_path / "all.safetensors")
    tokenizers = {part: hub / part for part in ("tokenizer", "tokenizer_2")}
    whole = find(file, tokenizers)
    for part in KINDS:
        folder = open_component(part, hub / part)
        assert_same_bits(loaded(getattr(whole, part)), loaded(folder))


def test_clip_without_its_prefix(tmp_path: Path, hub: Path) -> None:
    """transformers 5 leaves ``text_model.`` out."""
    tensors = peers.load_folder(hub / "text_encoder")
    assert all(name.startswith("text_model.") for name in tensors)
    bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    file = peers.write(bare, tmp_path / "clip.safetensors")
    assert_same_bits(loaded(open_component("text_encoder", file)), bare)


def test_an_edit_gives_the_same_bits(
    hub: Path, single_files: dict[str, Path], hub_pipe: KontextPipeline
) -> None:
    parts = {name: file for name, file in single_files.items() if name != "model"}
    parts |= {part: hub / part for part in ("tokenizer", "tokenizer_2")}
    call = {"image": picture(96, 80), "prompt": "make it red", "seed": 0, **size(96, 96)}
    call |= {"auto_resize": False, "num_inference_steps": 2, "output_type": "latent"}
    with KontextPipeline.from_pretrained(
        single_files["model"], precision="fp32", device="cpu", **parts
    ) as single:
        assert (single(**call).images == hub_pipe(**call).images).all()


PUBLISHED = json.loads((Path(__file__).parent / "flux_dev_shapes.json").read_text(encoding="utf-8"))
FULL: dict[str, tuple[str, Any]] = {
    "diffusers": ("transformer", TransformerConfig()),
    "bfl": ("transformer", TransformerConfig()),
    "vae_diffusers": ("vae", VaeConfig()),
    "vae_bfl": ("vae", VaeConfig()),
    "clip_l": ("text_encoder", ClipConfig()),
    "t5_xxl_encoder": ("text_encoder_2", T5Config()),
}


@pytest.mark.parametrize("name", FULL)
def test_the_full_model_has_the_published_shapes(name: str) -> None:
    """Every name and shape is used, nothing is left over, and the size is that of the model."""
    part, config = FULL[name]
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[name].items()}
    stored = {k: StoredTensor(Path(name), k, "BF16", shape) for k, shape in shapes.items()}
    component = recognise(part, WeightIndex(stored), None)
    assert component is not None
    assert component.config == config
    module = build(lambda: MAKE[part](component.config))
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    pieces = match(part, wanted, component.weights, component.locate)
    assert pieces.keys() == wanted.keys()
    used = [(piece.key, piece.half) for group in pieces.values() for piece in group]
    assert len(used) == len(set(used))
    prefix = "text_model." if name == "clip_l" else ""
    assert {prefix + key for key, _ in used} == shapes.keys()
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters == PUBLISHED["_meta"]["params"][name]


@pytest.mark.parametrize("name", FULL)
def test_a_wrong_shape_is_noticed(name: str) -> None:
    """The check above has power: each tensor missing, unexpected or of another shape fails."""
    part, config = FULL[name]
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[name].items()}
    stored = {k: StoredTensor(Path(name), k, "BF16", shape) for k, shape in shapes.items()}
    component = recognise(part, WeightIndex(stored), None)
    assert component is not None
    module = build(lambda: MAKE[part](config))
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    tensors = component.weights.tensors
    for key in list(tensors)[:: max(1, len(tensors) // 12)]:
        wider = (*tensors[key].shape[:-1], tensors[key].shape[-1] + 2)
        without = {k: v for k, v in tensors.items() if k != key}
        for changed in (
            without,
            {**tensors, f"{key}.more": tensors[key]},
            {**tensors, key: StoredTensor(Path(name), key, "BF16", wider)},
        ):
            with pytest.raises(CheckpointError):
                match(part, wanted, WeightIndex(changed), component.locate)
