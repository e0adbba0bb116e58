"""From a model's name to all that a pipeline needs: which backend runs it, and why."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .arguments import choice
from .backend import Backend
from .budget import Budget, parse_bytes
from .bundle import MANIFEST, VERIFY, Bundle, is_packed, open_bundle, read_manifest
from .checkpoint import Checkpoint, find, resolve
from .config import VaeConfig
from .engines import why_not_here
from .errors import BackendUnavailableError, CheckpointError
from .schedule import SchedulerConfig
from .tokenizer import PromptTokenizer, load_tokenizer

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "onnx", "native", "tensorrt")


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run."""

    name: str
    backend: Backend
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    vae: VaeConfig
    scheduler: SchedulerConfig
    budget: Budget | None = None


def load(
    model: str | os.PathLike[str],
    parts: Mapping[str, str | os.PathLike[str]],
    backend: str,
    precision: str,
    device: str,
    verify: str,
    vram_budget: str | int | None = None,
    kernels: Mapping[str, str] | None = None,
) -> Loaded:
    """Find ``model``, choose a backend, and load it; what is asked for by name never falls back.

    vram_budget: bytes, or such as ``12GiB``, and kernels: op -> implementation, both for the native
    backend.
    """
    limit = None if vram_budget is None else parse_bytes(vram_budget)
    choice("backend", backend, BACKENDS)
    choice("verify", verify, VERIFY)
    root = resolve(model)
    has_manifest = root.is_dir() and (root / MANIFEST).is_file()
    is_bundle = has_manifest and not parts
    chosen, reason = backend, "asked for"
    if backend == "auto":
        chosen, reason = _choose(root, is_bundle, device, precision)
    if limit is not None and chosen != "native":
        raise BackendUnavailableError(
            f"vram_budget: expected the native backend, which alone keeps to one, found {chosen}; "
            "use backend native"
        )
    if kernels and chosen != "native":
        raise BackendUnavailableError(
            f"kernels: expected the native backend, which alone has a choice, found {chosen}; "
            "use backend native"
        )
    if is_bundle and chosen != "tensorrt" and is_packed(read_manifest(root)):
        raise BackendUnavailableError(
            f"{model}: expected a whole bundle for the {chosen} backend, found one packed with "
            "engines alone; use backend tensorrt, or the bundle that it was packed from"
        )
    if chosen != "native":
        if has_manifest and parts:
            raise BackendUnavailableError(
                f"{model}: expected a bundle's own parts for the {chosen} backend, found "
                f"{', '.join(parts)} from elsewhere; leave them out, or use backend native"
            )
        if not is_bundle:
            raise BackendUnavailableError(
                f"{model}: expected a bundle for the {chosen} backend, found a checkpoint; "
                f"make one with: fluxkontext {'export' if chosen == 'onnx' else 'build'}"
            )
        loaded = _from_bundle(str(model), open_bundle(root, verify), chosen, device, precision)
    else:
        require("torch", "for the native backend", "torch")
        if is_bundle:
            open_bundle(root, verify)
        loaded = _from_checkpoint(find(model, parts), device, precision, limit, kernels)
    _log.info(
        "%s: %s backend (%s) on %s in %s",
        *(model, chosen, reason, loaded.backend.device, loaded.backend.precision),
    )
    return loaded


def _choose(root: Path, is_bundle: bool, device: str, precision: str) -> tuple[str, str]:
    """The fastest backend that is installed and has the precision: engines that have passed on this
    GPU, native on a GPU, else the graphs of a bundle."""
    has_torch, has_onnx = find_spec("torch") is not None, find_spec("onnxruntime") is not None
    if not is_bundle:
        return "native", "a checkpoint, or parts of several"
    bundle = Bundle(root, read_manifest(root))
    if bundle.packed:
        return "tensorrt", "a bundle of engines alone"
    if device != "cpu" and _has_nvidia_driver():
        reason = why_not_here(bundle.manifest, device, precision)
        if reason is None:
            return "tensorrt", "engines that passed on this GPU"
        _log.info("%s: not the tensorrt backend: %s", root, reason)
        if has_torch:
            if _torch_has_gpu():
                return "native", "a GPU and torch"
            _log.info("%s: not the native backend on a GPU: torch finds none", root)
    if has_torch and precision not in ("auto", bundle.named_precision("cpu")):
        return "native", f"a bundle whose graphs do not compute in {precision}"
    if has_onnx or not has_torch:
        return "onnx", "a bundle"
    return "native", "a bundle, but no onnxruntime"


def _has_nvidia_driver() -> bool:
    """Whether a GPU may be there, without the seconds that importing torch takes."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def require(package: str, purpose: str, extra: str) -> None:
    """Say how to install an optional package that is not there."""
    if find_spec(package) is None:
        raise BackendUnavailableError(
            f"expected {package} {purpose}, found none; "
            f"install it with: pip install 'fluxkontext[{extra}]'"
        )


def open_backend(
    chosen: str, bundle: Bundle, device: str, precision: str, *, qualified: bool = True
) -> Backend:
    """The ``onnx`` or ``tensorrt`` backend. qualified: only engines that have passed here."""
    if chosen == "onnx":
        require("onnxruntime", "for the onnx backend", "cpu")
        from .backends.onnx import OnnxBackend

        return OnnxBackend(bundle, device, precision)
    try:
        from .backends.tensorrt import TensorRtBackend
    except ImportError:
        raise BackendUnavailableError(
            "expected cuda-bindings for the tensorrt backend, found none; install it with an "
            "engine library: pip install 'fluxkontext[tensorrt]' or 'fluxkontext[tensorrt-rtx]'"
        ) from None
    return TensorRtBackend(bundle, device, precision, qualified=qualified)


def _from_bundle(name: str, bundle: Bundle, chosen: str, device: str, precision: str) -> Loaded:
    manifest = bundle.manifest
    vae = dict(manifest["vae"])
    tokenizer = load_tokenizer(bundle.root / "tokenizer", 77)
    tokenizer_2 = load_tokenizer(bundle.root / "tokenizer_2", 512)
    return Loaded(
        name,
        open_backend(chosen, bundle, device, precision),
        tokenizer,
        tokenizer_2,
        VaeConfig(**{**vae, "block_out_channels": tuple(vae["block_out_channels"])}),
        SchedulerConfig(**manifest["scheduler"]),
    )


def _from_checkpoint(
    checkpoint: Checkpoint,
    device: str,
    precision: str,
    limit: int | None,
    kernels: Mapping[str, str] | None,
) -> Loaded:
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
    native = NativeBackend(
        checkpoint, device, precision, limit, tokenizer_2.model_max_length, kernels=kernels
    )
    return Loaded(
        checkpoint.name,
        native,
        tokenizer,
        tokenizer_2,
        checkpoint.vae.config,
        checkpoint.scheduler,
        native.budget,
    )


def _check_vocabulary(tokenizer: PromptTokenizer, known: int) -> None:
    """An id that the encoder does not know would fail in the middle of an edit, or poison a GPU."""
    if tokenizer.size > known:
        raise CheckpointError(
            f"{tokenizer.name}: expected at most the {known} tokens of its text encoder, "
            f"found {tokenizer.size}; use the tokenizer that came with the encoder"
        )
