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

EXTRAS = {
    # These two wheels hold the same module and overwrite each other: never install both.
    "cpu": [
        "onnxruntime>=1.22,<2",
    ],
    "gpu": [
        "onnxruntime-gpu[cuda,cudnn]>=1.22,<2",
    ],
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
    # diffusers and transformers are peers that results are compared with: nothing shipped imports
    # them. Formatter and type checker keep to one minor version, so that their verdict is stable.
    "test": [
        "build>=1.2,<2",
        "diffusers>=0.42,<0.43",
        "hypothesis>=6.130,<7",
        "mypy>=2.4,<2.5",
        "pytest>=9,<10",
        "ruff>=0.17,<0.18",
        "transformers>=5.20,<6",
    ],
}

PACKAGE_DATA = {f"fluxkontext.{root}": ["py.typed"] for root in ROOTS}

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
