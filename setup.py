"""Packaging: the four folders below are sub-packages of the namespace ``fluxkontext``.

There is no root ``__init__.py``; every other tool's settings are in ``pyproject.toml``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.findall(r'VERSION = "(.+)"', (HERE / "runtime" / "about.py").read_text("utf-8"))[0]
ROOTS = ("kernels", "runtime", "export", "bench")

CORE = [
    "numpy>=1.26,<3",
    "pillow>=10.3,<14",
    "safetensors>=0.5,<1",
    "tokenizers>=0.21,<0.24",
    "tqdm>=4.66,<5",
]

# The frontends of these wheels only re-export the bindings, and have to be built.
TENSORRT_RTX = [
    "tensorrt-rtx-cu13-libs>=1.7,<1.8",
    "tensorrt-rtx-cu13-bindings>=1.7,<1.8",
    "cuda-bindings>=13,<14",
]

EXTRAS = {
    # These two wheels hold the same module and overwrite each other: never install both.
    "cpu": [
        "onnxruntime>=1.22,<2",
    ],
    "gpu": [
        "onnxruntime-gpu[cuda,cudnn]>=1.22,<2",
    ],
    "tensorrt": [
        "tensorrt-cu13-libs>=11.4,<11.5",
        "tensorrt-cu13-bindings>=11.4,<11.5",
        "cuda-bindings>=13,<14",
    ],
    "tensorrt-rtx": TENSORRT_RTX,
    "torch": [
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; sys_platform == 'linux'"
        " and (platform_machine == 'x86_64' or platform_machine == 'aarch64')",
    ],
    "export": [
        "onnx>=1.19,<2",
        "onnxscript>=0.7,<0.8",
        "onnx-ir>=1,<2",
        "ml-dtypes>=0.5,<1",
    ],
    "bench": [
        "jsonschema>=4.23,<5",
        "matplotlib>=3.10,<4",
        "nvidia-ml-py>=12.575",
        "pytest-benchmark>=5.1,<6",
    ],
    # diffusers and transformers are peers that results are compared with: nothing shipped imports
    # them. TensorRT-RTX's compiler needs no GPU, and so builds real engines. Formatter and type
    # checker keep to one minor version, so that their verdict is stable.
    "test": [
        "build>=1.2,<2",
        "diffusers>=0.42,<0.43",
        "hypothesis>=6.130,<7",
        "jsonschema>=4.23,<5",
        "matplotlib>=3.10,<4",
        "mypy>=2.4,<2.5",
        "pytest>=9,<10",
        "pytest-benchmark>=5.1,<6",
        "ruff>=0.17,<0.18",
        "transformers>=5.20,<6",
        *(f"{it}; sys_platform == 'linux' and platform_machine == 'x86_64'" for it in TENSORRT_RTX),
    ],
}

PACKAGE_DATA = {f"fluxkontext.{root}": ["py.typed"] for root in ROOTS}
PACKAGE_DATA["fluxkontext.bench"].append("document.schema.json")
PACKAGE_DATA["fluxkontext.export"] += ["manifest.schema.json", "scene.png"]
PACKAGE_DATA["fluxkontext.bench.report"] = ["style.css"]
# The trained miniature, a bundle: whatever files it has.
MINI = HERE / "runtime" / "mini"
PACKAGE_DATA["fluxkontext.runtime"] += [
    file.relative_to(MINI.parent).as_posix() for file in sorted(MINI.rglob("*")) if file.is_file()
]

setup(
    name="fluxkontext",
    version=VERSION,
    description="A production runtime for FLUX.1 Kontext image editing",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
    ],
    package_dir={f"fluxkontext.{root}": root for root in ROOTS},
    packages=[
        f"fluxkontext.{package}"
        for package in find_packages(
            ".", include=[pattern for root in ROOTS for pattern in (root, f"{root}.*")]
        )
    ],
    package_data=PACKAGE_DATA,
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fluxkontext = fluxkontext.runtime.cli:main"]},
)
