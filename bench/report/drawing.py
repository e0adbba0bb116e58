"""How a plot becomes part of a page: matplotlib draws, the page's style sheet colours.

A plot is drawn as wide as a phone's screen, so that its text is as large there as the page's; wider
screens lay plots side by side. Colours have names, and become CSS variables in the SVG, so that one
drawing is right on light and on dark paper. Text stays text.
"""

import io
import re
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 340.0
"""Points, which are the SVG's units and, on a phone, its pixels."""
TEXT = 11.0

PAINT = {"ink": "#010101", "faint": "#010102", "line": "#010103", "paper": "#010104"} | {
    f"series-{i}": f"#01010{i + 5}" for i in range(6)
}
"""Name of a CSS variable -> the stand-in that matplotlib draws with."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fluxkontext",  # the same document gives the same page
    "font.size": TEXT,
    "font.family": "DejaVu Sans",  # comes with matplotlib, is wider than what pages are set in
    "text.parse_math": False,  # a name out of a document may hold a $
    "text.color": PAINT["ink"],
    "axes.edgecolor": PAINT["line"],
    "axes.labelcolor": PAINT["faint"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": PAINT["line"],
    "grid.linewidth": 0.7,
    "xtick.color": PAINT["line"],
    "ytick.color": PAINT["line"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.labelcolor": PAINT["faint"],
    "ytick.labelcolor": PAINT["faint"],
    "xtick.labelsize": TEXT - 1,
    "ytick.labelsize": TEXT - 1,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": TEXT - 1,
    "legend.labelcolor": PAINT["faint"],
    "legend.borderaxespad": 0,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def series(index: int) -> str:
    """The stand-in of a colour for the i-th of several things; they repeat after six."""
    return PAINT[f"series-{index % 6}"]


def draw(height: float, fill: Callable[[Axes], None]) -> str:
    """An ``<svg>`` element, WIDTH x height points, of one pair of axes that ``fill`` draws on."""
    with rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals in the stubs
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    return _inline(file.getvalue())


def _inline(svg: str) -> str:
    """Of a file, what belongs into a page: no prologue, no ids of its own but those it refers to,
    no fonts, and variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg)[^>]*(viewBox="[^"]*")[^>]*>', r'\1 \2 focusable="false">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in referred else "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", svg)
    for name, colour in PAINT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
