"""`fluxkontext generate`: make a picture from text alone."""

from . import sampling
from .parsing import Commands, Parser


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "generate", parents=[sampling.options(), common], help="make a picture from text alone"
    )
    parser.set_defaults(run=sampling.run, images=[], context_layout="index", auto_resize=True)
