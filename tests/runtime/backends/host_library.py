"""The engine libraries, played by the host: an engine is its component's graph in ONNX Runtime.

A run reads and writes the memory of the played GPU. As in TensorRT-RTX, what a run of a new shape
needs is compiled, unless the runtime cache that the context was made with holds it.
"""

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from fluxkontext.runtime.contract import GRAPHS

from .host_cuda import HostCuda


class HostLibrary:
    """Stands in for the module of an engine library, and for its ``Runtime``."""

    IStreamReaderV2 = object
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="memory of its user's")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    def __init__(self, cuda: HostCuda) -> None:
        self.cuda = cuda
        self.compiled: list[str] = []

    def Runtime(self, logger: Any) -> "HostLibrary":
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, reader: Any) -> "HostEngine":
        file = Path(reader.file.name)
        assert sum(map(len, iter(lambda: reader.read(2**16, 0), b""))) == file.stat().st_size
        return HostEngine(self, file.name.partition("-")[0], file.parents[2])


class HostEngine:
    """Stands in for ``ICudaEngine``."""

    device_memory_size_v2 = 256

    def __init__(self, library: HostLibrary, name: str, bundle: Path) -> None:
        self.library, self.name = library, name
        graph = bundle / f"{name}.cpu.onnx"
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def create_runtime_config(self) -> "HostConfig":
        return HostConfig()

    def create_execution_context(self, how: Any) -> "HostContext":
        """how: a strategy for TensorRT, a runtime config for TensorRT-RTX."""
        config = how if isinstance(how, HostConfig) else HostConfig(how)
        assert config.strategy == self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        return HostContext(self, config.cache)


class HostConfig:
    """Stands in for ``IRuntimeConfig``."""

    cuda_graph_strategy = None

    def __init__(self, strategy: str | None = None) -> None:
        self.strategy = strategy
        self.cache: HostCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "HostCache":
        return HostCache()

    def set_runtime_cache(self, cache: "HostCache") -> bool:
        self.cache = cache
        return True


class HostCache:
    """Stands in for ``IRuntimeCache``."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = json.loads(blob)
        return True

    def serialize(self) -> memoryview | None:
        return memoryview(json.dumps(self.kernels).encode())


class HostContext:
    """Stands in for ``IExecutionContext``."""

    def __init__(self, engine: HostEngine, cache: HostCache | None) -> None:
        self.library, self.name, self.session = engine.library, engine.name, engine.session
        self.cache = cache
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 16 == 0
        assert size >= HostEngine.device_memory_size_v2
        self.memory = address, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in GRAPHS[self.name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {
            key: np.zeros(shape, GRAPHS[self.name][0][key].dtype)
            for key, shape in self.shapes.items()
        }
        return tuple(self.session.run([name], zeros)[0].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return any(name in tensors for tensors in GRAPHS[self.name])

    def execute_async_v3(self, _: int) -> bool:
        """Read the inputs where they are, and write the outputs where they go."""
        inputs, outputs = GRAPHS[self.name]
        assert set(self.shapes) == set(inputs)
        assert set(self.addresses) == {*inputs, *outputs}
        cuda = self.library.cuda
        kernels = f"{self.name} {self.shapes}"
        if self.cache is not None and kernels not in self.cache.kernels:
            self.library.compiled.append(kernels)
            self.cache.kernels.append(kernels)

        def work() -> None:
            cuda.view(*self.memory)
            given = {}
            for key, shape in self.shapes.items():
                kind = np.dtype(inputs[key].dtype)
                size = int(np.prod(shape)) * kind.itemsize
                held = cuda.view(self.addresses[key], size)
                given[key] = np.frombuffer(held, kind).reshape(shape).copy()
            for key, value in zip(outputs, self.session.run(list(outputs), given), strict=True):
                value = np.ascontiguousarray(value)
                place = cuda.view(self.addresses[key], value.nbytes)
                ctypes.memmove(place, value.ctypes.data, value.nbytes)

        cuda.do(work)
        return True
