"""What loading a checkpoint costs in memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench.synthetic import TINY, write_checkpoint


class Flat:
    """Stands in for a random generator: values do not matter to memory, and take time to draw."""

    @staticmethod
    def standard_normal(shape: tuple[int, ...]) -> Any:
        return np.full(shape, 0.5, np.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_never_holds_two_copies(
    small_model: Path,
    tmp_path: Path,
    namespace_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process's own memory, which the mapped file is not part of, sampled while it loads."""
    wide = replace(
        TINY.transformer,
        hidden_size=1024,
        num_heads=8,
        depth=1,
        depth_single_blocks=1,
        mlp_hidden=4096,
    )
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Flat())
        write_checkpoint(tmp_path / "wide", replace(TINY, transformer=wide))
    code = """
import sys, threading, time
from pathlib import Path
import torch
from fluxkontext.kernels import reference
from fluxkontext.runtime.checkpoint import open_component
from fluxkontext.runtime.loading import load
from fluxkontext.runtime.models.transformer import Flux

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def load_from(folder, dtype):
    component = open_component("transformer", Path(folder, "transformer"))
    return load(component, lambda c: Flux(c, reference()), torch.device("cpu"), dtype)

load_from(sys.argv[1], torch.bfloat16)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
module = load_from("wide", getattr(torch, sys.argv[2]))
done.set()
thread.join()
print(sum(t.numel() * t.element_size() for t in module.state_dict().values()))
print(max(peak, anonymous()) - before)
"""
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(small_model), dtype],
            env=namespace_env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        size, grown = map(int, done.stdout.split())
        assert size > (200e6 if dtype == "float32" else 100e6)
        assert 0.9 * size < grown < 1.3 * size
