"""`fluxkontext doctor`: what this machine can run, and why not the rest."""

import argparse

from .parsing import Commands, Parser, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "doctor", parents=[common], help="what this machine can run, and why not the rest"
    )
    parser.add_argument("bundle", nargs="?", help="verify every file of a bundle too, or of mini")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import resolve
    from ..doctor import diagnose

    show(diagnose(args.bundle and resolve(args.bundle)), args.json)
