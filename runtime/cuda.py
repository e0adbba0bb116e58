"""CUDA without torch: devices, memory, a stream and recorded graphs, by cuda-bindings.

Works on the primary context, which torch uses too when it is there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from .engines import Gpu
from .errors import (
    BackendUnavailableError,
    InvalidInputError,
    KontextError,
    OutOfMemoryError,
)

_OUT_OF_MEMORY = cudart.cudaError_t.cudaErrorMemoryAllocation


def check(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda-bindings, which returns ``(status, *values)``; errors as ours."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        reason = f"{status.name}: {text.decode()}"
        if status == _OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"expected enough memory on the GPU, found {reason}; use a smaller size or batch"
            )
        raise KontextError(f"expected CUDA to work, found {reason}")
    return values[0] if len(values) == 1 else values


def gpus() -> list[Gpu]:
    """The GPUs of this machine. Raises BackendUnavailableError with CUDA's reason if none work."""
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        raise BackendUnavailableError(
            f"expected an NVIDIA GPU and its driver, found none ({status.name})"
        )
    return [_gpu(index) for index in range(count)]


def _gpu(index: int) -> Gpu:
    facts = check(cudart.cudaGetDeviceProperties(index))
    return Gpu(
        facts.name.decode(),
        f"sm_{facts.major}{facts.minor}",
        facts.multiProcessorCount,
        facts.totalGlobalMem,
    )


def driver_version() -> str:
    """The highest CUDA version that the driver supports, as ``13.0``."""
    number: int = check(cudart.cudaDriverGetVersion())
    return f"{number // 1000}.{number % 1000 // 10}"


class Buffer:
    """Memory on the GPU with a shape and a type; freed with the object, or by ``free``.

    Has ``__cuda_array_interface__``, so torch, CuPy and PyCUDA read it without a copy.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.size: int = int(np.prod(shape)) * self.dtype.itemsize
        # An engine wants an address even of a tensor that is empty.
        self.address = int(check(cudart.cudaMalloc(max(self.size, 1))))

    def part(self, index: int) -> int:
        """The address of one entry along the first axis."""
        return self.address + index * (self.size // self.shape[0])

    def free(self) -> None:
        """Give the memory back; harmless the second time."""
        address, self.address = self.address, 0
        if address:
            check(cudart.cudaFree(address))

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            cudart.cudaFree(self.address)  # not checked: the process may be ending

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
        }


def to_host(array: Any) -> NDArray[Any]:
    """A copy of an array with ``__cuda_array_interface__`` (version 2 or 3), whoever made it.

    Waits for all work of the device first. Raises InvalidInputError for one that is not laid out
    as C does, or masked.
    """
    facts = array.__cuda_array_interface__
    copy = np.empty(facts["shape"], facts["typestr"])
    strides = facts.get("strides")
    if facts.get("mask") is not None or (strides is not None and tuple(strides) != copy.strides):
        raise InvalidInputError(
            f"expected an array on the GPU that is dense and in C's order, found strides {strides}"
            "; make a copy of it that is"
        )
    if copy.size:
        check(cudart.cudaDeviceSynchronize())
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpy(copy.ctypes.data, facts["data"][0], copy.nbytes, kind))
    return copy


class Stream:
    """A stream: everything that it is given runs in order."""

    def __init__(self, device: int) -> None:
        check(cudart.cudaSetDevice(device))
        self.device = device
        self.handle = int(check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))

    def enter(self) -> None:
        """Make its device that of the calling thread."""
        check(cudart.cudaSetDevice(self.device))

    def put(self, array: NDArray[Any]) -> Buffer:
        """Copy an array to the GPU."""
        array = np.ascontiguousarray(array)
        buffer = Buffer(array.shape, array.dtype)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array into a buffer of its shape; returns when the array may change again."""
        array = np.ascontiguousarray(array, buffer.dtype)
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(
            cudart.cudaMemcpyAsync(
                buffer.address, array.ctypes.data, buffer.size, kind, self.handle
            )
        )
        self.wait()

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """Copy a buffer to the host."""
        array = np.empty(buffer.shape, buffer.dtype)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(
            cudart.cudaMemcpyAsync(
                array.ctypes.data, buffer.address, buffer.size, kind, self.handle
            )
        )
        self.wait()
        return array

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes on the GPU, from address to address."""
        if size:
            kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            check(cudart.cudaMemcpyAsync(target, source, size, kind, self.handle))

    def wait(self) -> None:
        """Return when everything is done."""
        check(cudart.cudaStreamSynchronize(self.handle))

    def record(self, work: Callable[[], None]) -> "Graph":
        """What ``work`` gives the stream, as a graph; it runs when the graph is launched."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        except BaseException:
            cudart.cudaStreamEndCapture(self.handle)  # leaves capture; what it returns is invalid
            raise
        graph = check(cudart.cudaStreamEndCapture(self.handle))
        try:
            return Graph(self, check(cudart.cudaGraphInstantiate(graph, 0)))
        finally:
            check(cudart.cudaGraphDestroy(graph))

    def close(self) -> None:
        """Wait, and give the stream back."""
        self.wait()
        check(cudart.cudaStreamDestroy(self.handle))


class Graph:
    """Recorded work of a stream."""

    def __init__(self, stream: Stream, handle: Any) -> None:
        self.stream = stream
        self.handle = handle

    def launch(self) -> None:
        """Run it in the stream's order."""
        check(cudart.cudaGraphLaunch(self.handle, self.stream.handle))

    def __del__(self) -> None:
        cudart.cudaGraphExecDestroy(self.handle)
