"""What a report holds, before it is a page or Markdown: plain text, and plots already drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Card:
    """A headline figure: what it is, the figure, what to know about it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """The first column names its row; ``words`` says which others hold text and not figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """An ``<svg>`` element with a title, and what it shows in words for who cannot see it."""

    title: str
    svg: str
    words: str
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be copied: a command line."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; ``folded`` where few readers look."""

    title: str
    text: str = ""
    cards: Sequence[Card] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    code: Sequence[Code] = ()
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """Warnings come first, whatever else there is."""

    title: str
    subtitle: str
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = field(default=())
