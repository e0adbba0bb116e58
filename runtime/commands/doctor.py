"""`fluxkontext doctor`: what this machine can run, and why not the rest."""

import argparse
from pathlib import Path

from .parsing import Commands, Parser, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "doctor", parents=[common], help="what this machine can run, and why not the rest"
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="verify every file of a bundle too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..doctor import diagnose

    show(diagnose(args.bundle), args.json)
