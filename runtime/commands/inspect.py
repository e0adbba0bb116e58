"""`fluxkontext inspect`: what a file or folder holds."""

import argparse
from pathlib import Path

from .parsing import Commands, Parser, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "inspect", parents=[common], help="what a checkpoint or an output picture holds"
    )
    parser.add_argument("path", type=Path)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..inspection import inspect

    show(inspect(args.path), args.json)
