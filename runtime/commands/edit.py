"""`fluxkontext edit`: edit a picture by instruction."""

from pathlib import Path

from . import sampling
from .parsing import Commands, Parser


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "edit", parents=[sampling.options(), common], help="edit a picture by instruction"
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture; several are one edit's contexts",
    )
    parser.add_argument(
        "--context-layout", choices=("index", "offset"), default="index", help="of several pictures"
    )
    parser.add_argument(
        "--no-auto-resize",
        dest="auto_resize",
        action="store_false",
        help="keep the picture's own size, cut to multiples of 16",
    )
    parser.set_defaults(run=sampling.run)
