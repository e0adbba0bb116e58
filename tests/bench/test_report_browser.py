"""A report of a real run in a real browser, as a phone and a desk show it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench import edit
from fluxkontext.bench.report.command import main

from .browser import Browser, executable
from .documents import full, measured, run

_OVERFLOW = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.table, pre, svg'))
  .filter(e => e.getBoundingClientRect().right > window.innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))
"""
_SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('svg text')]
  .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))
"""
_CONTRAST = """
(() => {
  const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => {
    const [r, g, b] = channels(colour).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = value => (Math.max(value, paper) + 0.05) / (Math.min(value, paper) + 0.05);
  const texts = [...document.querySelectorAll('p, td, th, li, dt, dd, h1, h2, h3, code')];
  const labels = [...document.querySelectorAll('svg text')];
  return Math.min(
    ...texts.map(e => ratio(light(getComputedStyle(e).color))),
    ...labels.map(e => ratio(light(getComputedStyle(e).fill))),
  );
})()
"""
"""The least contrast of any text with the page, by WCAG 2.2's formula."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real run of the miniature's shapes."""
    folder = tmp_path_factory.mktemp("report")
    measurements, page = folder / "run.json", folder / "report.html"
    sizes = ["--scenarios", "edit", "--steps", "2", "--batch", "1"]
    effort = ["--warmup", "1", "--rounds", "3", "--cold", "0"]
    assert edit.main([*sizes, *effort, "--quiet", "--out", str(measurements)]) == 0
    assert main([str(measurements), "-o", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = executable()
    if path is None:
        pytest.skip("needs Chromium, which is not installed: apt-get install chromium")
    with Browser(path, tmp_path_factory.mktemp("profile")) as started:
        yield started


def _page(folder: Path, document: dict[str, Any]) -> Path:
    """The report of one document."""
    source, page = folder / "run.json", folder / "report.html"
    source.write_text(json.dumps(document), encoding="utf-8")
    assert main([str(source), "-o", str(page)]) == 0
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_fits_every_screen(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.show(report.as_uri(), width, scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(_OVERFLOW) == []
    assert browser.evaluate(_SMALLEST_TEXT) >= 8  # CSS pixels
    assert browser.evaluate(_CONTRAST) >= 4.5  # WCAG 2.2, AA


def test_every_kind_of_plot_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    """A document with all that there is: A/B table, roofline, load, a sustained run."""
    browser.show(_page(tmp_path, full()).as_uri(), 360, "dark")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate(_OVERFLOW) == []
    assert browser.evaluate(_CONTRAST) >= 4.5
    titles = browser.evaluate("[...document.querySelectorAll('figure h3')].map(e => e.innerText)")
    assert {"Ratio of medians", "Every sample", "Median of each step", "Roofline"} <= set(titles)


def test_plots_are_drawn(browser: Browser, tmp_path: Path) -> None:
    """Latency, stages, steps and memory: each takes room, and has ink in it. Of invented latencies:
    the dots of three measured ones may lie on top of each other, under the median's bar."""
    browser.show(_page(tmp_path, run(measured("edit, 4 steps"))).as_uri(), 1280, "light")
    titles = browser.evaluate("[...document.querySelectorAll('figure h3')].map(e => e.innerText)")
    assert titles[0] == "Every sample"
    assert "Median of each step" in titles
    assert len(titles) == 4
    page = np.asarray(browser.picture(), np.int16)
    for i in range(len(titles)):
        box = browser.evaluate(
            f"(r => [r.left, r.top, r.right, r.bottom].map(Math.round))"
            f"(document.querySelectorAll('figure svg')[{i}].getBoundingClientRect())"
        )
        left, top, right, bottom = box
        drawn = page[top:bottom, left:right]
        assert drawn.shape[0] >= 60
        assert drawn.shape[1] >= 300
        coloured = np.ptp(drawn, axis=2) > 60
        assert coloured.sum() >= 40, titles[i]


def test_nothing_is_requested(browser: Browser, report: Path) -> None:
    browser.requests.clear()
    browser.show(report.as_uri(), 1280, "light")
    assert browser.requests == [report.as_uri()]


def test_dark_is_dark_and_light_is_light(browser: Browser, report: Path) -> None:
    means = {}
    for scheme in ("light", "dark"):
        browser.show(report.as_uri(), 360, scheme)
        means[scheme] = float(np.asarray(browser.picture()).mean())
    assert means["light"] > 200
    assert means["dark"] < 60
