"""Benchmarks of the kernels: ``python -m fluxkontext.bench.kernels [--static]``.

``--static`` compiles every kernel for every chip and needs no GPU. Otherwise kernels are timed on
the GPU that is there, and judged by its measured ceilings.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from ..kernels.chips import CHIPS, chip_of, unsupported
from .gpu_timing import ceilings, milliseconds
from .kernel_static import as_json, as_table, static_rows
from .kernel_timed import Timed, problems


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or one JSON document; 1 if a kernel must not be launched as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m fluxkontext.bench.kernels", description="Compile or time the kernels."
    )
    parser.add_argument("--static", action="store_true", help="compile for all chips, run nothing")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only names that contain it")
    parser.add_argument(
        "--chip", type=int, action="append", choices=CHIPS, help="with --static; default: all"
    )
    parser.add_argument("--samples", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    if args.static:
        return _static(args)
    if reason := unsupported(torch.device("cuda")) if torch.cuda.is_available() else "no GPU":
        print(f"nothing to time: {reason}; --static needs no GPU", file=sys.stderr)
        return 1
    print(_timings(args))
    return 0


def _static(args: argparse.Namespace) -> int:
    rows = static_rows(args.kernel, args.chip or tuple(CHIPS))
    print(json.dumps(as_json(rows)) if args.json else as_table(rows))
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"sm_{row.chip} {row.kernel}: {'; '.join(row.faults)}", file=sys.stderr)
    return 1 if faulty else 0


def _timings(args: argparse.Namespace) -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    with torch.inference_mode(), device:
        best = ceilings()
        results = [
            _measured(problem, best, args.samples)
            for problem in problems(chip_of(device))
            if args.kernel in problem.kernel
        ]
    document = {"environment": _environment(device), "ceilings": best, "kernels": results}
    if args.json:
        return json.dumps(document)
    lines = [f"{'kernel':40} {'implementation':26} {'ms':>8} {'p95':>8} {'TB/s':>6} {'TFLOP/s':>8}"]
    for result in results:
        for run in result["runs"]:
            values = [run.get(key, float("nan")) for key in ("median", "p95", "tbps", "tflops")]
            numbers = "{:8.4f} {:8.4f} {:6.2f} {:8.1f}".format(*values)
            share = f"{run['share']:.0%} of its ceiling" if "share" in run else run["error"]
            lines.append(f"{result['kernel']:40} {run['name']:26} {numbers} {share}")
    return "\n".join(lines)


def _measured(problem: Timed, best: dict[str, list[float]], samples: int) -> dict[str, Any]:
    """Samples of every implementation, and the share it reaches of what the chip could do."""
    least = problem.bytes / statistics.median(best["copy"])
    least = max(least, problem.flops / statistics.median(best[problem.ceiling]))
    runs: list[dict[str, Any]] = []
    for name, work in problem.runs.items():
        try:
            taken = sorted(milliseconds(work, samples))
        except Exception as error:  # a peer that this machine lacks is a row, not the end
            runs.append({"name": name, "error": f"{type(error).__name__}: {error}"[:200]})
            continue
        seconds = statistics.median(taken) / 1e3
        runs.append(
            {
                "name": name,
                "samples_ms": taken,
                "median": seconds * 1e3,
                "p95": taken[int(0.95 * (len(taken) - 1))],
                "tbps": problem.bytes / seconds / 1e12,
                "tflops": problem.flops / seconds / 1e12,
                "share": least / seconds,
            }
        )
    return {
        "kernel": problem.kernel,
        "bytes": problem.bytes,
        "flops": problem.flops,
        "ceiling": problem.ceiling,
        "runs": runs,
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    properties = torch.cuda.get_device_properties(device)
    return {
        "command": sys.argv,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
