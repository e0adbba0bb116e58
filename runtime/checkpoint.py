"""Find the parts of a checkpoint: a diffusers folder, single files, or a mix; no torch needed."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Generic, TypeVar

from .arguments import shown
from .config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from .errors import CheckpointError
from .layouts import Locate, diffusers_transformer, diffusers_vae, identity
from .recipes import recipe_of
from .schedule import SchedulerConfig
from .weights import WeightIndex, find_files, read_headers, read_json

Config = TypeVar("Config")

MINI = "mini"
"""The name of the trained miniature that comes with the package."""
MINI_FOLDER = Path(__file__).with_name("mini")


@dataclass(frozen=True)
class Component(Generic[Config]):
    """One network of the checkpoint: its weights, its shape and the layout of its names.

    assumed: fields of ``config`` that neither a file nor the tensors tell, and are FLUX's own.
    """

    name: str
    weights: WeightIndex
    config: Config
    layout: str
    locate: Locate
    assumed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Checkpoint:
    """All that an edit needs, found but not loaded."""

    name: str
    transformer: Component[TransformerConfig]
    vae: Component[VaeConfig]
    text_encoder: Component[ClipConfig]
    text_encoder_2: Component[T5Config]
    tokenizer: Path
    tokenizer_2: Path
    scheduler: SchedulerConfig


@dataclass(frozen=True)
class _Kind:
    """How a component is recognised: a tensor that each layout must have, and known prefixes."""

    config: Any  # one of the classes of .config
    classes: frozenset[str]  # of diffusers or transformers, one of which its config.json names
    markers: Mapping[str, str]  # layout -> a tensor that only this layout has
    prefixes: tuple[str, ...]
    optional: frozenset[str] = (
        frozenset()
    )  # tensors that some files carry and the model does not use


KINDS: Mapping[str, _Kind] = {
    "transformer": _Kind(
        TransformerConfig,
        frozenset({"FluxTransformer2DModel"}),
        {"bfl": "img_in.weight", "diffusers": "x_embedder.weight"},
        ("", "model.diffusion_model.", "diffusion_model."),
    ),
    "vae": _Kind(
        VaeConfig,
        frozenset({"AutoencoderKL"}),
        {
            "bfl": "encoder.down.0.block.0.conv1.weight",
            "diffusers": "encoder.down_blocks.0.resnets.0.conv1.weight",
        },
        ("", "vae.", "first_stage_model."),
    ),
    "text_encoder": _Kind(
        ClipConfig,
        frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"}),
        {"transformers": "embeddings.token_embedding.weight"},
        ("", "text_model.", "text_encoders.clip_l.transformer.text_model."),
        frozenset({"embeddings.position_ids", "text_projection.weight", "logit_scale"}),
    ),
    "text_encoder_2": _Kind(
        T5Config,
        frozenset({"T5EncoderModel", "T5ForConditionalGeneration"}),
        {"transformers": "shared.weight"},
        ("", "text_encoders.t5xxl.transformer."),
        frozenset({"encoder.embed_tokens.weight"}),
    ),
}
_PREFIXES = tuple(
    prefix for kind in KINDS.values() for prefix in (*kind.prefixes, *kind.optional) if prefix
)
TOKENIZERS = ("tokenizer", "tokenizer_2")
PARTS = (*KINDS, *TOKENIZERS)
"""What can be named apart from the model itself, as keyword and as flag."""


def find(model: str | os.PathLike[str], parts: Mapping[str, str | os.PathLike[str]]) -> Checkpoint:
    """Locate every part of ``model``; ``parts`` names some of :data:`PARTS` elsewhere.

    model: a diffusers folder, a single file, or a hub id whose snapshot lies in the local cache.
    Raises CheckpointError for anything that is missing or is not what its name says.
    """
    root = resolve(model)
    sources = {part: _part_of(resolve(path), part) for part, path in parts.items()}
    if root.is_dir():
        _check_pipeline(root)
        scheduler = SchedulerConfig.from_json(
            read_json(root / "scheduler" / "scheduler_config.json")
        )
        sources = {part: root / part for part in PARTS} | sources
        networks = {}
    else:
        scheduler = SchedulerConfig()
        networks = _networks_in(root)
    if missing := [part for part in PARTS if part not in sources and part not in networks]:
        flags = ", ".join("--" + part.replace("_", "-") for part in missing)
        raise CheckpointError(
            f"{root}: expected a whole model, found a single file without {', '.join(missing)}; "
            f"name a folder or file for each with {flags}"
        )
    networks |= {part: open_component(part, sources[part]) for part in KINDS if part in sources}
    _check_fit(root, {part: network.config for part, network in networks.items()})
    return Checkpoint(
        name=str(model),
        **networks,
        tokenizer=sources["tokenizer"],
        tokenizer_2=sources["tokenizer_2"],
        scheduler=scheduler,
    )


def _check_fit(root: Path, configs: Mapping[str, Any]) -> None:
    """Each network may be whole and yet be another model's."""
    transformer = configs["transformer"]
    for part, has, takes in (
        ("vae", 4 * configs["vae"].latent_channels, transformer.in_channels),
        ("text_encoder", configs["text_encoder"].hidden_size, transformer.vec_in_dim),
        ("text_encoder_2", configs["text_encoder_2"].d_model, transformer.context_in_dim),
    ):
        if has != takes:
            raise CheckpointError(
                f"{root}: expected a {part} that gives the {takes} features a token that the "
                f"transformer takes, found one that gives {has}; they are of different models"
            )


def _check_pipeline(root: Path) -> None:
    """A diffusers folder of FLUX.1; those of its other pipelines have the same networks."""
    if not (root / "model_index.json").exists():
        raise CheckpointError(
            f"{root}: expected a diffusers folder (with model_index.json), found one without"
        )
    kind = str(read_json(root / "model_index.json").get("_class_name"))
    if not kind.startswith("Flux") or kind.startswith("Flux2"):
        raise CheckpointError(
            f"{root}: expected a FluxKontextPipeline, found a {kind}; this runtime is for FLUX.1"
        )


def _networks_in(file: Path) -> dict[str, Component[Any]]:
    """The networks of a single file: the transformer, and perhaps others."""
    weights = read_headers([file])
    found = {part: network for part in KINDS if (network := recognise(part, weights, None))}
    if "transformer" not in found:
        raise CheckpointError(
            f"{file}: expected a FLUX transformer (BFL, ComfyUI or diffusers names), found "
            f"tensors {_first_names(weights)}"
        )
    return found


def open_component(part: str, path: Path) -> Component[Any]:
    """Open one network from its folder (``config.json`` and weights) or from a single file."""
    if path.is_dir():
        config, files = path / "config.json", find_files(path)
    else:
        config, files = None, [path]
    weights = read_headers(files)
    component = recognise(part, weights, config)
    if component is None:
        wanted = " or ".join(KINDS[part].markers.values())
        raise CheckpointError(
            f"{path}: expected a {part} (a tensor named {wanted}), "
            f"found tensors {_first_names(weights)}"
        )
    return component


def recognise(part: str, weights: WeightIndex, config: Path | None) -> Component[Any] | None:
    """See whether ``weights`` hold this component, under which prefix and in which layout.

    config: the file of its configuration; None is the one beside its weights, if that is its own.
    """
    kind = KINDS[part]
    for prefix, (layout, marker) in product(kind.prefixes, kind.markers.items()):
        if prefix + marker in weights.tensors:
            own = _own_tensors(weights, prefix, kind.optional)
            recipe_of(own.metadata, own.tensors[marker].file)  # refuses one that is not known
            shape, assumed = _config_of(part, layout, own, config)
            return Component(part, own, shape, layout, _locate(layout, shape), assumed)
    return None


def _own_tensors(weights: WeightIndex, prefix: str, optional: frozenset[str]) -> WeightIndex:
    """The tensors under ``prefix``; one that is under no known prefix is as unexpected as ever."""
    own = weights.under(prefix)
    tensors = {key: tensor for key, tensor in own.tensors.items() if key not in optional}
    scales = {key: scale for key, scale in own.scales.items() if key not in optional}
    if prefix:
        strays = (key for key in weights.tensors if not key.startswith(_PREFIXES))
        tensors |= {key: weights.tensors[key] for key in strays}
    return replace(own, tensors=tensors, scales=scales)


def _config_of(
    part: str, layout: str, weights: WeightIndex, config: Path | None
) -> tuple[Any, frozenset[str]]:
    """From its JSON; else from the tensors; else, for renamed ones, the published shape. And which
    of its fields are assumed."""
    kind = KINDS[part]
    if config is None and (part, layout) != ("transformer", "bfl"):  # whose tensors tell enough
        config = _config_beside(kind, weights)
    if config is not None:
        return kind.config.from_json(read_json(config), str(config)), frozenset()
    if layout == "diffusers":
        return kind.config(), frozenset(field.name for field in fields(kind.config))
    try:
        return kind.config.from_shapes(weights.shapes), kind.config.ASSUMED
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise CheckpointError(
            f"{part}: expected all tensors of a FLUX {part}, found only some of them, such as "
            f"{_first_names(weights)}"
        ) from None


def _config_beside(kind: _Kind, weights: WeightIndex) -> Path | None:
    """The configuration that lies beside a network's weights, unless it is of something else."""
    file = next(iter(weights.tensors.values())).file.with_name("config.json")
    try:
        values = read_json(file)
    except CheckpointError:  # none, or whatever else has that name
        return None
    named = [values.get("_class_name"), values.get("architectures")]
    return file if any(name in str(named) for name in kind.classes) else None


def _locate(layout: str, config: object) -> Locate:
    if layout != "diffusers":
        return identity
    if isinstance(config, VaeConfig):
        return diffusers_vae(len(config.block_out_channels))
    return diffusers_transformer


def _part_of(path: Path, part: str) -> Path:
    """A part may be named by its own folder, by the model folder that has it, or by a file: of a
    tokenizer, its first one."""
    if part in TOKENIZERS and path.name in ("vocab.json", "tokenizer.json"):
        return path.parent
    return path / part if (path / part).is_dir() else path


def _first_names(weights: WeightIndex) -> str:
    return ", ".join(list(weights.tensors)[:3]) or "none"


def resolve(model: str | os.PathLike[str]) -> Path:
    """A path as it is; a hub id as its snapshot in the local cache; :data:`MINI` as the folder in
    the package (a folder of one's own of that name is ``./mini``)."""
    if str(model) == MINI:
        if MINI_FOLDER.is_dir():
            return MINI_FOLDER
        raise CheckpointError(
            f"{MINI}: expected the trained miniature in {MINI_FOLDER}, found none, as this version "
            "comes without; name another model: a folder, a safetensors file or a hub id"
        )
    path = Path(model).expanduser()
    try:
        if path.exists():
            return path
    except OSError as error:  # too long a name, for one
        raise CheckpointError(
            f"{shown(str(model))}: expected a folder, a safetensors file or a hub id, "
            f"found: {error.strerror}"
        ) from None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return _from_hub_cache(str(model))
    raise CheckpointError(f"{model}: expected a folder, a file or a hub id, found nothing")


def _from_hub_cache(repo: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    hub = Path(os.environ.get("HF_HOME") or home) / "hub"
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub).expanduser()
    folder = cache / f"models--{repo.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file() and (snapshot := folder / "snapshots" / main.read_text().strip()).is_dir():
        return snapshot
    raise CheckpointError(
        f"{repo}: expected a path or a model in the local cache {cache}, found neither; accept its "
        f"licence at https://huggingface.co/{repo} and run: hf download {repo}"
    )
