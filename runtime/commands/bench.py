"""`fluxkontext bench`: measure; each benchmark has its own options."""

import argparse
from importlib import import_module
from typing import Any

from ..errors import InvalidInputError
from .parsing import Commands, Parser

_BENCHES = {
    "edit": "edit",
    "compare": "compare",
    "load": "load",
    "gpu": "gpu",
    "kernels": "kernels",
    "quality": "quality",
    "report": "report.command",
    "diff": "diff",
    "results": "results_index",
}
"""What to call it -> its module below fluxkontext.bench."""
_USUAL = "edit"


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "bench",
        help=f"measure: {', '.join(_BENCHES)}; see each --help",
        description=f"Benchmarks: {', '.join(_BENCHES)}. Without a name: {_USUAL}.",
        prefix_chars="\0",  # options are the benchmark's own
        add_help=False,
    )
    parser.add_argument("options", nargs="*", action=_Options, help="a benchmark, its options")
    parser.set_defaults(run=run, usage=parser.format_help, options=[], debug=False)


class _Options(argparse.Action):
    """All words as they are, but for --debug, which is the command line's own."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.debug = "--debug" in values
        namespace.options = [word for word in values if word != "--debug"]


def run(args: argparse.Namespace) -> int:
    if args.options in (["--help"], ["-h"]):
        print(args.usage())
        return 0
    what, options = _USUAL, list(args.options)
    if options and not options[0].startswith("-"):
        what = options.pop(0)
    if what not in _BENCHES:
        raise InvalidInputError(
            f"bench: expected one of {', '.join(_BENCHES)}, or options of {_USUAL}, found {what}"
        )
    code: int = import_module(f"fluxkontext.bench.{_BENCHES[what]}").main(options)
    return code
