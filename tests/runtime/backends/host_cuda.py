"""The GPU of the TensorRT backend, played by the host: memory is the host's, a stream runs at once,
and an engine is the same component's graph in ONNX Runtime.

What the backend does with addresses, sizes, order and recorded runs is then what is tested: freed
memory is overwritten, a copy has to lie inside memory that is there, and what is recorded runs when
it is launched and not before.
"""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from cuda.bindings import runtime as real

from fluxkontext.runtime.contract import GRAPHS
from fluxkontext.runtime.engines import check_shapes

OK = (real.cudaError_t.cudaSuccess,)
GPU = "Played GPU"


class HostCuda:
    """Stands in for ``cuda.bindings.runtime``."""

    cudaError_t = real.cudaError_t
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0

    def do(self, work: Callable[[], None]) -> None:
        """Run work of a stream, or record it."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def view(self, address: int, size: int) -> "ctypes.Array[ctypes.c_char]":
        """Memory that was allocated here, or an array's of the host, unless it is the wrong one."""
        for start, block in self.blocks.items():
            if start <= address < start + len(block):
                assert address + size <= start + len(block), "beyond the end of a block"
        return (ctypes.c_char * size).from_address(address)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (*OK, 1)

    def cudaGetDeviceProperties(self, _: int) -> tuple[Any, ...]:
        facts = {"name": GPU.encode(), "major": 12, "minor": 0, "multiProcessorCount": 1}
        return (*OK, SimpleNamespace(**facts, totalGlobalMem=2**30))

    def cudaSetDevice(self, _: int) -> tuple[Any, ...]:
        return OK

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        block = np.full(size, 0xFF, np.uint8)  # NaN, read as a float
        self.blocks[block.ctypes.data] = block
        return (*OK, block.ctypes.data)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.blocks.pop(address).fill(0xFF)
        return OK

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Any, ...]:
        return (*OK, 1)

    def cudaStreamSynchronize(self, _: int) -> tuple[Any, ...]:
        assert self.recording is None, "a stream that records cannot be waited for"
        return OK

    def cudaStreamDestroy(self, _: int) -> tuple[Any, ...]:
        return OK

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        assert self.recording is None, "a device that records cannot be waited for"
        return OK

    def cudaMemcpy(self, to: int, of: int, size: int, _: Any) -> tuple[Any, ...]:
        ctypes.memmove(self.view(to, size), self.view(of, size), size)
        return OK

    def cudaMemcpyAsync(self, to: int, of: int, size: int, *_: Any) -> tuple[Any, ...]:
        def copy() -> None:
            ctypes.memmove(self.view(to, size), self.view(of, size), size)

        self.do(copy)
        return OK

    def cudaStreamBeginCapture(self, *_: Any) -> tuple[Any, ...]:
        self.recording = []
        return OK

    def cudaStreamEndCapture(self, _: int) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        return (*OK, recorded)

    def cudaGraphInstantiate(self, graph: Any, _: int) -> tuple[Any, ...]:
        return (*OK, list(graph))

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        graph.clear()
        return OK

    def cudaGraphLaunch(self, graph: Any, _: int) -> tuple[Any, ...]:
        self.launches += 1
        for work in graph:
            work()
        return OK

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        graph.clear()
        return OK


class HostEngine:
    """Stands in for ``tensorrt_engine.Engine``, and for its contexts."""

    memory = 256

    def __init__(self, cuda: HostCuda, file: Path, name: str, profile: Mapping[str, Any]) -> None:
        graph = file.parents[2] / f"{name}.cpu.onnx"
        self.cuda, self.name, self.profile = cuda, name, profile
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def context(self, memory: int, size: int, _: Path) -> "HostEngine":
        """One that shares the session."""
        assert memory % 16 == 0
        assert size >= self.memory
        made = HostEngine.__new__(HostEngine)
        made.__dict__ = {**self.__dict__, "shapes": {}, "addresses": {}}
        return made

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        check_shapes(self.name, self.profile, shapes)
        assert set(shapes) == set(GRAPHS[self.name][0])
        self.shapes = dict(shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        zeros = {
            key: np.zeros(shape, GRAPHS[self.name][0][key].dtype)
            for key, shape in self.shapes.items()
        }
        return tuple(self.session.run([name], zeros)[0].shape)

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        self.addresses = dict(addresses)

    def run(self, _: int) -> None:
        """Read the inputs where they are, and write the outputs where they go."""
        inputs, outputs = GRAPHS[self.name]
        assert set(self.addresses) == {*inputs, *outputs}

        def work() -> None:
            given = {}
            for key, shape in self.shapes.items():
                kind = np.dtype(inputs[key].dtype)
                size = int(np.prod(shape)) * kind.itemsize
                held = self.cuda.view(self.addresses[key], size)
                given[key] = np.frombuffer(held, kind).reshape(shape).copy()
            for key, value in zip(outputs, self.session.run(list(outputs), given), strict=True):
                value = np.ascontiguousarray(value)
                place = self.cuda.view(self.addresses[key], value.nbytes)
                ctypes.memmove(place, value.ctypes.data, value.nbytes)

        self.cuda.do(work)
