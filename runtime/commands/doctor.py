"""`fluxkontext doctor`: what this machine can run, and why not the rest."""

import argparse

from .parsing import Commands, Parser, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "doctor", parents=[common], help="what this machine can run, and why not the rest"
    )
    parser.add_argument("bundle", nargs="?", help="verify every file of a bundle too, or of mini")
    parser.add_argument(
        "--device",
        default="auto",
        help="where to replay the bundle's golden edit: auto, cpu, cuda, cuda:1 ...",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import resolve
    from ..doctor import diagnose
    from ..errors import InvalidInputError

    if args.bundle is None and args.device != "auto":
        raise InvalidInputError("--device: expected a bundle to replay on it, found none; name one")
    show(diagnose(args.bundle and resolve(args.bundle), args.device), args.json)
