"""The torch backend: any checkpoint, on CPU or GPU, without a build step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels import proven
from ..backend import Batch, Embeddings, Floats, TokenIds
from ..budget import Budget
from ..checkpoint import Checkpoint, Component
from ..contract import Profile
from ..device_memory import memory_errors
from ..errors import BackendUnavailableError, KontextError
from ..executor import MAX_GRAPHS, Branch, Edit, Executor, Run
from ..geometry import Size
from ..images import Pixels
from ..loading import load
from ..memory_model import CPU, CUDA, Workload
from ..models.clip import ClipText
from ..models.t5 import T5Encoder
from ..models.transformer import Flux
from ..models.vae import Vae, pack, scale, unpack, unscale
from ..placement import Placed
from ..plan import Planner, gib
from ..tensor_shapes import ModelShapes
from .precision import choose_precision, plain, upcast

P = ParamSpec("P")
R = TypeVar("R")
Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Text:
    """Conditioning of one prompt: ``pooled [1, vec_in_dim]``, ``tokens [1, S, context_in_dim]``."""

    pooled: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class State:
    """A batch in the making: its run in the executor, and the target's size in tokens (w, h)."""

    run: Run
    target: Size


def on_device(method: Callable[P, R]) -> Callable[P, R]:
    """Run without autograd, and report exhausted memory as our own error."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(), memory_errors():
            return method(*args, **kwargs)

    return run


class NativeBackend:
    """Implements :class:`fluxkontext.runtime.backend.Backend`."""

    name = "native"
    max_batch: int | None = None
    profiles: Mapping[str, Profile] = {}
    graphs = True
    """Whether steps may be recorded, where the device can and there is room; recorded ones run no
    Python."""

    @memory_errors()
    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        precision: str,
        vram_budget: int | None = None,
        text_tokens: int = 512,
        max_graphs: int = MAX_GRAPHS,
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        """Load every network.

        device: ``auto``, ``cpu``, ``cuda`` ... precision: ``auto``, ``fp32``, ``bf16``, ``fp16``,
        ``fp8`` or ``nvfp4``, as in :func:`.precision.choose_precision`. vram_budget: bytes that the
        device may spend, or None for all it has; weights that do not fit stay on the host. On a
        GPU the allocator's limit is the process's own, so that one backend at a time can have one.
        text_tokens: of a prompt, the most. max_graphs: sizes whose CUDA graphs are kept. kernels:
        op -> the name of one of its :data:`fluxkontext.kernels.candidates.CANDIDATES`; for other
        ops the best that passes on this device.
        """
        self._device = _choose_device(device)
        self.device = str(self._device)
        self.leaves = self._device.type == "cuda"
        self._weights = choose_precision(precision, checkpoint, self._device)
        self.precision = self._weights.name
        self._dtype = self._weights.dtype
        self.budget = None
        if vram_budget is not None:
            self.budget = self._plan(ModelShapes.of(checkpoint), vram_budget, text_tokens)
        self._placed = Placed(self.budget, self._device)
        try:
            self._fill(checkpoint, kernels, max_graphs)
        except BaseException:
            self._placed.close()  # the limit that it has set is the whole process's
            raise

    def _fill(
        self, checkpoint: Checkpoint, kernels: Mapping[str, str] | None, max_graphs: int
    ) -> None:
        """Choose the kernels and load the networks."""
        dtype, shape = self._dtype, checkpoint.transformer.config
        self.text_features = (shape.vec_in_dim, shape.context_in_dim)
        channels = checkpoint.vae.config.block_out_channels
        try:
            ops = proven(
                self._device,
                dtype,
                shape.head_dim,
                shape.hidden_size,
                kernels,
                channels=channels,
                layers=self._weights.layers,
            )
        except ValueError as error:
            raise BackendUnavailableError(f"kernels: {error}") from None
        self._ops = ops
        recipe = self._weights.recipe
        self.details: Mapping[str, str] = {
            "kernels": ops.name,
            **({"recipe": recipe} if recipe else {}),
            **({"named": " ".join(map("=".join, kernels.items()))} if kernels else {}),
            **({"vram_budget": gib(self.budget.limit)} if self.budget else {}),
        }
        self._clip = self._load(checkpoint.text_encoder, ClipText, dtype)
        self._t5 = self._load(checkpoint.text_encoder_2, T5Encoder, dtype)
        self._vae = self._load(checkpoint.vae, lambda c: Vae(c, ops.group_norm_silu), dtype)
        self._vae_dtype = next(self._vae.parameters()).dtype  # not always that of the others
        self._flux = self._load(checkpoint.transformer, lambda c: Flux(c, ops), dtype)
        self._executor = Executor(self._flux, self._device, dtype, max_graphs)

    @on_device
    def encode_text(self, prompt: TokenIds | Embeddings) -> Text:
        if isinstance(prompt, Embeddings):
            return Text(self._tensor(prompt.pooled)[None], self._tensor(prompt.tokens)[None])
        clip = torch.from_numpy(prompt.clip)[None].to(self._device)
        t5 = torch.from_numpy(prompt.t5)[None].to(self._device)
        with self._placed.stage():
            return Text(self._clip(clip), self._t5(t5))

    @on_device
    def encode_image(self, image: Pixels | Floats) -> Tensor:
        """Context tokens ``[1, tokens, 4 C]``."""
        if image.dtype == np.uint8:
            pixels = torch.tensor(image, device=self._device)
            # contiguous: channels-last convolutions on a CPU lose a digit (measured at 1248x832)
            pixels = pixels.permute(2, 0, 1)[None].contiguous().to(torch.float32) / 255 * 2 - 1
            with self._exact_convolutions(), self._placed.stage():
                latents = self._vae.encode(pixels.to(self._vae_dtype), self._placed.tile)
            latents = scale(latents, self._vae.config).to(self._dtype)
        else:
            latents = self._tensor(cast(Floats, image))[None]
        return pack(latents)

    @on_device
    def begin(self, batch: Batch) -> State:
        device, flux = self._device, self._flux
        contexts = [torch.cat(list(handles), dim=1) for handles in batch.contexts if handles]
        latents = torch.tensor(batch.noise, device=device)
        if contexts:
            context = flux.img_in(torch.cat(contexts))
        else:
            context = latents.new_empty(len(latents), 0, flux.config.hidden_size, dtype=self._dtype)
        sigmas = torch.from_numpy(batch.sigmas).to(device)
        guidance = torch.tensor([batch.guidance_scale], dtype=torch.float32, device=device)
        positions = torch.from_numpy(batch.positions).to(device)
        branches = []
        for texts in (batch.text, batch.negative) if batch.negative else (batch.text,):
            pooled = torch.cat([text.pooled for text in texts])
            txt = flux.txt_in(torch.cat([text.tokens for text in texts]))
            with self._placed.stage():
                modulation = flux.modulation(sigmas[:-1], guidance, pooled)
            branches.append(Branch(txt, modulation, flux.rope(positions, txt.shape[1])))
        dts = torch.from_numpy(np.diff(batch.sigmas)).to(device)
        edit = Edit(latents, context, branches, dts, batch.true_cfg_scale)
        return State(self._executor.begin(edit, self.graphs and self._placed.graphs), batch.target)

    @on_device
    def step(self, state: State, i: int) -> None:
        self._executor.step(state.run, i)

    @on_device
    def read(self, state: State) -> Floats:
        return self._executor.latents(state.run).cpu().numpy().copy()

    @on_device
    def write(self, state: State, latents: Floats) -> None:
        self._executor.latents(state.run).copy_(torch.from_numpy(latents))

    @on_device
    def decode(self, state: State, stay: bool = False) -> list[Any]:
        final = self._executor.latents(state.run)
        if not final.isfinite().all():
            raise KontextError(
                f"expected finite latents, found NaN or infinity after the last step in "
                f"{self.precision}; use precision bf16 or fp32"
            )
        width, height = state.target
        pictures: list[Any] = []
        for tokens in final.split(1):  # one at a time: the decoder is the memory's peak
            latents = unscale(unpack(tokens, width, height), self._vae.config)
            with self._exact_convolutions(), self._placed.stage():
                image = self._vae.decode(latents.to(self._vae_dtype), self._placed.tile)[0]
            levels = (image.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            picture = levels.permute(1, 2, 0).contiguous()
            pictures.append(picture if stay else picture.cpu().numpy())
        return pictures

    @property
    def denoiser(self) -> Flux:
        """The diffusion transformer, for those who look into it."""
        return self._flux

    @property
    def captures(self) -> int:
        """How many CUDA graphs were captured."""
        return self._executor.captures

    @property
    def replays(self) -> int:
        """How many steps were replays of one."""
        return self._executor.replays

    def close(self) -> None:
        self._executor.release()
        self._placed.close()
        del self._executor, self._clip, self._t5, self._vae, self._flux
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(
        self, component: Component[Config], make: Callable[[Config], Module], dtype: torch.dtype
    ) -> Module:
        """A network with its weights where the budget's plan wants them."""
        weights = self._weights.weights(component, self._ops)
        module = load(component, make, self._placed.loads_on(component.name), dtype, weights)
        self._placed.place(component.name, module)
        return module

    def _plan(self, shapes: ModelShapes, limit: int, text_tokens: int) -> Budget:
        """Within ``limit``, for an edit of the model's native size."""
        is_gpu = self._device.type == "cuda"
        overhead = CUDA if is_gpu else CPU
        at = self._device
        planner = Planner(shapes, self.precision, overhead, is_gpu, plain(at), upcast(at))
        native = (shapes.vae.sample_size,) * 2
        return Budget(limit, planner, Workload(native, (native,), text_tokens=text_tokens))

    def _tensor(self, array: Floats) -> Tensor:
        return torch.tensor(array, device=self._device).to(self._dtype)

    def _exact_convolutions(self) -> Any:
        """fp32 means fp32: torch lets cuDNN use TF32 for convolutions by default."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=self._vae_dtype != torch.float32)


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailableError(
            f"device: expected auto, cpu, or one that torch can use here, found {device} ({reason})"
        ) from None
    return chosen
