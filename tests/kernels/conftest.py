"""Kernels run on a GPU, or on the CPU in a session of its own that interprets them.

Triton decides when it is imported, so that session is started with ``TRITON_INTERPRET=1``
(``test_interpreted.py`` does). The tests in ``equality/`` are the same in both.
"""

import os
from pathlib import Path

import pytest
import torch

from fluxkontext.kernels.chips import CHIPS, chip_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EQUALITY = Path(__file__).parent / "equality"

if INTERPRETED:
    from .interpreter import install

    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Uninterpreted, equality needs a GPU; interpreted, nothing is large."""
    for item in items:
        if EQUALITY in item.path.parents:
            if not INTERPRETED:
                item.add_marker(pytest.mark.gpu)
            elif item.get_closest_marker("large"):
                item.add_marker(pytest.mark.skip(reason="too large for the interpreter"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``chip``: what differs, where kernels are interpreted, else the one that is there."""
    if "chip" in metafunc.fixturenames and EQUALITY in metafunc.definition.path.parents:
        # 8.0 and 8.6 get no configuration that 8.9 lacks.
        chips = [chip for chip in CHIPS.values() if chip.fp8]
        if not INTERPRETED:
            present = torch.cuda.is_available()
            chips = [chip_of(torch.device("cuda", 0)) if present else CHIPS[90]]
        metafunc.parametrize("chip", chips, ids=lambda chip: f"sm_{chip.sm}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where this session runs kernels."""
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


@pytest.fixture
def _fp8(device: torch.device) -> None:
    """Skip where kernels cannot name the type."""
    if not (chip := chip_of(device)).fp8:
        pytest.skip(f"needs tensor cores for FP8 (sm_89 or newer), which sm_{chip.sm} has not")
