"""A report as one HTML page that asks nothing of any other machine and runs no script.

A security policy in the page itself forbids both, so that a hostile name in a document, were it
ever to get past the escaping, could still do nothing.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from .content import NOT_MEASURED, Code, Plot, Report, Section, Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(report: Report) -> str:
    """The whole HTML file."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(report.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(report.title)}</h1>",
            f"<p>{escape(report.subtitle)}</p></header>",
            "<main>",
            *_warnings(report),
            *(line for section in report.sections for line in _section(section)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _warnings(report: Report) -> Iterator[str]:
    if not report.warnings:
        return
    yield '<section class="warnings" aria-labelledby="warnings">'
    yield '<h2 id="warnings">Before you trust these figures</h2><ul>'
    yield from (f"<li>{escape(warning)}</li>" for warning in report.warnings)
    yield "</ul></section>"


def _section(section: Section) -> Iterator[str]:
    heading = f"<h2>{escape(section.title)}</h2>"
    if section.folded:
        yield f"<details><summary>{heading}</summary>"
    else:
        yield f"<section>{heading}"
    if section.text:
        yield f"<p>{escape(section.text)}</p>"
    if section.cards:
        yield '<dl class="cards">'
        for card in section.cards:
            detail = f"<dd>{escape(card.detail)}</dd>" if card.detail else ""
            kind = "absent" if card.value == NOT_MEASURED else "value"
            value = f'<dd class="{kind}">{escape(card.value)}</dd>'
            yield f"<div><dt>{escape(card.label)}</dt>{value}{detail}</div>"
        yield "</dl>"
    if section.plots:
        yield '<div class="plots">'
        yield from (_plot(plot, i) for i, plot in enumerate(section.plots))
        yield "</div>"
    for table in section.tables:
        yield from _table(table)
    yield from map(_code, section.code)
    yield "</details>" if section.folded else "</section>"


def _plot(plot: Plot, index: int) -> str:
    label = escape(f"{plot.title}: {plot.words}")
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    note = f"<p>{escape(plot.note)}</p>" if plot.note else ""
    return f"<figure><figcaption><h3>{escape(plot.title)}</h3></figcaption>\n{svg}\n{note}</figure>"


def _table(table: Table) -> Iterator[str]:
    """In a box of its own, which scrolls where it is wider than the screen."""
    if table.title:
        yield f"<h3>{escape(table.title)}</h3>"
    name = escape(table.title or table.columns[0])
    yield f'<div class="table" role="region" aria-label="{name}" tabindex="0"><table>'
    kinds = ["" if i in table.words or i == 0 else ' class="n"' for i in range(len(table.columns))]
    heads = zip(kinds, table.columns, strict=True)
    yield "<thead><tr>"
    yield from (f'<th scope="col"{kind}>{escape(column)}</th>' for kind, column in heads)
    yield "</tr></thead><tbody>"
    for first, *rest in table.rows:
        cells = zip(kinds[1:], rest, strict=True)
        yield f'<tr><th scope="row">{escape(first)}</th>'
        yield "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in cells) + "</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _code(code: Code) -> str:
    title = f"<h3>{escape(code.title)}</h3>" if code.title else ""
    return f'{title}<pre tabindex="0"><code>{escape(code.text)}</code></pre>'
