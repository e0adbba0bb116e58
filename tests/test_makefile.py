"""The Makefile's commands for a machine with a GPU, where minutes are dear: they parse, and compare
with what the goals name."""

import importlib
import os
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxkontext.bench.peers import PEERS

ROOT = Path(__file__).parents[1]
PARTS = ["gpu-tests", "gpu-kernels", "gpu-speed", "gpu-memory", "gpu-compare", "gpu-quality"]


def recipe(target: str, out: Path) -> list[str]:
    """The commands of a target, each on a line."""
    done = subprocess.run(
        ["make", "-n", target, f"OUT={out}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.replace("\\\n", " ").splitlines()


def benchmarks(target: str, out: Path) -> Iterator[Namespace]:
    """The parsed arguments of its benchmarks."""
    for line in recipe(target, out):
        _, found, rest = line.partition(" -m fluxkontext.runtime.cli bench ")
        if found:
            name, *arguments = shlex.split(rest)
            module = importlib.import_module(f"fluxkontext.bench.{name}")
            yield module._parser().parse_args(arguments)


@pytest.mark.parametrize("part", PARTS[1:])
def test_benchmarks_parse_and_write_into_one_folder(part: str, tmp_path: Path) -> None:
    found = list(benchmarks(part, tmp_path))
    assert found
    assert {args.out.parent for args in found} == {tmp_path}


@pytest.mark.parametrize("others", [[], ["/elsewhere"]], ids=str)
def test_the_current_folder_is_not_on_the_path(others: list[str], tmp_path: Path) -> None:
    """An empty entry would be it, and `kernels` then a package of its own."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "path=$PYTHONPATH"\n')
    python.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": os.pathsep.join(others)} if others else {}
    done = subprocess.run(
        ["make", "gpu-kernels", f"OUT={tmp_path}", f"PYTHON={python}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    (path,) = (line for line in done.stdout.splitlines() if line.startswith("path="))
    assert path == "path=" + os.pathsep.join([str(ROOT / "build" / "ns"), *others])


def test_gpu_is_all_parts(tmp_path: Path) -> None:
    parts = [line for part in PARTS for line in recipe(part, tmp_path)]
    assert set(recipe("gpu", tmp_path)) == set(parts)


def test_full_size_is_compared_with_bf16(tmp_path: Path) -> None:
    """As the goals say, and not with fp32, which is what diffusers loads unasked."""
    found = list(benchmarks("gpu-compare", tmp_path))
    peers = [PEERS[name] for args in found for name in args.peers]
    assert {peer.precision for peer in peers} == {"bf16"}
    assert [args.spec for args in found] == ["full", "full"]
    assert all("cuda" in peer.on for peer in peers)
