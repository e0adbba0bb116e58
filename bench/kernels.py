"""Benchmarks of the kernels: ``python -m fluxkontext.bench.kernels --static``."""

import argparse
import json
import sys
from collections.abc import Sequence

from ..kernels.chips import CHIPS
from .kernel_static import as_json, as_table, static_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; 1 if a kernel must not be launched as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m fluxkontext.bench.kernels", description="Compile or time the kernels."
    )
    parser.add_argument("--static", action="store_true", required=True, help="compile, run nothing")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only names that contain it")
    parser.add_argument("--chip", type=int, action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    rows = static_rows(args.kernel, args.chip or tuple(CHIPS))
    print(json.dumps(as_json(rows)) if args.json else as_table(rows))
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"sm_{row.chip} {row.kernel}: {'; '.join(row.faults)}", file=sys.stderr)
    return 1 if faulty else 0


if __name__ == "__main__":
    raise SystemExit(main())
