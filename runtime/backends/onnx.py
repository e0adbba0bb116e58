"""The ONNX Runtime backend: the graphs of a bundle, without torch.

What a step reads and writes stays on the session's device: latents in two buffers that change
places, the modulation of all steps in one, of which each step is given its part by address.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..backend import Batch, Embeddings, Floats, TokenIds
from ..bundle import Bundle
from ..contract import Profile
from ..errors import BackendUnavailableError, CheckpointError, KontextError, OutOfMemoryError
from ..geometry import Size, pack
from ..images import Pixels

_log = logging.getLogger(__name__)

_FOLD_LIMIT = 2**30
"""Weights beyond so many bytes are not cast ahead of time: that would hold them twice. Quantised
ones never are: they would be held in four or eight times their size."""


@dataclass(frozen=True)
class Text:
    """One prompt: ``pooled [1, vec_in_dim]``, ``tokens [1, S, context_in_dim]``."""

    pooled: Floats
    tokens: Floats


@dataclass(frozen=True)
class Branch:
    """One conditioning of a batch; ``modulation [N, R, B, 1, D]`` and ``text`` on the device."""

    modulation: Any
    text: Any


@dataclass
class State:
    """A batch in the making.

    buffers: latents ``[B, T, 4 C]`` on the device, the current ones first; a step writes into the
    others, the last of which then comes first. branches: each with its weight in true CFG.
    """

    buffers: list[Any]
    context: Any
    positions: Any
    branches: Sequence[tuple[Branch, float]]
    dts: Floats
    target: Size


class OnnxBackend:
    """Implements :class:`fluxkontext.runtime.backend.Backend`."""

    name = "onnx"
    leaves = False
    max_batch: int | None = None
    profiles: Mapping[str, Profile] = {}

    def __init__(self, bundle: Bundle, device: str, precision: str) -> None:
        """Open a bundle. device: ``auto``, ``cpu``, ``cuda``; precision: ``auto`` or its own."""
        self.device = _choose_device(device)
        if device == "auto" and self.device != "cpu" and (why := _why_no_graphs(bundle, precision)):
            _log.warning("device auto: the CPU, as %s", why)
            self.device = "cpu"
        flavour = "cpu" if self.device == "cpu" else "gpu"
        recipe = bundle.recipe
        self.precision = bundle.named_precision(flavour)
        self.text_features = bundle.text_features
        self.details: Mapping[str, str] = {"recipe": recipe} if recipe else {}
        if precision not in ("auto", self.precision):
            on_cpu = flavour == "gpu" and precision == bundle.named_precision("cpu")
            other = "device cpu, " if on_cpu else ""
            raise BackendUnavailableError(
                f"precision: expected {self.precision}, that of the bundle's {flavour} graphs, "
                f"found {precision}; use precision auto, {other}or backend native for another"
            )
        self._open: Callable[[str], Session] = lambda name: Session(
            bundle.graph(name, flavour),
            self.device,
            fold=not recipe and bundle.weight_bytes(name) <= _FOLD_LIMIT,
        )
        self._clip = self._open("clip")
        self._t5 = self._open("t5")
        self._vae_encoder = self._open("vae_encoder")
        self._modulation = self._open("modulation")
        self._transformer = self._open("transformer")
        self._vae_decoder = self._open("vae_decoder")

    def encode_text(self, prompt: TokenIds | Embeddings) -> Text:
        if isinstance(prompt, Embeddings):
            return Text(prompt.pooled[None], prompt.tokens[None])
        (pooled,) = self._clip.run(ids=prompt.clip[None])
        (tokens,) = self._t5.run(ids=prompt.t5[None])
        return Text(pooled, tokens)

    def encode_image(self, image: Pixels | Floats) -> Floats:
        """Context tokens ``[1, tokens, 4 C]``."""
        if image.dtype != np.uint8:
            return pack(image.astype(np.float32))[None]
        context: Floats
        (context,) = self._vae_encoder.run(pixels=image[None])
        return context

    def begin(self, batch: Batch) -> State:
        put = self._transformer.put
        count, _, features = batch.noise.shape
        context = np.empty((count, 0, features), np.float32)
        if any(batch.contexts):
            context = np.concatenate([np.concatenate(c, axis=1) for c in batch.contexts])
        guidance = np.array([batch.guidance_scale], np.float32)
        branches = []
        scale = batch.true_cfg_scale
        weights = ((batch.text, scale), (batch.negative, 1 - scale))
        for texts, weight in weights if batch.negative else ((batch.text, 1.0),):
            pooled = np.concatenate([text.pooled for text in texts])
            modulation = self._modulation.keep(
                sigmas=batch.sigmas[:-1], guidance=guidance, pooled=pooled
            )
            tokens = np.concatenate([text.tokens for text in texts])
            branches.append((Branch(modulation, put(tokens)), weight))
        return State(
            buffers=[put(batch.noise) for _ in range(1 + len(branches))],
            context=put(context),
            positions=put(batch.positions),
            branches=branches,
            dts=np.diff(batch.sigmas).astype(np.float32),
            target=batch.target,
        )

    def step(self, state: State, i: int) -> None:
        """The two passes of true CFG add up: each adds its weighted velocity to what was before."""
        latents, *others = state.buffers
        for number, (branch, weight) in enumerate(state.branches):
            self._transformer.bind(
                {
                    "latents": latents,
                    "sample": state.buffers[number],
                    "context": state.context,
                    "text": branch.text,
                    "positions": state.positions,
                    "dt": np.array(state.dts[i] * np.float32(weight), np.float32),
                },
                parts={"modulation": (branch.modulation, i)},
                outputs={"next": others[number]},
            )
        state.buffers.insert(0, state.buffers.pop())

    def read(self, state: State) -> Floats:
        latents: Floats = state.buffers[0].numpy().copy()
        return latents

    def write(self, state: State, latents: Floats) -> None:
        state.buffers[0].update_inplace(np.ascontiguousarray(latents))

    def decode(self, state: State, stay: bool = False) -> list[Any]:
        latents = state.buffers[0].numpy()
        if not np.isfinite(latents).all():
            raise KontextError(
                f"expected finite latents, found NaN or infinity after the last step in "
                f"{self.precision}; export the checkpoint for bf16 or fp32"
            )
        width, height = state.target
        grids = latents.reshape(len(latents), 1, height, width, -1)
        return [self._vae_decoder.run(latents=grid)[0][0] for grid in grids]

    def close(self) -> None:
        del self._clip, self._t5, self._vae_encoder, self._modulation
        del self._transformer, self._vae_decoder, self._open


class Session:
    """One graph with its inputs and outputs bound by address."""

    def __init__(self, path: Path, device: str, fold: bool) -> None:
        """Open ``path``. fold: compute what depends on weights alone ahead of time, and hold it."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = _threads()
        # Each graph has threads of its own: left spinning, they take a core from the next one's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        disabled = None if fold else ["ConstantFolding"]
        self._device = "cuda" if device.startswith("cuda") else "cpu"
        self._id = int(device.partition(":")[2] or 0)
        provider: Any = "CPUExecutionProvider"
        if self._device == "cuda":
            provider = ("CUDAExecutionProvider", {"device_id": self._id})
        try:
            self._session = ort.InferenceSession(
                str(path),
                options,
                providers=[provider],
                disabled_optimizers=disabled,
                enable_fallback=False,  # which would print, and hide the reason
            )
        except Exception as error:  # the library raises classes of its own for each status
            raise _translated(error, path) from None
        wanted = provider if isinstance(provider, str) else provider[0]
        if (found := self._session.get_providers()[0]) != wanted:  # the library only warns
            raise BackendUnavailableError(
                f"device: expected {wanted} to run {path.name}, found {found}; install the CUDA "
                "libraries of onnxruntime-gpu, or use device cpu"
            )
        self._path = path
        self._binding = self._session.io_binding()

    def put(self, array: NDArray[Any]) -> Any:
        """Copy an array to the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self._device, self._id)

    def run(self, **inputs: NDArray[Any]) -> list[Any]:
        """Arrays in, arrays out."""
        try:
            return list(self._session.run(None, inputs))
        except Exception as error:
            raise _translated(error, self._path) from None

    def keep(self, **inputs: NDArray[Any]) -> Any:
        """Arrays in; the first output stays on the device."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output(self._session.get_outputs()[0].name, self._device, self._id)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _translated(error, self._path) from None
        return binding.get_outputs()[0]

    def bind(
        self,
        inputs: Mapping[str, Any],
        parts: Mapping[str, tuple[Any, int]],
        outputs: Mapping[str, Any],
    ) -> None:
        """Run from device values into device values, without a copy.

        inputs: device values, or small arrays from the host. parts: a value and an index along its
        first axis: only that part is the input. outputs: where to write; others are not computed.
        """
        binding = self._binding
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name, (value, index) in parts.items():
            shape = value.shape()[1:]
            address = value.data_ptr() + index * 4 * int(np.prod(shape))
            binding.bind_input(name, self._device, self._id, np.float32, shape, address)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _translated(error, self._path) from None


def _threads() -> int:
    """Of an operation; 0 is the library's own choice: a thread on every core of the machine. Where
    the process may not use all of them, these would spin in each other's way."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    allowed = len(os.sched_getaffinity(0))
    return 0 if allowed >= (os.cpu_count() or 1) else allowed


def _translated(error: Exception, path: Path) -> Exception:
    """ONNX Runtime's error as ours."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "alloc" in text.lower():
        return OutOfMemoryError(
            f"expected enough memory for {path.name}, found: {text:.200}; "
            "use a smaller size or fewer images at once"
        )
    if any(word in text for word in ("INVALID_PROTOBUF", "NO_SUCHFILE", "INVALID_GRAPH")):
        return CheckpointError(f"{path}: expected an ONNX graph that loads, found: {text:.200}")
    return KontextError(f"{path.name}: expected it to run, found: {text:.300}")


def _why_no_graphs(bundle: Bundle, precision: str) -> str | None:
    """Why the graphs for GPUs do not do where those for CPUs do; None if they do."""
    if "gpu" not in bundle.manifest["precision"]:
        return f"a bundle of {bundle.recipe} has no graphs for GPUs"
    if precision == bundle.named_precision("cpu") != (there := bundle.named_precision("gpu")):
        return f"the bundle's graphs for GPUs are of {there}, asked for is {precision}"
    return None


def _choose_device(device: str) -> str:
    """``auto`` is the GPU where CUDA works, or else, once it is said why not, the CPU."""
    providers, auto = ort.get_available_providers(), device == "auto"
    has_cuda = "CUDAExecutionProvider" in providers
    if device == "cpu" or (auto and not has_cuda):
        return "cpu"
    name = "cuda" if auto else device
    if not has_cuda or not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise BackendUnavailableError(
            "device: expected cpu, or cuda or cuda:N with onnxruntime-gpu installed, found "
            f"{device} with {', '.join(providers)}"
        )
    reason = _why_no_cuda(int(name.partition(":")[2] or 0))
    if reason is None:
        return name
    if not auto:
        raise BackendUnavailableError(
            f"device: expected {device} to work, found: {reason}; install the CUDA libraries of "
            "onnxruntime-gpu, or use device cpu"
        )
    _log.warning("device auto: the CPU, as CUDA does not work here: %s", reason)
    return "cpu"


def _why_no_cuda(number: int) -> str | None:
    """Why the CUDA that the library was built with, there or not, does not work; None if it does.

    A session would only warn, and run on the CPU.
    """
    with redirect_stdout(sys.stderr):  # where it says what it does not find
        ort.preload_dlls()  # those that wheels install, which are on no search path
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", number)
    except Exception as error:
        text = " ".join(str(error).split())
        found = re.search(r"CUDA (?:failure|Provider)[^;]+", text)  # after the library's own code
        return found[0].strip() if found else text[:200]
    return None
