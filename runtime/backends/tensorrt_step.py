"""One step of the denoising loop on engines: buffers at fixed addresses, and its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

from ..contract import GRAPHS
from ..cuda import Buffer, Graph, Stream
from ..geometry import Size
from .tensorrt_engine import Context, Shape


@dataclass(frozen=True)
class Branch:
    """One conditioning of a batch: ``modulation [N, R, B, 1, D]``, ``text [B, S, D]`` and the steps
    ``dts [N]``, times its weight in true CFG."""

    modulation: Buffer
    text: Buffer
    dts: Buffer


@dataclass(frozen=True)
class State:
    """A batch in the making: ``latents [B, T, 4 C]``, ``context [B, C, 4 C]``."""

    latents: Buffer
    context: Buffer
    positions: Buffer
    branches: Sequence[Branch]
    target: Size


class Bucket:
    """The transformer's buffers for one shape of request, and its run.

    They hold the inputs of one state at a time; another's are copied in when its turn comes, and
    what a state must keep is its own. It is known by weak references: its memory goes when it ends.
    """

    def __init__(
        self, context: Context, stream: Stream, shapes: Mapping[str, Shape], record: bool
    ) -> None:
        """record: as a CUDA graph, at the second run; TensorRT-RTX does that by itself."""
        self.context = context
        self.stream = stream
        inputs, outputs = GRAPHS["transformer"]
        self.buffers = {
            **{name: Buffer(shapes[name], inputs[name].dtype) for name in inputs},
            **{name: Buffer(shapes["latents"], outputs[name].dtype) for name in outputs},
        }
        context.set_addresses({name: buffer.address for name, buffer in self.buffers.items()})
        self.record = record
        self.graph: Graph | None = None
        self.runs = 0
        self._state: ref[State] | None = None
        self._branch: ref[Branch] | None = None

    def fill(self, state: State, branch: Branch, i: int, sample: Buffer) -> None:
        """Copy in what step ``i`` of a state's branch needs and is not there yet."""
        if self._state is None or self._state() is not state:
            self._copy("context", state.context.address)
            self._copy("positions", state.positions.address)
            self._state = ref(state)
        if self._branch is None or self._branch() is not branch:
            self._copy("text", branch.text.address)
            self._branch = ref(branch)
        self._copy("latents", state.latents.address)
        self._copy("sample", sample.address)
        self._copy("modulation", branch.modulation.part(i))
        self._copy("dt", branch.dts.part(i))

    def _copy(self, name: str, source: int) -> None:
        self.stream.copy(self.buffers[name].address, source, self.buffers[name].size)

    def run(self) -> None:
        """Run the transformer. A first run outside a graph sets up what must not be recorded."""
        self.runs += 1
        if self.graph is None and self.record and self.runs == 2:
            self.graph = self.stream.record(lambda: self.context.run(self.stream.handle))
        if self.graph is not None:
            self.graph.launch()
        else:
            self.context.run(self.stream.handle)
