"""The command as a process, and what an error of it looks like."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., tuple[int, str, str]]
"""Arguments -> exit code, stdout, stderr."""


def assert_error(outcome: tuple[int, str, str], code: int, *parts: str) -> None:
    """The exit code, nothing on stdout, one line on stderr that says it."""
    found, out, err = outcome
    assert (found, out) == (code, ""), err
    assert err.startswith("fluxkontext: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def command(arguments: list[object], env: dict[str, str], cwd: Path, **options: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "fluxkontext.runtime.cli", *map(str, arguments)],
        env=env,
        cwd=cwd,
        text=True,
        check=False,
        timeout=120,
        **{"capture_output": True} | options,
    )
