"""Run a bundle in a service of your own: no fluxkontext, no torch.

    python replay.py BUNDLE                             with numpy and onnxruntime
    python replay.py BUNDLE --engine tensorrt_bindings  with numpy, tensorrt and cuda-bindings
    python replay.py BUNDLE --engine tensorrt_rtx_bindings

It replays the bundle's golden edit and prints how far the pixels are off. :func:`edit` is the part
to copy; it takes either loader.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[..., dict[str, Any]]
"""(component, input=array, ...) -> its outputs by name."""


def edit(
    run: Run, clip: Any, t5: Any, pictures: list[Any], noise: Any, positions: Any, sigmas: Any
) -> Any:
    """Pixels ``[B, H, W, 3]`` uint8 of one edit.

    clip, t5: token ids int64 ``[tokens]``. pictures: contexts, uint8 ``[H, W, 3]``, sides multiples
    of 16. noise: ``[B, h * w, 64]`` of a target of h by w tokens (16 pixels a side). positions:
    int32 ``[tokens, 3]``, (0, row, column) of the target, then (1, row, column) of the first
    context ... sigmas: ``[steps + 1]``, falling from 1 to 0.
    """
    batch = len(noise)
    pooled = run("clip", ids=clip[None])["pooled"].repeat(batch, 0)
    text = run("t5", ids=t5[None])["text"].repeat(batch, 0)
    tokens = [run("vae_encoder", pixels=p[None])["context"].repeat(batch, 0) for p in pictures]
    context = np.concatenate([np.empty((batch, 0, noise.shape[2]), np.float32), *tokens], axis=1)
    guidance = np.array([2.5], np.float32)
    modulation = run("modulation", sigmas=sigmas[:-1], guidance=guidance, pooled=pooled)[
        "modulation"
    ]
    latents = noise
    for step in range(len(sigmas) - 1):
        latents = run(
            "transformer",
            latents=latents,
            sample=latents,
            context=context,
            text=text,
            modulation=modulation[step],
            positions=positions,
            dt=np.array(sigmas[step + 1] - sigmas[step], np.float32),
        )["next"]
    height, width = positions[: noise.shape[1], 1:].max(0) + 1
    grids = latents.reshape(batch, height, width, -1)
    return np.concatenate([run("vae_decoder", latents=grid[None])["pixels"] for grid in grids])


def onnx_runtime(bundle: Path, manifest: dict[str, Any]) -> Run:
    """The bundle's graphs for CPUs; each is loaded when it is first run."""
    import onnxruntime

    sessions: dict[str, Any] = {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def run(component: str, **inputs: Any) -> dict[str, Any]:
        if component not in sessions:
            graph = bundle / manifest["components"][component]["graphs"]["cpu"]
            providers = ["CPUExecutionProvider"]
            sessions[component] = onnxruntime.InferenceSession(graph, options, providers=providers)
        outputs = sessions[component].run(None, inputs)
        return dict(zip(manifest["components"][component]["outputs"], outputs, strict=True))

    return run


def chosen_set(manifest: dict[str, Any], name: str, target: str) -> dict[str, Any]:
    """The manifest's engines of a library for a GPU, such as ``sm_120``."""
    sets = [it for it in manifest.get("engines", {}).values() if it["library"] == name]
    for it in sets:
        if it["target"] == target:
            return dict(it)
    found = ", ".join(it["target"] for it in sets) or "none"
    sys.exit(
        f"expected engines of {name} for the {target} in this machine, found {found}; make them "
        f"with: fluxkontext build --engine {name} --target {target}"
    )


def engines(bundle: Path, manifest: dict[str, Any], library: str) -> Run:
    """The bundle's engines of a library for the first GPU. For brevity arrays come back to the host
    after every run; a service would leave latents on the GPU: what `next` is written to is the next
    step's input."""
    trt = import_module(library)
    cuda = import_module("cuda.bindings.runtime")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    contexts: dict[str, Any] = {}

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{function.__name__}: {status.name}")
        return values[0] if values else None

    gpu = call(cuda.cudaGetDeviceProperties, 0)
    name = library.removesuffix("_bindings").replace("_", "-")
    chosen = chosen_set(manifest, name, f"sm_{gpu.major}{gpu.minor}")
    stream = call(cuda.cudaStreamCreate)
    down, up = (
        cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
        cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
    )

    def run(component: str, **inputs: Any) -> dict[str, Any]:
        if component not in contexts:
            plan = (bundle / chosen["components"][component]["file"]).read_bytes()
            contexts[component] = runtime.deserialize_cuda_engine(plan).create_execution_context()
        context, held, outputs = contexts[component], [], {}

        def place(name: str, size: int) -> int:
            held.append(call(cuda.cudaMalloc, max(size, 1)))
            context.set_tensor_address(name, held[-1])
            return int(held[-1])

        for name, array in inputs.items():
            array = np.ascontiguousarray(array)
            context.set_input_shape(name, array.shape)
            at = place(name, array.nbytes)
            call(cuda.cudaMemcpy, at, array.ctypes.data, array.nbytes, down)
        for name, spec in manifest["components"][component]["outputs"].items():
            array = np.empty(tuple(context.get_tensor_shape(name)), spec["dtype"])
            outputs[name] = (array, place(name, array.nbytes))
        context.execute_async_v3(stream)
        call(cuda.cudaStreamSynchronize, stream)
        for array, at in outputs.values():
            call(cuda.cudaMemcpy, array.ctypes.data, at, array.nbytes, up)
        for address in held:
            call(cuda.cudaFree, address)
        return {name: array for name, (array, _) in outputs.items()}

    return run


def golden_edit(bundle: Path) -> dict[str, Any]:
    """The arrays of ``golden.safetensors``: the header's size, a JSON header, then the data."""
    file = bundle / "golden.safetensors"
    if not file.is_file():
        sys.exit(
            f"{file}: expected the golden edit, found none; make it as the bundle is made, with: "
            "fluxkontext export CHECKPOINT --golden -o BUNDLE"
        )
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    about = {name: json.loads(text) for name, text in header.pop("__metadata__").items()}
    kinds = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
    arrays = {
        name: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            kinds[entry["dtype"]],
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return {**about, **arrays}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="replay a bundle's golden edit")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", help="module of the engine library; default: ONNX Runtime")
    args = parser.parse_args()
    manifest = json.loads((args.bundle / "manifest.json").read_text(encoding="utf-8"))
    if args.engine:
        run = engines(args.bundle, manifest, args.engine)
    else:
        run = onnx_runtime(args.bundle, manifest)
    g = golden_edit(args.bundle)
    pictures = [g["picture"]] * g["contexts"]
    noise = g["latents"][0]
    pixels = edit(run, g["clip"], g["t5"], pictures, noise, g["positions"], g["sigmas"])
    worst = np.abs(pixels.astype(int) - g["pixels"]).max()
    print(f"{args.bundle}: {pixels.shape[0]} picture(s), at most {worst} levels of 255 off")


if __name__ == "__main__":
    main()
