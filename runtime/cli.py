"""The command ``fluxkontext``. Results go to stdout, logs and progress to stderr."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .about import VERSION
from .commands import COMMANDS
from .commands.parsing import Parser
from .errors import KontextError, OutOfMemoryError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done; 1 run-time failure; 2 usage; 3 weights missing or malformed; 4 engines of another GPU,
    version or size; 5 does not fit in memory; 6 a file of a bundle was changed; 7 deadline; 130
    interrupted.
    """
    debug = False
    try:
        args = _parser().parse_args(argv)
        debug = args.debug
        logging.basicConfig(
            level=logging.DEBUG if debug else logging.WARNING,
            format="%(name)s: %(message)s",
            stream=sys.stderr,
        )
        if not debug:
            warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, say
        code: int | None = args.run(args)  # None, unless a benchmark has a verdict of its own
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("fluxkontext: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: not an error of ours
        _drop_output()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, KontextError)
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"fluxkontext: {text}{hint}", file=sys.stderr)
        if isinstance(error, KontextError):
            return error.exit_code
        if isinstance(error, OSError):  # perhaps of stdout, whose rest would fail again at exit
            _drop_output()
        return OutOfMemoryError.exit_code if isinstance(error, MemoryError) else 1
    return code or 0


def _drop_output() -> None:
    """Let what stdout still holds go nowhere, if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> Parser:
    parser = Parser(prog="fluxkontext", description="Edit pictures with FLUX.1 Kontext.")
    parser.add_argument("--version", action="version", version=f"fluxkontext {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--debug", action="store_true", help="show tracebacks and all logs")
    for command in COMMANDS:
        command.add(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
