"""The command as a process of its own: pipes that break, signals, and memory that runs out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .commands import assert_error, command


def test_an_edit_as_a_process(
    edit: list[object], namespace_env: dict[str, str], tmp_path: Path
) -> None:
    """A terminal's bar aside, stderr stays empty."""
    done = command([*edit, "-o", "out.jpg"], namespace_env, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.jpg (80x48, seed 7)\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jpg"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_cannot_be_written(namespace_env: dict[str, str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = command(
            ["doctor"], namespace_env, tmp_path, capture_output=False, stdout=full,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_reader_that_has_gone(namespace_env: dict[str, str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = command(
            ["doctor"], namespace_env, tmp_path, capture_output=False, stdout=writer,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


RUN_HOOKED = """
import sys
from pathlib import Path
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.cli import main
real = NativeBackend.step
def step(self, state, i):
    real(self, state, i)
    {hook}
NativeBackend.step = step
sys.exit(main(sys.argv[1:]))
"""
"""The command, with something to do after each step."""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("before", [None, b"an older picture"])
def test_interrupted_in_mid_run(
    edit: list[object], namespace_env: dict[str, str], tmp_path: Path, before: bytes | None
) -> None:
    output, mark = tmp_path / "out.png", tmp_path / "stepped"
    if before:
        output.write_bytes(before)
    code = RUN_HOOKED.format(hook="Path('stepped').touch()")
    arguments = [*edit, "--steps", 10_000]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=namespace_env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "fluxkontext: interrupted\n")
    mark.unlink()
    assert [path.name for path in tmp_path.iterdir()] == (["out.png"] if before else [])
    assert not before or output.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_in_mid_run(
    edit: list[object], namespace_env: dict[str, str], tmp_path: Path
) -> None:
    """After the first step the process may grow no more, and the decoder's tiles do not fit."""
    code = "import resource\n" + RUN_HOOKED.format(
        hook="resource.setrlimit(resource.RLIMIT_AS, (int(Path('/proc/self/statm').read_text()"
        ".split()[0]) * resource.getpagesize(), resource.RLIM_INFINITY))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, [*edit, "--size", "1024x1024", "--steps", 1])],
        env=namespace_env | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert_error((done.returncode, done.stdout, done.stderr), 5, "expected enough memory")
    assert list(tmp_path.iterdir()) == []
