"""Every kernel and configuration compiles for every chip, within its memory, without spills."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from fluxkontext.bench.kernel_cases import launches
from fluxkontext.kernels.ahead import build_for
from fluxkontext.kernels.chips import CHIPS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(namespace_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    command = [sys.executable, "-m", "fluxkontext.bench.kernels", "--static", "--json"]
    folder = tmp_path_factory.mktemp("static")
    done = subprocess.run(command, env=namespace_env, cwd=folder, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found: Rows = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_and_fits(rows: Rows, chip: int) -> None:
    here = [row for row in rows if row["chip"] == chip]
    faulty = [f"{row['kernel']}: {fault}" for row in here for fault in row["faults"]]
    assert here
    assert not faulty, "\n".join(faulty)


@pytest.mark.parametrize("sm", [89, 90, 120])
def test_sums_of_fp8_products_are_added_in_registers(sm: int) -> None:
    """A thread adds its part of a tile after every step: the compiler has not folded that away."""
    launch = dict(launches(CHIPS[sm]))["linear_fp8 rows"]
    found = re.findall(r"\badd\.f32(x2)?\s", build_for(launch, CHIPS[sm]).asm["ptx"])
    adds = sum(2 if pair else 1 for pair in found)
    assert adds >= launch.args["M"] * launch.args["N"] // (32 * launch.warps)
