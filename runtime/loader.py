"""From a model's name to all that a pipeline needs: which backend runs it, and why."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .arguments import choice
from .backend import Backend
from .bundle import MANIFEST, VERIFY, Bundle, open_bundle
from .checkpoint import Checkpoint, find, resolve
from .config import VaeConfig
from .errors import BackendUnavailableError, CheckpointError
from .schedule import SchedulerConfig
from .tokenizer import PromptTokenizer, load_tokenizer

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "onnx", "native")


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run."""

    name: str
    backend: Backend
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    vae: VaeConfig
    scheduler: SchedulerConfig


def load(
    model: str | os.PathLike[str],
    parts: Mapping[str, str | os.PathLike[str]],
    backend: str,
    precision: str,
    device: str,
    verify: str,
) -> Loaded:
    """Find ``model``, choose a backend, and load it; what is asked for by name never falls back."""
    choice("backend", backend, BACKENDS)
    choice("verify", verify, VERIFY)
    root = resolve(model)
    is_bundle = root.is_dir() and (root / MANIFEST).is_file() and not parts
    chosen, reason = (backend, "asked for") if backend != "auto" else _choose(is_bundle, device)
    if chosen == "onnx":
        if not is_bundle:
            raise BackendUnavailableError(
                f"{model}: expected a bundle for the onnx backend, found a checkpoint; "
                "make one with: fluxkontext export"
            )
        require("onnxruntime", "for the onnx backend", "cpu")
        loaded = _from_bundle(str(model), open_bundle(root, verify), device, precision)
    else:
        require("torch", "for the native backend", "torch")
        if is_bundle:
            open_bundle(root, verify)
        loaded = _from_checkpoint(find(model, parts), device, precision)
    _log.info(
        "%s: %s backend (%s) on %s in %s",
        *(model, chosen, reason, loaded.backend.device, loaded.backend.precision),
    )
    return loaded


def _choose(is_bundle: bool, device: str) -> tuple[str, str]:
    """The fastest backend that is installed: native on a GPU, else the graphs of a bundle."""
    has_torch, has_onnx = find_spec("torch") is not None, find_spec("onnxruntime") is not None
    if not is_bundle:
        return "native", "a checkpoint without graphs"
    if has_torch and device != "cpu" and _has_nvidia_driver():
        return "native", "a GPU and torch"
    if has_onnx or not has_torch:
        return "onnx", "a bundle"
    return "native", "a bundle, but no onnxruntime"


def _has_nvidia_driver() -> bool:
    """Whether a GPU may be there, without the seconds that importing torch takes."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))


def require(package: str, purpose: str, extra: str) -> None:
    """Say how to install an optional package that is not there."""
    if find_spec(package) is None:
        raise BackendUnavailableError(
            f"expected {package} {purpose}, found none; "
            f"install it with: pip install 'fluxkontext[{extra}]'"
        )


def _from_bundle(name: str, bundle: Bundle, device: str, precision: str) -> Loaded:
    from .backends.onnx import OnnxBackend

    manifest = bundle.manifest
    vae = dict(manifest["vae"])
    return Loaded(
        name,
        OnnxBackend(bundle, device, precision),
        load_tokenizer(bundle.root / "tokenizer", 77),
        load_tokenizer(bundle.root / "tokenizer_2", 512),
        VaeConfig(**{**vae, "block_out_channels": tuple(vae["block_out_channels"])}),
        SchedulerConfig(**manifest["scheduler"]),
    )


def _from_checkpoint(checkpoint: Checkpoint, device: str, precision: str) -> Loaded:
    from .backends.native import NativeBackend

    clip, t5 = checkpoint.text_encoder.config, checkpoint.text_encoder_2.config
    tokenizer = load_tokenizer(checkpoint.tokenizer, 77)
    tokenizer_2 = load_tokenizer(checkpoint.tokenizer_2, 512)
    _check_vocabulary(tokenizer, clip.vocab_size)
    _check_vocabulary(tokenizer_2, t5.vocab_size)
    if tokenizer.model_max_length > clip.max_position_embeddings:
        raise CheckpointError(
            f"{checkpoint.tokenizer}: expected a model_max_length of at most "
            f"{clip.max_position_embeddings} as the text_encoder has, "
            f"found {tokenizer.model_max_length}"
        )
    return Loaded(
        checkpoint.name,
        NativeBackend(checkpoint, device, precision),
        tokenizer,
        tokenizer_2,
        checkpoint.vae.config,
        checkpoint.scheduler,
    )


def _check_vocabulary(tokenizer: PromptTokenizer, known: int) -> None:
    """An id that the encoder does not know would fail in the middle of an edit, or poison a GPU."""
    if tokenizer.size > known:
        raise CheckpointError(
            f"{tokenizer.name}: expected at most the {known} tokens of its text encoder, "
            f"found {tokenizer.size}; use the tokenizer that came with the encoder"
        )
