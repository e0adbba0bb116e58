"""The process that compiles one graph: ``compiler.py MODULE``, a job on stdin, events on stdout.

A process of its own, so that a compiler that crashes or runs out of memory takes nothing along,
that stopping it is always possible, and that what it allocated is gone when it ends. It imports the
engine library and nothing of ours but ``plugin.py``.

Job, one JSON object: ``graph`` (ONNX file), ``engine`` and ``log`` (files to write), ``profile``
(input -> least, usual, greatest shape), ``target`` (``sm_120``, or None for the GPU in this
machine), ``level`` (of optimisation), ``timing_cache`` (file, or None), ``decomposable`` (may
attention that no fused kernel covers be taken apart, rather than refused), ``plugin`` (as
``plugin.register`` takes it, or None). Events, one JSON object a line: ``{"step": n}``,
``{"refused": [{"node", "operator", "message"}]}``, ``{"failed": message}``, ``{"done": bytes}``.
"""

import json
import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, TextIO

if TYPE_CHECKING:
    import tensorrt as trt
else:  # the two libraries have one interface; the job says which
    trt = import_module(sys.argv[1]) if __name__ == "__main__" else None


def main() -> None:
    """Compile what stdin says."""
    job = json.load(sys.stdin)
    with Path(job["log"]).open("w", encoding="utf-8") as log:
        _tell(_compile(job, log))


def _tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _compile(job: dict[str, Any], log: TextIO) -> dict[str, Any]:
    class Logger(trt.ILogger):
        """Writes the log file, and keeps errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity != trt.ILogger.VERBOSE:
                log.write(f"{severity.name}: {msg}\n")
            # After an error the library asks the GPU about it, which need not be there.
            real = "catchCudaError" not in msg
            if real and severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

    class Progress(trt.IProgressMonitor):
        """Tells every step, and stops the compiler when nobody listens any more."""

        def __init__(self) -> None:
            super().__init__()
            self.parent = os.getppid()
            self.steps = 0

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt
        ) -> None:
            log.write(f"PHASE: {phase_name} ({num_steps} steps)\n")

        def phase_finish(self, phase_name: str) -> None:
            log.flush()

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            self.steps += 1
            _tell({"step": self.steps})
            return os.getppid() == self.parent

    class Writer(trt.IStreamWriter):
        """The engine's file, so that no second copy of it is held."""

        def __init__(self) -> None:
            super().__init__()
            self.file = Path(job["engine"]).open("wb")  # noqa: SIM115 - closed below

        # The library calls it with other arguments than the signature that it publishes.
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return self.file.write(data)

    logger = Logger()
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job["plugin"]:
        flags |= _register_plugin(job["plugin"])
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if job["plugin"]:  # before the body of its name
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(job["graph"]):
        return {"refused": [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]}
    if job["plugin"] and not _has_plugins(network):
        return {"failed": "the parser took no node for the plugin"}
    if job["decomposable"]:
        _allow_decomposition(network)
    config = builder.create_builder_config()
    config.builder_optimization_level = job["level"]
    progress, writer = Progress(), Writer()
    config.progress_monitor = progress
    config.add_optimization_profile(_profile(builder, network, job["profile"]))
    if job["target"] is not None:
        _set_target(config, job["target"])
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    if cache is not None:
        config.set_timing_cache(
            config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), False
        )
    with writer.file:
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if not built:
        return {"failed": "; ".join(logger.errors[-3:]) or "no reason given"}
    if cache is not None:
        whole = cache.with_suffix(f".{os.getpid()}")
        whole.write_bytes(config.get_timing_cache().serialize())
        whole.replace(cache)
    return {"done": Path(job["engine"]).stat().st_size}


def _register_plugin(kernel: dict[str, Any]) -> int:
    """Make the plugin known; returns the network's flag for those with a kernel ahead of time."""
    spec = spec_from_file_location("plugin", Path(__file__).with_name("plugin.py"))
    assert spec is not None
    assert spec.loader is not None
    plugin = module_from_spec(spec)
    spec.loader.exec_module(plugin)
    plugin.register(trt, kernel)
    known: Any = trt.NetworkDefinitionCreationFlag  # TensorRT-RTX has no such flag
    return 1 << int(known.PREFER_AOT_PYTHON_PLUGINS)


def _has_plugins(network: "trt.INetworkDefinition") -> bool:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return any(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)


def _refusal(error: "trt.ParserError") -> dict[str, str]:
    """What the parser says about a node."""
    return {
        "node": error.node_name(),
        "operator": error.node_operator(),
        "message": " ".join(error.desc().split()),
    }


def _profile(
    builder: "trt.Builder", network: "trt.INetworkDefinition", shapes: dict[str, Any]
) -> "trt.IOptimizationProfile":
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            least, usual, most = (trt.Dims(shape) for shape in shapes[tensor.name])
            profile.set_shape(tensor.name, least, usual, most)
    return profile


def _allow_decomposition(network: "trt.INetworkDefinition") -> None:
    """Attention becomes matrix products and a softmax where the library has no kernel for it."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
            assert isinstance(layer, trt.IAttentionInputLayer)
            layer.attention.decomposable = True


def _set_target(config: "trt.IBuilderConfig", target: str) -> None:
    """Compile for a GPU that need not be here; TensorRT-RTX alone can."""
    rtx: Any = trt
    capability = getattr(rtx.ComputeCapability, target.upper().replace("_", ""))
    untyped: Any = config
    untyped.num_compute_capabilities = 1
    untyped.set_compute_capability(capability, 0)


if __name__ == "__main__":
    main()
