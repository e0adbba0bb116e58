"""The plots of a report. Each takes plain numbers and gives an ``<svg>`` element.

Names stand above their rows, not beside them: on a phone the whole width is for the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from . import wording
from .drawing import PAINT, draw, series

_ROW = 34  # points: a line of text and a bar
_MARK = 0.7  # of a row: where its bar or dot is; its text ends above
_AXIS = 40  # points below the rows: ticks and the label
_FAR = 1.25  # of the largest 95th percentile: farther is beyond the edge
_SECONDS = EngFormatter(unit="s", sep="\N{NO-BREAK SPACE}")


@dataclass(frozen=True)
class Samples:
    """A named row of measurements, in seconds; ``group`` picks its colour; ``whole`` is what is
    drawn as 100%, None for their own median."""

    name: str
    values: Sequence[float]
    group: int = 0
    whole: float | None = None


def distribution(rows: Sequence[Samples], label: str) -> str:
    """Every sample as a dot, the median as a bar, the 95th percentile as a thin one.

    In percent, or a short edit's spread would not show beside a long one. What would take most of
    the room for itself is a triangle at the edge.
    """

    def fill(axes: Axes) -> None:
        edge = _FAR * max(
            float(np.percentile(row.values, 95)) / (row.whole or float(np.median(row.values)))
            for row in rows
        )
        for y, row in enumerate(rows):
            median, p95 = np.percentile(row.values, [50, 95])
            whole = row.whole or median
            # spread over the row's height by the golden ratio: even, and the same every time
            jitter = ((np.arange(len(row.values)) * 0.618034) % 1 - 0.5) * 0.34
            dots = np.asarray(row.values) / whole
            colour = series(row.group)
            heights, far = y + _MARK + jitter, dots > edge
            for those, marker in ((~far, "o"), (far, ">")):
                axes.scatter(
                    np.minimum(dots[those], edge),
                    heights[those],
                    s=16,
                    color=colour,
                    alpha=0.55,
                    linewidths=0,
                    marker=marker,
                )
            for value, width in ((median, 2.2), (p95, 0.8)):
                ends = (y + _MARK - 0.21, y + _MARK + 0.21)
                axes.vlines(value / whole, *ends, color=PAINT["ink"], linewidth=width)
            _above(axes, y, row.name, wording.seconds(median))
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}%")
        axes.set_xlabel(label)
        _rows(axes, len(rows))

    return draw(_ROW * len(rows) + _AXIS, fill)


def waterfall(stages: Mapping[str, float]) -> str:
    """Stage -> seconds, one after another: where the time of an edit goes."""
    total = sum(stages.values())

    def fill(axes: Axes) -> None:
        start = 0.0
        for y, (name, seconds) in enumerate(stages.items()):
            axes.barh(y + _MARK, seconds, left=start, height=0.38, color=series(0))
            axes.hlines(y + _MARK, 0, total, color=PAINT["line"], linewidth=0.7, zorder=0)
            share = f"{seconds / total:.0%}" if total else ""
            _above(axes, y, name, f"{wording.seconds(seconds)} \N{MIDDLE DOT} {share}")
            start += seconds
        axes.set_xlim(0, total or 1)
        axes.xaxis.set_major_formatter(_SECONDS)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _rows(axes, len(stages))

    return draw(_ROW * len(stages) + _AXIS - 14, fill)


def steps(rows: Sequence[Samples]) -> str:
    """Seconds of each step in its order."""

    def fill(axes: Axes) -> None:
        for row in rows:
            numbers = np.arange(1, len(row.values) + 1)
            axes.plot(numbers, row.values, color=series(row.group), linewidth=1.6, label=row.name)
            axes.scatter(numbers, row.values, s=12, color=series(row.group))
        axes.set_ylim(0, 1.15 * max(max(row.values) for row in rows))
        axes.set_xlim(0.5, max(len(row.values) for row in rows) + 0.5)
        axes.grid(axis="y")
        axes.spines["bottom"].set_visible(False)
        axes.yaxis.set_major_formatter(_SECONDS)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        if len(rows) > 1:
            _legend(axes)

    return draw(200 + (_legend_height([row.name for row in rows]) if len(rows) > 1 else 0), fill)


def memory(stages: Sequence[str], sources: Mapping[str, Sequence[float | None]]) -> str:
    """Peak bytes of each stage by every source that measured or predicted it."""
    names = list(sources)
    highest = max(value or 0 for values in sources.values() for value in values)
    unit, scale = ("GiB", 2**30) if highest >= 2**30 else ("MiB", 2**20)

    def fill(axes: Axes) -> None:
        each = 0.8 / len(names)
        for i, name in enumerate(names):
            for x, value in enumerate(sources[name]):
                left = x - 0.4 + each * (i + 0.5)
                label = name if x == 0 else None
                axes.bar(
                    left, (value or 0) / scale, width=each * 0.88, color=series(i), label=label
                )
        axes.set_xticks(
            range(len(stages)), [_short(stage, 14).replace(" ", "\n") for stage in stages]
        )
        axes.set_xlim(-0.6, max(len(stages), 3) - 0.4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}\N{NO-BREAK SPACE}{unit}")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
        _legend(axes)

    return draw(190 + _legend_height(names), fill)


@dataclass(frozen=True)
class Interval:
    """A ratio and the interval that noise leaves for it."""

    name: str
    ratio: float
    low: float
    high: float


def ratios(rows: Sequence[Interval], label: str) -> str:
    """Ratios with their intervals, beside the line of no difference."""

    def fill(axes: Axes) -> None:
        axes.axvline(1, color=PAINT["faint"], linewidth=1)
        for y, row in enumerate(rows):
            axes.hlines(y + _MARK, row.low, row.high, color=series(0), linewidth=2.4)
            axes.scatter(row.ratio, y + _MARK, s=42, color=series(0))
            times = f"{row.ratio:.2f} \N{MULTIPLICATION SIGN}"
            _above(axes, y, row.name, f"{times} ({row.low:.2f} to {row.high:.2f})")
        ends = [1.0, *(row.low for row in rows), *(row.high for row in rows)]
        margin = 0.06 * (max(ends) - min(ends)) or 0.05
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
        _rows(axes, len(rows))

    return draw(_ROW * len(rows) + _AXIS, fill)


@dataclass(frozen=True)
class Point:
    """A piece of work on a roofline: FLOP per byte, and FLOP/s reached."""

    name: str
    intensity: float
    rate: float


def roofline(bandwidth: float, peaks: Mapping[str, float], points: Sequence[Point]) -> str:
    """bandwidth: measured bytes/s; peaks: name -> measured FLOP/s."""

    def fill(axes: Axes) -> None:
        edge = max(peaks.values()) / bandwidth
        reached = [point.intensity for point in points]
        x = np.geomspace(min([edge / 30, *reached]) / 2, max([edge * 8, *reached]) * 2, 200)
        for i, (name, peak) in enumerate(peaks.items()):
            roof = np.minimum(x * bandwidth, peak)
            axes.plot(x, roof, color=series(i), linewidth=1.8, label=f"{name} ceiling")
        for i, point in enumerate(points):
            colour = series(len(peaks) + i)
            axes.scatter(point.intensity, point.rate, s=36, color=colour, label=point.name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.grid()
        axes.yaxis.set_major_formatter(EngFormatter(sep="\N{NO-BREAK SPACE}"))
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NO-BREAK SPACE}"))
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("FLOP/s")
        _legend(axes)

    names = [f"{name} ceiling" for name in peaks] + [point.name for point in points]
    return draw(240 + _legend_height(names), fill)


def _above(axes: Axes, y: float, name: str, value: str = "") -> None:
    """The text of a row: its name from the left edge, its value from the right one."""
    where = axes.get_yaxis_transform()
    axes.text(0, y + 0.44, _short(name, 54 - len(value)), transform=where, va="bottom")
    axes.text(1, y + 0.44, value, transform=where, va="bottom", ha="right", color=PAINT["faint"])


def _rows(axes: Axes, count: int) -> None:
    """The first row on top, nothing on the left."""
    axes.set_ylim(count, 0)
    axes.set_yticks([])
    axes.grid(axis="x")


def _legend(axes: Axes) -> None:
    """Above the plot."""
    lines, names = axes.get_legend_handles_labels()
    short = [_short(name, 40) for name in names]
    axes.legend(lines, short, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=_columns(names))


def _short(name: str, room: int) -> str:
    """At most so many characters."""
    return name if len(name) <= room else name[: room - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _columns(names: Sequence[str]) -> int:
    """All names side by side where they have the room, else each on a line of its own."""
    return len(names) if sum(map(len, names)) + 6 * len(names) <= 50 else 1


def _legend_height(names: Sequence[str]) -> float:
    return 16.0 * len(names) / _columns(names) + 6


def over_time(samples: Sequence[tuple[float, float]]) -> str:
    """(seconds since the start, seconds of the call that ended then)."""

    def fill(axes: Axes) -> None:
        axes.plot(*zip(*samples, strict=True), color=series(0), linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.yaxis.set_major_formatter(_SECONDS)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_SECONDS)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("since the start")

    return draw(200, fill)
