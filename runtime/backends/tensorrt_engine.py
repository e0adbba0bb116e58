"""One engine of TensorRT or TensorRT-RTX, and the contexts that run it.

The two libraries have one interface; what only TensorRT-RTX has is in ``tensorrt_rtx.py``. A
context runs in memory that it is given, since only one of a model's engines runs at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsInt, TypeVar

from ..engines import LIBRARIES, check_shapes
from ..errors import BackendUnavailableError, EngineMismatchError, KontextError

if TYPE_CHECKING:
    import tensorrt as trt

    from .tensorrt_rtx import Kernels

P = ParamSpec("P")
T = TypeVar("T")
Address = int
Shape = tuple[int, ...]


def import_library(library: str) -> Any:
    """The module of an engine library. Raises BackendUnavailableError if it does not import."""
    try:
        return import_module(LIBRARIES[library])
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"expected {library} to run its engines, found: {error}; "
            f"install it with: pip install 'fluxkontext[{library}]'"
        ) from None


@cache
def start(library: str) -> "tuple[trt.Runtime, list[str]]":
    """The library's runtime, and the list that its errors go to. One a process: the library keeps
    the first logger that it is given, so that this one must stay."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = import_library(library)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

    logger = Logger()
    return trt.Runtime(logger), logger.errors


class Engine:
    """An engine in GPU memory, from a file of a bundle that was verified."""

    def __init__(
        self, library: str, file: Path, name: str, profile: Mapping[str, Any], kernels: Path
    ) -> None:
        """profile: input -> least, usual and greatest shape, as in the manifest. kernels: the file
        of those that TensorRT-RTX compiles."""
        self.library = library
        self.name = name
        self.profile = profile
        runtime, self.errors = start(library)
        known = len(self.errors)
        try:
            opened = _open(library, file)
        except RuntimeError as error:  # of the library's own reader, which opens the driver
            raise BackendUnavailableError(
                f"{file}: expected a CUDA driver to load it with, found: {error}"
            ) from None
        with opened as reader:
            engine = runtime.deserialize_cuda_engine(reader)
        if engine is None:
            raise EngineMismatchError(
                f"{file}: expected an engine that this {library} and GPU take, found: "
                f"{_last(self.errors[known:])}; build it anew with: fluxkontext build"
            )
        self.engine: trt.ICudaEngine = engine
        self.kernels: Kernels | None = None
        if library == "tensorrt-rtx":
            from . import tensorrt_rtx

            self.kernels = tensorrt_rtx.Kernels(engine, kernels)

    @property
    def memory(self) -> int:
        """Bytes that a context needs while it runs."""
        return self.engine.device_memory_size_v2

    def context(self, memory: Address, size: int) -> "Context":
        """A context that runs in ``size`` bytes at ``memory``."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = import_library(self.library)
        if self.kernels:
            context = self.ask("a context", self.kernels.context)
        else:
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self.ask("a context", self.engine.create_execution_context, strategy)
        context.set_device_memory(memory, size)
        return Context(self, context)

    def ask(self, what: str, call: Callable[P, T | None], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``call`` of the library gives. Raises KontextError with the library's reason if that
        is nothing, or False."""
        known = len(self.errors)
        answer = call(*args, **kwargs)
        if not answer:
            raise KontextError(f"{self.name}: expected {what}, found: {_last(self.errors[known:])}")
        return answer


class Context:
    """An engine with shapes and addresses set, ready to run."""

    def __init__(self, engine: Engine, context: "trt.IExecutionContext") -> None:
        self.context = context  # before its engine, so that it goes first
        self.engine = engine

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Say how large each input is. Raises EngineMismatchError outside the engine's profile."""
        check_shapes(self.engine.name, self.engine.profile, shapes)
        for name, shape in shapes.items():
            self.engine.ask(f"{name} of shape {shape}", self.context.set_input_shape, name, shape)

    def shape(self, name: str) -> Shape:
        """The shape of an output, once those of the inputs are set."""
        return tuple(self.context.get_tensor_shape(name))

    def set_addresses(self, addresses: Mapping[str, Address]) -> None:
        """Say where inputs are and where outputs go."""
        for name, address in addresses.items():
            what = f"an address for {name}"
            self.engine.ask(what, self.context.set_tensor_address, name, address)

    def run(self, stream: int) -> None:
        """Put one run into a CUDA stream."""
        self.engine.ask("it to run", self.context.execute_async_v3, stream)


def _last(errors: Sequence[str]) -> str:
    """The last of the library's errors, cut short."""
    return errors[-1][:300] if errors else "no reason given"


def _open(library: str, file: Path) -> Any:
    """A reader of ``file`` for the library, so that the host holds no copy of the whole engine."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = import_library(library)

    class Reader(trt.IStreamReaderV2):
        def __init__(self) -> None:
            super().__init__()
            self.file = file.open("rb")

        # The library calls these with other arguments than the signatures it publishes.
        def read(self, num_bytes: int, stream: int) -> bytes:  # type: ignore[override]
            return self.file.read(num_bytes)

        def seek(self, offset: SupportsInt, where: "trt.SeekPosition") -> bool:
            self.file.seek(int(offset), int(where))
            return True

        def __enter__(self) -> "Reader":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    return Reader()
