"""What command lines share: the parser, types of values, options of a model, printed facts."""

import argparse
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..checkpoint import PARTS
from ..errors import InvalidInputError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as any other error."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message}; see {self.prog} --help")


Commands = argparse._SubParsersAction  # argparse has no public name for it


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument MODEL, and a flag for each part that may lie elsewhere."""
    parser.add_argument(
        "model", help="bundle, diffusers folder, safetensors file, or hub id in the cache"
    )
    add_parts(parser)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """A flag for each part that a single file lacks."""
    for part in PARTS:
        if part != "transformer":
            flag = "--" + part.replace("_", "-")
            parser.add_argument(flag, metavar="PATH", help=f"folder or file of the {part}")


def given_parts(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that flags name."""
    return {part: value for part in PARTS if (value := getattr(args, part, None)) is not None}


def size(text: str, otherwise: str = "") -> tuple[int, int]:
    """``WxH``; ``otherwise`` is what else an option takes, for the message."""
    from ..geometry import MAX_SIDE

    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 1 <= int(s) <= MAX_SIDE for s in sides):
        raise argparse.ArgumentTypeError(
            f"expected WxH, each 1 to {MAX_SIDE}{otherwise}, found {text!r}"
        )
    return int(sides[0]), int(sides[1])


def count(text: str) -> int:
    """1 to 10000."""
    if not (text.isdecimal() and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"expected 1 to 10000, found {text!r}")
    return int(text)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts for a reader, or as one JSON object."""
    print(json.dumps(facts) if as_json else "\n".join(_lines(facts, 0)))


def _lines(facts: Mapping[str, Any], depth: int) -> list[str]:
    """Indented ``name: value`` lines."""
    lines = []
    pad = "  " * depth
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{pad}{name}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            lines.append(f"{pad}{name}:")
            for entry in value:
                lines += [f"{pad}  -", *_lines(entry, depth + 2)]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{pad}{name}: {'none' if text in (None, '', {}) else text}")
    return lines


def kernel(text: str) -> tuple[str, str]:
    """``OP=NAME``, for a parser."""
    op, equals, name = text.partition("=")
    if not (op and equals and name):
        raise argparse.ArgumentTypeError(f"expected OP=NAME, such as attend=fp8, found {text!r}")
    return op, name
