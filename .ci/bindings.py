"""TensorRT's own bindings, to look at where there is no GPU and no TensorRT.

Its library is several gigabytes, so they are imported over empty libraries that have the few
symbols they ask for.
"""

import re
import subprocess
import zipfile
from pathlib import Path

BINDINGS = "tensorrt-cu13-bindings==11.4.0.106"
NATIVE = {
    "libnvinfer": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL "
    "createInferRuntime_INTERNAL getBuilderPluginRegistry getPluginRegistry",
    "libnvinfer_plugin": "initLibNvInferPlugins",
    "libnvonnxparser": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL "
    "getNvOnnxParserVersion",
}
"""The functions that the bindings import from each library; none is called here."""


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command that has to succeed."""
    subprocess.run(command, check=True, env=env)


def unpack(python: str, out: Path) -> None:
    """Put the package ``tensorrt_bindings`` in the folder ``out``, such that it can be imported."""
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "download", "--no-deps", "--dest", str(out), BINDINGS)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    pretend_libraries(out / "tensorrt_bindings")


def pretend_libraries(folder: Path) -> None:
    """Put libraries of the names that the bindings need beside them."""
    listed = subprocess.run(
        ["readelf", "--dynamic", str(folder / "tensorrt.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for file, library in re.findall(r"\[((libnv\w+)\.so\.\d+)\]", listed):
        source = folder / f"{library}.c"
        lines = [f"void *{name}(void) {{ return 0; }}\n" for name in NATIVE[library].split()]
        source.write_text("".join(lines))
        soname = f"-Wl,-soname,{file}"
        run("gcc", "-shared", "-fPIC", str(source), "-o", str(folder / file), soname)
