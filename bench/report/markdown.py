"""A report as Markdown, for a README or an issue: the same words and tables, without the plots."""

import re
from collections.abc import Iterator, Sequence

from .content import Report, Section, Table


def markdown(report: Report, level: int = 1) -> str:
    """The text; ``level`` is that of its title."""
    lines = [f"{'#' * level} {escape(report.title)}", "", escape(report.subtitle)]
    if report.warnings:
        lines += ["", *(f"- **Note:** {escape(warning)}" for warning in report.warnings)]
    for section in report.sections:
        lines += _section(section, level + 1)
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """Of the table alone."""
    sides = ["---" if i in table.words or i == 0 else "--:" for i in range(len(table.columns))]
    return [_row([escape(c) for c in table.columns]), _row(sides)] + [
        _row([escape(cell) for cell in row]) for row in table.rows
    ]


def escape(text: str) -> str:
    """Text that stays text: no markup, no HTML, no end of a cell or line."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", flat)


def _section(section: Section, level: int) -> Iterator[str]:
    if not (section.text or section.cards or section.tables or section.code):
        return
    yield from ("", f"{'#' * level} {escape(section.title)}")
    if section.text:
        yield from ("", escape(section.text))
    if section.cards:
        yield ""
    for card in section.cards:
        detail = f" ({escape(card.detail)})" if card.detail else ""
        yield f"- {escape(card.label)}: **{escape(card.value)}**{detail}"
    for table in section.tables:
        if table.title:
            yield from ("", f"{'#' * (level + 1)} {escape(table.title)}")
        yield from ("", *table_lines(table))
        if table.note:
            yield from ("", escape(table.note))
    for code in section.code:
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code.text))])
        yield from ("", escape(code.title), "", f"{fence}sh", code.text, fence)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
