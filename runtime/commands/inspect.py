"""`fluxkontext inspect`: what a file or folder holds."""

import argparse

from .parsing import Commands, Parser, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "inspect", parents=[common], help="what a checkpoint or an output picture holds"
    )
    parser.add_argument("path", help="a file, a folder, a hub id in the local cache, or mini")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import resolve
    from ..inspection import inspect

    show(inspect(resolve(args.path)), args.json)
