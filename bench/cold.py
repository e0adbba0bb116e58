"""From the start of a process to its first picture."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..runtime.errors import KontextError
from .document import Json, distribution
from .scenarios import GUIDANCE, PROMPTS, Work

_SHOWN = 300  # characters of a failed process's last words


def first_picture(command: Sequence[str]) -> tuple[float, Json]:
    """Seconds until a new process prints a line of JSON, as it does when its picture is written;
    and that line."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would fill
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - start
        process.communicate()
        errors.seek(0)
        words = errors.read()
    if process.returncode or not line:
        raise KontextError(
            f"expected a first picture from a new process, found exit code {process.returncode}: "
            f"{words.strip()[-_SHOWN:]}"
        )
    said: Json = json.loads(line)
    return taken, said


def command_of(
    work: Work, model: Path, backend: str, precision: str, device: str, folder: Path
) -> list[str]:
    """`fluxkontext edit` or `generate` for a work of one picture; ``folder`` takes the files."""
    pictures = []
    for i, pixels in enumerate(work.pictures()[0]):
        pictures.append(folder / f"context-{i}.png")
        Image.fromarray(pixels).save(pictures[-1])
    width, height = work.target
    return [
        *(sys.executable, "-P", "-m", "fluxkontext.runtime.cli"),
        *(["edit", *map(str, pictures), "--no-auto-resize"] if pictures else ["generate"]),
        *("--model", str(model), "--backend", backend, "--precision", precision),
        *("--device", device),
        *("-p", PROMPTS[0], "-o", str(folder / "first.png"), "--size", f"{width}x{height}"),
        *("--steps", str(work.steps), "--guidance", str(GUIDANCE), "--seed", str(work.seed)),
        "--json",
    ]


def cold_rounds(commands: Mapping[str, Sequence[str]], rounds: int, quiet: bool) -> dict[str, Json]:
    """So many new processes of each command, in rounds A B, B A ...; as the schema's ``cold``.

    quiet: without a progress bar.
    """
    found: dict[str, list[tuple[float, Json]]] = {name: [] for name in commands}
    order = list(commands)
    with tqdm(
        total=rounds * len(order),
        desc="new processes",
        disable=True if quiet else None,
        leave=False,
    ) as bar:
        for _ in range(rounds):
            for name in order:
                found[name].append(first_picture(commands[name]))
                bar.update()
            order.reverse()
    return {
        name: {
            "process_start_to_picture": distribution(seconds for seconds, _ in starts),
            "load": distribution(said["timings"]["load"] for _, said in starts),
            "first_edit": distribution(said["timings"]["total"] for _, said in starts),
        }
        for name, starts in found.items()
    }
