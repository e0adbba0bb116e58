"""``fluxkontext bench report FILE... [-o report.html] [--markdown FILE]``."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...runtime.commands.parsing import Parser
from ...runtime.errors import InvalidInputError
from ...runtime.loader import require
from ..document import read


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(
        prog="fluxkontext bench report", description="Documents of benchmarks as one page."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what a run wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write Markdown")
    args = parser.parse_args(argv)
    require("matplotlib", "to draw the plots of a report", "bench")
    from .compose import Named, compose
    from .markdown import markdown
    from .page import page

    documents = [read(file) for file in args.files]
    named = zip(distinct(args.files), documents, strict=True)
    report = compose([Named(name, document) for name, document in named])
    _write(args.out, page(report))
    if args.markdown is not None:
        _write(args.markdown, markdown(report))
    return 0


def distinct(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with its folder or number where stems are the same."""
    stems = [file.stem for file in files]
    folders = [f"{file.resolve().parent.name}/{file.stem}" for file in files]
    numbered = [f"{folder} ({i})" for i, folder in enumerate(folders, 1)]
    names = (stems, folders, numbered)
    return next(found for found in names if _differ(found) or found is numbered)


def _differ(names: Iterable[str]) -> bool:
    listed = list(names)
    return len(set(listed)) == len(listed)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{file}: expected to write there, found: {error}") from None
    print(file)


if __name__ == "__main__":
    sys.exit(main())
