"""`bench report`: what a page and a Markdown text hold, and that they hold it safely."""

import copy
import functools
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.bench import document as doc
from fluxkontext.bench.report import plots, wording
from fluxkontext.bench.report.command import distinct, main
from fluxkontext.bench.report.compose import Named, compose, warnings
from fluxkontext.bench.report.markdown import markdown
from fluxkontext.bench.report.page import page
from fluxkontext.runtime.errors import InvalidInputError

from .documents import ENVIRONMENT, MODEL, full, gpu, measured, run

Json = dict[str, Any]
HOSTILE = "</title><script>alert(1)</script><img src=http://example.com/x onerror=a()>\"'&|`*$x$ \\"


class Reader(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def html(*documents: Json) -> str:
    return page(compose([Named(f"run {i}", found) for i, found in enumerate(documents)]))


def plain(name: str, median: float = 0.2, **also: Any) -> Json:
    """A result with nothing but its latency: its page is drawn fast."""
    nothing: Json = {"stages": {}, "step": None, "step_clock": None, "memory": {}}
    return measured(name, median, **nothing, **also)


@functools.cache
def full_page() -> str:
    return html(full())


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def test_a_full_document_gives_every_section() -> None:
    text = full_page()
    assert headings(text) == [
        "Before you trust these figures",
        "In short",
        "Side by side",
        "Latency",
        "Where the time goes",
        "Step by step",
        "VRAM by stage",
        "Roofline",
        "Cold start",
        "Under load",
        "Sustained",
        "The work",
        "Not measured",
        "To repeat it",
        "Machine",
    ]
    reader = Reader(text)
    assert reader.open == []
    for said in (
        "clocks fell from 1980 to 1400 MHz",
        "20 samples say little about p95",
        "The weights are random",
        "1.71 ×",
        "1.66 to 1.78",
        "789 TFLOP/s",
        "4.30 TB/s",
        "needs sm_100 or newer",
        "fluxkontext bench edit --rounds 20",
        "0123456789ab",
        "throttled by sw_power_cap",
        "predicted by the plan",
        "met: 95% within 500 ms",
    ):
        assert said in reader.text, said


def test_plots_and_tables_can_be_read_without_seeing() -> None:
    reader = Reader(full_page())
    drawings = reader.named("svg")
    assert len(drawings) >= 9
    assert all(d["role"] == "img" and len(d["aria-label"] or "") > 20 for d in drawings)
    assert all(cell["scope"] in ("row", "col") for cell in reader.named("th"))
    assert len(reader.named("h1")) == 1
    assert all(t["tabindex"] == "0" for t in reader.named("div") if t.get("class") == "table")
    assert reader.named("html") == [{"lang": "en"}]


def test_nothing_is_asked_of_another_machine() -> None:
    text = html(full(), run(plain("a")))
    assert not re.search(r"(?:https?:)?//(?=\w)", text)
    reader = Reader(text)
    assert {tag for tag, _ in reader.elements}.isdisjoint({"script", "link", "img", "iframe"})
    links = [v for _, attrs in reader.elements for k, v in attrs.items() if k.endswith("href")]
    assert all(link is not None and link.startswith("#") for link in links)
    (policy,) = [m for m in reader.named("meta") if m.get("http-equiv")]
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_ids_are_unique_or_mean_the_same() -> None:
    """Plots bring their clip paths and markers: the same id twice must be the same thing."""
    shapes: dict[str, str] = {}
    definition = r'<(?:path|clipPath) id="([^"]+)"(.*?)(?:/>|</clipPath>)'
    for name, rest in re.findall(definition, full_page(), re.S):
        assert shapes.setdefault(name, rest) == rest


def test_the_same_documents_give_the_same_page() -> None:
    assert html(full()) == full_page()


def hostile() -> Json:
    """A document whose every free text tries to be markup."""
    found = copy.deepcopy(full())
    found["model"]["name"] = HOSTILE
    found["command"] = ["fluxkontext", HOSTILE]
    found["git"]["commit"] = HOSTILE
    found["environment"]["cpu"] = HOSTILE
    found["environment"]["gpu"]["name"] = HOSTILE
    found["suite"]["name"] = HOSTILE
    for row in found["results"]:
        row["name"] += HOSTILE
        row["scenario"] = HOSTILE
        row["parameters"]["backend"] = HOSTILE
        row["stages"] = {f"{stage}{HOSTILE}": value for stage, value in row["stages"].items()}
        row["memory"] = {f"{stage}{HOSTILE}": value for stage, value in row["memory"].items()}
    for pair in found["comparisons"]:
        pair["base"] = pair["other"] = pair["scenario"] = HOSTILE
    found["ceilings"]["flops"][HOSTILE] = found["ceilings"]["flops"]["bf16"]
    found["warnings"].append(doc.warning("spread", HOSTILE, HOSTILE))
    assert doc.fault(found) is None
    return found


def test_names_cannot_become_markup() -> None:
    found = hostile()
    for documents in ([found], [found, run(plain(HOSTILE))]):
        reader = Reader(html(*documents))
        assert reader.open == []
        tags = {tag for tag, _ in reader.elements}
        assert tags.isdisjoint({"script", "img", "iframe", "a"})
        assert not any(key.startswith("on") for _, attrs in reader.elements for key in attrs)
        assert "alert(1)" in reader.text


def test_names_cannot_become_markdown() -> None:
    text = markdown(compose([Named("x", hostile())]))
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    assert "<script" not in outside
    for line in outside.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert "\\|\\`\\*" in outside


def test_markdown_tables_are_whole() -> None:
    text = markdown(compose([Named("x", full())]))
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) >= 9
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table
    assert "| edit, 4 steps | 209 ms |" in text


def test_what_was_not_measured_is_said() -> None:
    empty = doc.result("x", "edit", measured("x")["parameters"])
    reader = Reader(html(run(empty)))
    assert "No result of this run was measured" in reader.text
    bare = plain("y", throughput=None)
    text = html(run(bare))
    assert headings(text)[1:] == ["In short", "Latency", "The work", "To repeat it", "Machine"]
    absent = re.findall(r'<dt>([^<]*)</dt><dd class="absent">not measured</dd>', text)
    assert absent == [
        "99th percentile",
        "Edits a minute",
        "Peak VRAM",
        "Energy an edit",
        "Process start to picture",
    ]


def test_doubts_come_from_the_document_and_from_what_it_is() -> None:
    sound = run(plain("a"), model={**MODEL, "synthetic": False, "digest": "abc"})
    assert "Before you trust" not in html(sound)
    dirty = run(plain("a"), git={"commit": None, "dirty": True})
    text = html(dirty)
    assert "uncommitted changes" in text
    assert "commit unknown" in text


def ranked(*documents: Json) -> str:
    """The last column of the tables that compare."""
    sections = compose([Named(f"run {i}", d) for i, d in enumerate(documents)]).sections
    tables = [s.tables[0] for s in sections if s.title.startswith("Compared: ")]
    return "; ".join(f"{row[0]}: {row[-1]}" for table in tables for row in table.rows)


def test_runs_of_one_suite_are_ranked_where_noise_allows() -> None:
    one = run(plain("a", 0.2, seed=1), plain("b", 0.2, seed=2), plain("only"))
    two = run(plain("a", 0.18, seed=3), plain("b", 0.2, seed=4))
    assert ranked(one, two) == "a: run 1; b: no difference beyond noise; only: only one run has it"


def test_another_machine_is_still_comparable() -> None:
    other = run(plain("a", 0.1), environment={**ENVIRONMENT, "gpu": gpu()})
    assert ranked(run(plain("a", 0.2)), other) == "a: run 1"


@pytest.mark.parametrize(
    "changed",
    [
        {"suite": ("edit", 2)},
        {"suite": ("gpu", 1)},
        {"model": {**MODEL, "name": "dev"}},
        {"model": {**MODEL, "synthetic": False, "digest": "abc"}},
    ],
)
def test_different_suites_are_shown_and_never_ranked(changed: Json) -> None:
    documents = run(plain("a", 0.2)), run(plain("a", 0.1), **changed)
    assert ranked(*documents) == ""
    text = html(*documents)
    assert "Not ranked against each other" in text
    assert "say nothing about which is faster" in text
    assert "run 0: Latency" in text
    assert "run 1: Latency" in text


def test_different_work_under_one_name_is_not_ranked() -> None:
    other = run(plain("a", 0.1, parameters={"steps": 2}))
    assert ranked(run(plain("a", 0.2)), other) == "a: different work"


def test_a_fair_share_of_figures_for_each_document_size() -> None:
    """A long document stays small: plots are bounded, tables are not."""
    many = run(*(measured(f"result {i}", seed=i, parameters={"steps": 2}) for i in range(24)))
    text = html(many)
    assert len(Reader(text).named("svg")) <= 15
    assert len(text) < 1_000_000


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, text = (tmp_path / name for name in ("run.json", "r.html", "r.md"))
    doc.write(full(), file)
    assert main([str(file), "-o", str(out), "--markdown", str(text)]) == 0
    assert capsys.readouterr().out == f"{out}\n{text}\n"
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert text.read_text("utf-8").startswith("# fluxkontext bench edit: mini\n")


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 99}', "[1]"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match="expected a benchmark document") as refused:
        main([str(file)])
    assert "\n" not in str(refused.value)


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    doc.write(run(measured("a")), file)
    with pytest.raises(InvalidInputError, match="expected to write there"):
        main([str(file), "-o", str(tmp_path / "none" / "x.html")])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.json", "b.json"], ["a", "b"]),
        (["/one/a.json", "/two/a.json"], ["one/a", "two/a"]),
        (["/one/a.json", "/one/a.json"], ["one/a (1)", "one/a (2)"]),
    ],
)
def test_runs_have_different_names(files: Sequence[str], names: Sequence[str]) -> None:
    assert distinct([Path(file) for file in files]) == names


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.9996, "1.00 s"),
        (0.5, "500 ms"),
        (0.00123, "1.23 ms"),
        (0.0000004, "0.40 µs"),
        (1234.5, "1,234 s"),
        (0.0, "0 µs"),
        (None, "not measured"),
    ],
)
def test_seconds_in_words(value: float | None, said: str) -> None:
    assert wording.seconds(value) == said


def test_many_results_with_few_samples_are_one_warning() -> None:
    names = [f"edit, {n} steps" for n in (4, 8, 28)]
    few = [doc.warning("few_samples", "3 samples; 10 or more show a spread", n) for n in names]
    found = run(*(plain(name, count=3) for name in names), warnings=few)
    said = [w for w in warnings(found) if "samples" in w]
    assert said == ["Too few samples to show a spread: 4 steps (3); 8 steps (3); 28 steps (3)"]
    two = warnings(run(*(plain(name, count=3) for name in names[:2]), warnings=few[:2]))
    assert "edit, 8 steps: 3 samples; 10 or more show a spread" in two


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["edit, 4 steps, a", "edit, 4 steps, b"], ["a", "b"]),
        (["edit, 4 steps, a", "edit, 8 steps, b"], ["4 steps, a", "8 steps, b"]),
        (["edit, a"], ["edit, a"]),
        (["edit, a", "edit, a"], ["edit, a", "edit, a"]),
        (["edit, a", "b"], ["edit, a", "b"]),
    ],
)
def test_names_in_plots_are_what_differs(names: list[str], short: list[str]) -> None:
    assert wording.apart(names) == short


def test_a_far_outlier_does_not_take_the_room_of_all() -> None:
    """It is a mark at the edge: 100 times the median would leave the others one dot wide."""
    near, far = ([0.1] * 29 + [last] for last in (0.1, 10.0))
    ticks = [
        re.findall(r"(\d+)%", plots.distribution([plots.Samples("a", values)], "x"))
        for values in (near, far)
    ]
    assert max(map(int, ticks[1])) <= 130
