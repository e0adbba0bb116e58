"""The TensorRT backend: a bundle's engines, without torch.

All engines run in one piece of activation memory, one after the other in one stream. What a step
reads and writes stays on the GPU; for each shape of a request the transformer has buffers at fixed
addresses and its run recorded as a CUDA graph.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Batch, Embeddings, Floats, TokenIds
from ..bundle import Bundle
from ..contract import GRAPHS, STEPS, Profile
from ..cuda import Buffer, Stream
from ..engines import choose_set, gpu_at, installed
from ..errors import BackendUnavailableError, KontextError
from ..files import cache_folder
from ..geometry import pack
from ..images import Pixels
from .tensorrt_engine import Context, Engine, Shape
from .tensorrt_step import Branch, Bucket, State

_BUCKETS = 8
"""Shapes of requests for which buffers and a recorded run are kept."""


@dataclass(frozen=True)
class Text:
    """One prompt on the GPU: ``pooled [1, vec_in_dim]``, ``tokens [1, S, context_in_dim]``."""

    pooled: Buffer
    tokens: Buffer


class TensorRtBackend:
    """Implements :class:`fluxkontext.runtime.backend.Backend`."""

    name = "tensorrt"
    leaves = True

    def __init__(
        self, bundle: Bundle, device: str, precision: str, *, qualified: bool = True
    ) -> None:
        """Load the engines that fit. device: ``auto``, ``cuda``, ``cuda:1``; precision: ``auto`` or
        their own; qualified: refuse engines that doctor has not passed on this GPU."""
        index, self.gpu = gpu_at(device)
        versions = {library: it.version for library, it in installed().items()}
        self.set_name, entry = choose_set(bundle.manifest, self.gpu, versions, qualified=qualified)
        self.device = f"cuda:{index}"
        self.text_features = bundle.text_features
        self.library: str = entry["library"]
        self.details: Mapping[str, str] = {
            "engines": self.set_name,
            "library": f"{self.library} {entry['version']}",
            "gpu": self.gpu.name,
        }
        self.precision: str = entry["precision"]
        if precision not in ("auto", self.precision):
            raise BackendUnavailableError(
                f"precision: expected {self.precision}, that of the engines, found {precision}; "
                "build engines for another"
            )
        self._stream = Stream(index)
        place = f"{self.set_name}-{self.gpu.name.replace(' ', '_')}"
        kernels = cache_folder() / "kernels" / place
        parts: Mapping[str, Mapping[str, Any]] = entry["components"]
        self.profiles: Mapping[str, Profile] = {it: part["profile"] for it, part in parts.items()}
        self.max_batch: int | None = self.profiles["transformer"]["latents"][-1][0]
        self._engines = {
            name: Engine(
                self.library,
                bundle.root / part["file"],
                name,
                part["profile"],
                kernels / part["key"],
            )
            for name, part in parts.items()
        }
        size = max(engine.memory for engine in self._engines.values())
        self._memory = Buffer((size,), np.uint8)
        self._contexts = {name: self._context(name) for name in GRAPHS if name != "transformer"}
        self._buckets: OrderedDict[tuple[Shape, ...], Bucket] = OrderedDict()

    def _context(self, name: str) -> Context:
        return self._engines[name].context(self._memory.address, self._memory.size)

    def encode_text(self, prompt: TokenIds | Embeddings) -> Text:
        self._stream.enter()
        if isinstance(prompt, Embeddings):
            put = self._stream.put
            return Text(put(prompt.pooled[None]), put(prompt.tokens[None]))
        return Text(
            self._run("clip", ids=self._stream.put(prompt.clip[None])),
            self._run("t5", ids=self._stream.put(prompt.t5[None])),
        )

    def encode_image(self, image: Pixels | Floats) -> Buffer:
        """Context tokens ``[1, tokens, 4 C]``."""
        self._stream.enter()
        if image.dtype != np.uint8:
            return self._stream.put(pack(image.astype(np.float32))[None])
        return self._run("vae_encoder", pixels=self._stream.put(image[None]))

    def begin(self, batch: Batch) -> State:
        self._stream.enter()
        put = self._stream.put
        scale = batch.true_cfg_scale
        weights = ((batch.text, scale), (batch.negative, 1 - scale))
        dts = np.diff(batch.sigmas).astype(np.float32)
        branches = []
        for texts, weight in weights if batch.negative else ((batch.text, 1.0),):
            pooled = self._rows([[text.pooled] for text in texts])
            modulation = self._modulate(batch.sigmas[:-1], batch.guidance_scale, pooled)
            tokens = self._rows([[text.tokens] for text in texts])
            branches.append(Branch(modulation, tokens, put(dts * np.float32(weight))))
        count, _, features = batch.noise.shape
        contexts = [list(handles) for handles in batch.contexts]
        empty = Buffer((count, 0, features), np.float32)
        return State(
            latents=put(batch.noise),
            context=self._rows(contexts) if any(contexts) else empty,
            positions=put(batch.positions),
            branches=branches,
            target=batch.target,
        )

    def step(self, state: State, i: int) -> None:
        """The two passes of true CFG add up: each adds its weighted velocity to what was before."""
        self._stream.enter()
        sample = state.latents
        for branch in state.branches:
            bucket = self._bucket(state, branch)
            bucket.fill(state, branch, i, sample)
            bucket.run()
            sample = bucket.buffers["next"]
        self._stream.copy(state.latents.address, sample.address, sample.size)

    def read(self, state: State) -> Floats:
        self._stream.enter()
        return self._stream.read(state.latents)

    def write(self, state: State, latents: Floats) -> None:
        self._stream.enter()
        self._stream.write(state.latents, latents)

    def decode(self, state: State, stay: bool = False) -> list[Any]:
        if not np.isfinite(self.read(state)).all():
            raise KontextError(
                f"expected finite latents, found NaN or infinity after the last step in "
                f"{self.precision}; build engines for bf16 or fp32"
            )
        count, _, features = state.latents.shape
        width, height = state.target
        context = self._contexts["vae_decoder"]
        context.set_shapes({"latents": (1, height, width, features)})
        _, *shape = context.shape("pixels")
        pictures = [Buffer(tuple(shape), np.uint8) for _ in range(count if stay else 1)]
        read: list[Pixels] = []
        for number in range(count):
            pixels = pictures[number if stay else 0]
            context.set_addresses({"latents": state.latents.part(number), "pixels": pixels.address})
            context.run(self._stream.handle)
            if not stay:
                read.append(self._stream.read(pixels))
        self._stream.wait()
        return pictures if stay else read

    def close(self) -> None:
        """Keep what TensorRT-RTX has compiled, then free everything."""
        self._stream.enter()
        self._stream.wait()
        for engine in self._engines.values():
            if engine.kernels:
                engine.kernels.save()
        self._buckets.clear()
        del self._contexts, self._engines
        self._memory.free()
        self._stream.close()

    def _run(self, name: str, **inputs: Buffer) -> Buffer:
        """Run a component with one output, which stays on the GPU."""
        context = self._contexts[name]
        context.set_shapes({key: buffer.shape for key, buffer in inputs.items()})
        (output,) = GRAPHS[name][1]
        result = Buffer(context.shape(output), np.float32)
        addresses = {key: buffer.address for key, buffer in inputs.items()}
        context.set_addresses({**addresses, output: result.address})
        context.run(self._stream.handle)
        self._stream.wait()  # the inputs may be freed now
        return result

    def _modulate(self, sigmas: Floats, guidance: float, pooled: Buffer) -> Buffer:
        """Modulation of all steps, as many at once as the engine takes."""
        scale = self._stream.put(np.array([guidance], np.float32))
        most = STEPS[-1]
        parts = [
            self._run(
                "modulation",
                sigmas=self._stream.put(sigmas[start : start + most]),
                guidance=scale,
                pooled=pooled,
            )
            for start in range(0, len(sigmas), most)
        ]
        if len(parts) == 1:
            return parts[0]
        whole = Buffer((len(sigmas), *parts[0].shape[1:]), np.float32)
        for number, part in enumerate(parts):
            self._stream.copy(whole.part(number * most), part.address, part.size)
        self._stream.wait()
        return whole

    def _rows(self, rows: Sequence[Sequence[Buffer]]) -> Buffer:
        """Buffers ``[1, n, ...]``, joined along n within a row, and rows along the first axis."""
        first = rows[0][0].shape
        length = sum(buffer.shape[1] for buffer in rows[0])
        whole = Buffer((len(rows), length, *first[2:]), np.float32)
        for number, row in enumerate(rows):
            address = whole.part(number)
            for buffer in row:
                self._stream.copy(address, buffer.address, buffer.size)
                address += buffer.size
        self._stream.wait()  # the parts may be freed now
        return whole

    def _bucket(self, state: State, branch: Branch) -> Bucket:
        """The buffers for the shapes of a branch; beyond a number, those used longest ago go."""
        shapes: dict[str, Shape] = {
            "latents": state.latents.shape,
            "sample": state.latents.shape,
            "context": state.context.shape,
            "text": branch.text.shape,
            "modulation": branch.modulation.shape[1:],
            "positions": state.positions.shape,
            "dt": (),
        }
        key = tuple(shapes.values())
        if key not in self._buckets:
            context = self._context("transformer")
            context.set_shapes(shapes)
            self._buckets[key] = Bucket(
                context, self._stream, shapes, record=self.library == "tensorrt"
            )
        self._buckets.move_to_end(key)
        while len(self._buckets) > _BUCKETS:
            self._stream.wait()
            self._buckets.popitem(last=False)
        return self._buckets[key]
