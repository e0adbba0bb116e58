"""What only TensorRT-RTX has: kernels that it compiles where they run, and keeps in a cache."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import whole_file
from .tensorrt_engine import import_library

if TYPE_CHECKING:
    import tensorrt_rtx as rtx

_log = logging.getLogger(__name__)


class Kernels:
    """What is compiled for one engine: for every shape, by all of its contexts."""

    def __init__(self, engine: "rtx.ICudaEngine", file: Path) -> None:
        """file: what an earlier process compiled; the library refuses kernels of another version or
        GPU, and compiles anew."""
        self.engine = engine
        self.file = file
        self.cache = engine.create_runtime_config().create_runtime_cache()
        with suppress(OSError):
            self.cache.deserialize(file.read_bytes())

    def context(self) -> "rtx.IExecutionContext | None":
        """A context in memory of its user's, which records its work as CUDA graphs by itself."""
        if TYPE_CHECKING:
            import tensorrt_rtx as rtx
        else:
            rtx = import_library("tensorrt-rtx")
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.set_runtime_cache(self.cache)
        return self.engine.create_execution_context(config)

    def save(self) -> None:
        """Keep them for the next process, if the library gives them and they can be written."""
        try:
            data = self.cache.serialize()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.file) as file:
                file.write(data)
        except Exception as error:  # whatever it is: they can be compiled anew
            _log.info("%s: compiled kernels are not kept: %s", self.file, error)
