"""Type-check what calls TensorRT and TensorRT-RTX against their real bindings, without a GPU.

Both publish compiled bindings without type information. Here stubs are made from them with
pybind11-stubgen in a temporary folder (the wheels' licence forbids to pass on what is derived from
them), and mypy --strict runs on our files against each library's.

Usage: tensorrt_types.py [--python PYTHON]: an environment with mypy, pip, cuda-bindings and the
TensorRT-RTX wheels. Needs gcc, readelf, and the package index.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bindings import run, unpack

ROOT = Path(__file__).resolve().parents[1]
STUBGEN = "pybind11-stubgen==2.5.5"
SHARED = ("runtime/backends/tensorrt_engine.py", "export/engines/compiler.py")
"""Run on either library."""
ONLY_TENSORRT = ("export/engines/plugin.py",)
ONLY_RTX = ("runtime/backends/tensorrt_rtx.py",)
PUBLIC = re.compile(r"@public_api\(\)\n\s*(?:def|class) (\w+)")
ENUMS = {
    "DataType": "",
    "EngineStat": "",
    "PluginFieldType": "",
    "ExecutionContextAllocationStrategy": "",
    "Severity": ".ILogger",
}
"""Enumerations that are default values; the generator has to be told where they are."""


PLANTED = """
import tensorrt as trt

def mistaken(
    config: trt.IBuilderConfig, engine: trt.ICudaEngine, context: trt.IExecutionContext
) -> None:
    config.set_flag(trt.BuilderFlag.FP16)
    print(engine.device_memory_size)
    context.execute_async_v3(stream=0)
"""
"""A flag and a property that are gone, and a parameter of another name: each has to be found."""
PLANTED_PLUGIN = """
import tensorrt.plugin as trtp

def mistaken_too(x: trtp.TensorDesc) -> None:
    trtp.KernelLaunchParams(grid=x.shape_expr[0])
    print(x.shape_exprs)
"""
"""Names that the plugin's own classes do not have."""


def main() -> int:
    """Check against both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = folder / "tools"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run(*pip, "install", "--no-deps", "--target", str(tools), STUBGEN)
        unpack(python, folder / "wheel")
        codes = []
        for library, package, module, path, files in (
            (
                "TensorRT",
                "tensorrt_bindings",
                "tensorrt",
                [folder / "wheel"],
                SHARED + ONLY_TENSORRT,
            ),
            ("TensorRT-RTX", "tensorrt_rtx_bindings", "tensorrt_rtx", [], SHARED + ONLY_RTX),
        ):
            stubs = folder / module
            make_stubs(python, package, module, [tools, *path], stubs)
            codes.append(check(python, stubs, files))
            verdict = "differ" if codes[-1] else "agree"
            sys.stdout.write(f"{library}: {', '.join(files)}: types {verdict}\n")
    return max(codes)


def make_stubs(python: str, package: str, module: str, path: list[Path], out: Path) -> None:
    """Stubs of ``package``, under the name ``tensorrt`` and, for TensorRT-RTX, its own too."""
    options = [
        f"--enum-class-locations={enum}:{package}.{module}{owner}" for enum, owner in ENUMS.items()
    ]
    generated = out / "generated"
    environment = {"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [
            python,
            *("-m", "pybind11_stubgen", package, "--print-invalid-expressions-as-is"),
            *(*options, "-o", str(generated)),
        ],
        env=environment,
        capture_output=True,
        check=True,
    )
    text = (generated / package / f"{module}.pyi").read_text(encoding="utf-8")
    stubs = out / "stubs"
    stubs.mkdir()
    (stubs / "tensorrt_rtx.pyi").write_text("from tensorrt import *\n", "utf-8")
    folder = stubs / "tensorrt"
    folder.mkdir()
    (folder / "__init__.pyi").write_text(repaired(text, f"{package}.{module}"), "utf-8")
    for sources in (entry / package / "plugin" for entry in path):
        if sources.is_dir():  # Python, whose public names are set while it is imported
            shutil.copytree(sources, folder / "plugin")
            (folder / "plugin" / "__init__.py").unlink()
            lines = [
                f"from .{file.stem} import {name} as {name}\n"
                for file in sorted(sources.glob("_*.py"))
                for name in PUBLIC.findall(file.read_text(encoding="utf-8"))
            ]
            (folder / "plugin" / "__init__.pyi").write_text("".join(lines), "utf-8")


def repaired(text: str, module: str) -> str:
    """A stub that mypy reads: what pybind11 wrote before it knew all types, in Python's words."""
    text = text.replace(f"{module}.", "")
    text = re.sub(r"nvinfer1::(?:v_\d_\d::)?|nvonnxparser::", "", text)
    text = re.sub(r"\bI(ParserError|Builder)\b", lambda found: found[1], text)
    text = re.sub(r"detail::accessor<[^>]*>", "typing.Any", text)
    text = re.sub(r"\bin: (?=collections|list)", "in_: ", text)
    # Classes named like builtins, by members named so (`DataType.BOOL` is exported as `bool`).
    text = re.sub(r"(?<![\w.\"])bool(?=[\s,)\]:|]|$)(?!\s*=|:)", "builtins.bool", text, flags=re.M)
    text = re.sub(r"(\w+: [\w.]+) = None", r"\1 | None = None", text)
    # Defaults before parameters that have none.
    text = re.sub(r"(def \w+\(.*= [^,()]+, \w+: [\w.|\[\], ]+)(\) ->)", r"\1 = ...\2", text)
    # What the generator cannot see: the buffer protocol, and iteration by index.
    for name, method in (
        ("IHostMemory", "__buffer__(self, flags: int, /) -> memoryview"),
        ("Dims", "__iter__(self) -> typing.Iterator[int]"),
    ):
        text = re.sub(rf"^(class {name}\b.*:\n)", rf"\1    def {method}: ...\n", text, flags=re.M)
    return text.replace("import typing\n", "import builtins\nimport typing\n", 1)


def check(python: str, stubs: Path, files: tuple[str, ...]) -> int:
    """Run mypy on our files against the stubs; errors inside the stubs do not count."""
    namespace = stubs / "namespace"
    namespace.mkdir()
    (namespace / "fluxkontext").symlink_to(ROOT)
    config = stubs / "mypy.ini"
    config.write_text(
        "[mypy]\n"
        f"mypy_path = {namespace}:{stubs / 'stubs'}\n"
        "explicit_package_bases = true\nstrict = true\n"
        "follow_imports = silent\n"
        # what the library calls has other arguments than its signatures say
        "warn_unused_ignores = false\n"
        # tensorrt.plugin is Python, some of it without types
        "untyped_calls_exclude = tensorrt\n"
        "[mypy-fluxkontext.export.engines.plugin]\ndisallow_untyped_decorators = false\n"
        "[mypy-tensorrt.*,tensorrt_rtx.*]\nignore_errors = true\n"
        "[mypy-safetensors.*,tqdm.*]\nignore_missing_imports = true\n"
    )
    modules = [f"fluxkontext.{file.removesuffix('.py').replace('/', '.')}" for file in files]
    arguments = [argument for module in modules for argument in ("-m", module)]
    mypy = [python, "-P", "-m", "mypy", "--config-file", str(config)]
    planted = PLANTED + (PLANTED_PLUGIN if ONLY_TENSORRT[0] in files else "")
    (stubs / "planted.py").write_text(planted)
    found = subprocess.run(
        [*mypy, "planted.py"], cwd=stubs, capture_output=True, text=True, check=False
    ).stdout
    wanted = 3 if planted == PLANTED else 5
    assert found.count(" error: ") == wanted, f"the stubs do not tell right from wrong:\n{found}"
    return subprocess.run([*mypy, *arguments], cwd=stubs, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
