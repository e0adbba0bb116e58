"""`fluxkontext bench`: measure; each benchmark has its own options."""

import argparse
from importlib import import_module

from .parsing import Commands, Parser

_BENCHES = ("kernels", "quality")


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser("bench", parents=[common], help="measure; see each --help")
    parser.add_argument("what", choices=_BENCHES, help="what to measure")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its own options")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    code: int = import_module(f"fluxkontext.bench.{args.what}").main(args.options)
    return code
