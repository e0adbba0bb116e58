"""What only TensorRT-RTX has: kernels that it compiles where they run, and keeps in a cache."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import whole_file
from .tensorrt_engine import import_library

if TYPE_CHECKING:
    import tensorrt_rtx as rtx


def create_context(engine: "rtx.ICudaEngine", cache_file: Path) -> "rtx.IExecutionContext | None":
    """A context in memory of its user's, which records its work as CUDA graphs by itself.

    cache_file: kernels that an earlier process compiled; the library refuses those of another
    version or GPU, and compiles anew.
    """
    if TYPE_CHECKING:
        import tensorrt_rtx as rtx
    else:
        rtx = import_library("tensorrt-rtx")
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache = config.create_runtime_cache()
    if cache_file.exists():
        cache.deserialize(cache_file.read_bytes())
    config.set_runtime_cache(cache)
    return engine.create_execution_context(config)


def save_cache(context: "rtx.IExecutionContext", cache_file: Path) -> None:
    """Keep the kernels that ``context`` has compiled, if the folder can be written."""
    data = context.get_runtime_config().get_runtime_cache().serialize()
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(cache_file) as file:
            file.write(data)
    except OSError:
        return
