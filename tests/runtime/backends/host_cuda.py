"""The GPU of the TensorRT backend, played by the host: memory is the host's, a stream runs at once.

What the backend does with addresses, sizes, order and recorded runs is then what is tested: freed
memory is overwritten and never given out again, what copies and engines read and write on the GPU
lies inside memory that is there, and what is recorded runs when it is launched and not before.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

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
        self.freed: list[np.ndarray[Any, Any]] = []  # held, so that no address is given out twice
        self.recording: list[Callable[[], object]] | None = None
        self.launches = 0

    def do(self, work: Callable[[], object]) -> None:
        """Run work of a stream, or record it."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def view(self, address: int, size: int) -> "ctypes.Array[ctypes.c_char]":
        """Memory of the GPU, which has to lie inside one block that was not freed."""
        inside = any(
            start <= address and address + size <= start + len(block)
            for start, block in self.blocks.items()
        )
        assert inside, (
            f"expected {size} bytes of one block at {address:#x}, found none that is there"
        )
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
        block = self.blocks.pop(address)
        block.fill(0xFF)
        self.freed.append(block)
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

    def cudaMemcpy(self, to: int, of: int, size: int, kind: Any) -> tuple[Any, ...]:
        kinds = self.cudaMemcpyKind
        if kind in (kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToDevice):
            self.view(to, size)
        if kind in (kinds.cudaMemcpyDeviceToHost, kinds.cudaMemcpyDeviceToDevice):
            self.view(of, size)
        ctypes.memmove(to, of, size)
        return OK

    def cudaMemcpyAsync(self, to: int, of: int, size: int, kind: Any, _: int) -> tuple[Any, ...]:
        self.do(lambda: self.cudaMemcpy(to, of, size, kind))
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
