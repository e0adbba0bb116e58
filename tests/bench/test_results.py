"""The committed results: index and README are up to date, and every figure is in a document."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.bench import results_index
from fluxkontext.bench.document import distribution, read, write
from fluxkontext.bench.results_index import (
    ALL_GOALS,
    BEGIN,
    CPU_GOALS,
    END,
    FOLDER,
    GOALS,
    INDEX,
    Goal,
    add,
    generated,
    index,
    main,
    performance,
    reached,
    slug,
)
from fluxkontext.runtime.errors import InvalidInputError

from .documents import ENVIRONMENT, full, gpu, measured, run

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


def test_what_is_committed_is_up_to_date() -> None:
    assert FOLDER == ROOT / "bench" / "results"
    for file, text in generated(FOLDER, ROOT / INDEX).items():
        assert file.read_text("utf-8") == text, f"{file}: run `fluxkontext bench results`"


def git(*arguments: str) -> int:
    """The exit status of a question to git about this checkout."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=False, capture_output=True
    ).returncode


def has_history() -> bool:
    """Whether all commits are here: not in a copy of the files, nor in a shallow clone."""
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    return shallow.stdout.strip() == "false" and git("rev-parse", "--verify", "HEAD") == 0


def test_committed_documents_are_of_a_commit_and_in_their_devices_folder() -> None:
    for file in FOLDER.glob("*/*"):
        assert file.suffix == ".json"
        document = read(file)
        assert document["git"]["dirty"] is False
        assert slug(results_index.device(document)) == file.parent.name
        if has_history():
            assert git("cat-file", "-e", document["git"]["commit"]) == 0, file
        assert document["git"]["commit"] in file.read_text("utf-8")


def test_the_goals_are_those_that_were_set_and_their_sources_are_there() -> None:
    documents = {str(f.relative_to(FOLDER)): read(f) for f in FOLDER.glob("*/*.json")}
    assert [(g.goal, g.stretch) for g in GOALS] == [
        ("7.2 s", "6.8 s"),
        ("5.4 s", "5.0 s"),
        ("4.7 s", "4.2 s"),
        ("2.5 ×", "3 ×"),
        ("1.1 ×", "1.3 ×"),
        ("20 GiB", "18 GiB"),
        ("14 GiB", "12 GiB"),
        ("9 GiB", "7.5 GiB"),
    ]
    for goal in GOALS:
        if goal.source is not None:
            gpu = documents[goal.source[0]]["environment"]["gpu"]
            assert gpu is not None
            assert "H200" in gpu["name"]


def test_without_documents_nothing_is_claimed() -> None:
    text = "\n".join(index({}))
    assert text.count("not measured") == sum(len(goals) for _, goals in ALL_GOALS)
    assert not re.search(r"\d", "\n".join(performance({})))


def test_every_figure_has_its_device_command_and_commit() -> None:
    document = full()
    for lines in (performance({"gpu/x.json": document}), index({"gpu/x.json": document})):
        text = "\n".join(lines)
        for said in ("Example GPU", "fluxkontext bench edit --rounds 20", "0123456789ab"):
            assert said in text
        assert "1.71 ×" in text
    (row,) = [line for line in performance({"x.json": document}) if "diffusers eager" in line]
    assert row.split(" | ")[1:4] == ["361 ms", "20", "1.71 × (1.66 to 1.78)"]


def test_every_figure_is_one_of_a_document() -> None:
    """A changed sample changes the tables; a skipped result keeps its reason and has no figure."""
    document = run(measured("a", 0.2, cold=None), full()["results"][-1])
    text = "\n".join(index({"cpu/x.json": document}))
    assert "| a | 200 ms | 211 ms | 20 | – |" in text
    assert "| nvfp4 | not measured | – | – | needs sm\\_100 or newer |" in text
    other = run(measured("a", latency=distribution([0.3])))
    assert "| a | 300 ms |" in "\n".join(performance({"cpu/x.json": other}))


def test_the_readme_quotes_the_newest_run() -> None:
    def made(created: str, median: float) -> Json:
        return run(measured("a", median)) | {"created": created}

    documents = {"cpu/x.json": made("2026-02", 0.3), "cpu/y.json": made("2026-01", 0.4)}
    text = "\n".join(performance(documents))
    assert "x.json" in text
    assert "y.json" not in text


def test_a_goal_is_read_from_its_document() -> None:
    documents = {"gpu/x.json": full()}
    source = ("gpu/x.json", "edit, 4 steps")
    assert reached(Goal("", "", ""), documents) == ("not measured", "–")
    assert reached(Goal("", "", "", source), documents) == ("209 ms", source[0])
    assert reached(Goal("", "", "", source, memory=True), documents)[0] == "21.0 GiB"
    assert reached(Goal("", "", "", source, versus="diffusers eager"), documents)[0] == "1.71 ×"


def test_scores_are_read_from_the_newest_document() -> None:
    def scored(created: str, exact: float) -> Json:
        row = {"n": 9, "exact": exact, "psnr_untouched": 40.04}
        result = measured("onnx fp32, 28 steps", latency=None, cold=None) | {
            "quality": {"single": row}
        }
        return run(result, benchmark="quality") | {"created": created}

    documents = {"cpu/a.json": scored("2026-02", 70.0), "cpu/b.json": scored("2026-01", 60.0)}
    single, level = Goal("", "", "", score=("single", "exact")), ("single", "psnr_untouched")
    assert reached(single, documents) == ("70.0%", "cpu/a.json")
    assert reached(Goal("", "", "", score=level), documents) == ("40.0 dB", "cpu/a.json")
    assert reached(Goal("", "", "", score=("caption", "exact")), documents)[0] == "not measured"
    assert "| single | 9 | 60.0 |" in "\n".join(index(documents))


def a_checkout(folder: Path) -> Path:
    """With a README and no results."""
    results = folder / "bench" / "results"
    results.mkdir(parents=True)
    (folder / INDEX).write_text(f"# x\n\n{BEGIN}\nold\n{END}\n\nrest\n", encoding="utf-8")
    return results


def test_adding_a_document_updates_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = a_checkout(tmp_path)
    monkeypatch.setattr(results_index, "FOLDER", results)
    file = tmp_path / "run.json"
    write(run(measured("a edit")), file)
    assert main(["--check"]) == 1
    assert main(["--add", str(file)]) == 0
    place = results / "example-cpu-2-00ghz-2-threads" / "edit-20260102T030405-01234567.json"
    assert capsys.readouterr().out == f"{place}\n"
    assert json.loads(place.read_text()) == json.loads(file.read_text())
    readme = (tmp_path / INDEX).read_text("utf-8")
    assert "| a edit | 200 ms |" in readme
    assert readme.startswith("# x\n\n")
    assert readme.endswith(f"{END}\n\nrest\n")
    assert main(["--check"]) == 0
    place.write_text(place.read_text().replace("a edit", "another"))
    assert main(["--check"]) == 1


@pytest.mark.parametrize("git", [{"dirty": True}, {"dirty": None}, {"commit": None}])
def test_a_run_without_a_commit_is_not_taken_in(tmp_path: Path, git: Json) -> None:
    document = copy.deepcopy(run(measured("a")))
    document["git"] |= git
    file = tmp_path / "run.json"
    write(document, file)
    with pytest.raises(InvalidInputError, match="commit, then measure"):
        add(file, tmp_path)


def test_a_readme_without_the_markers_is_an_error(tmp_path: Path) -> None:
    results = a_checkout(tmp_path)
    (tmp_path / INDEX).write_text("nothing", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="expected <!-- performance"):
        generated(results, tmp_path / INDEX)


def test_goals_on_a_cpu_are_those_of_the_newest_comparison() -> None:
    def compared(ratio: float, created: str, **also: Any) -> Json:
        names = [
            f"edit 128x128, 28 steps, batch 1, {who} fp32" for who in ("fluxkontext", "diffusers")
        ]
        pair = {
            "scenario": "edit",
            "base": names[0],
            "other": names[1],
            "what": "warm",
            "ratio": ratio,
            "interval": [ratio, ratio],
            "confidence": 0.95,
            "agreement": None,
        }
        found = run(*map(measured, names), benchmark="compare", comparisons=[pair], **also)
        return {**found, "created": created}

    warm, cold = CPU_GOALS
    documents = {
        "a/new.json": compared(1.9, "2026-02-01T00:00:00+00:00"),
        "a/old.json": compared(1.5, "2026-01-01T00:00:00+00:00"),
        "b/gpu.json": compared(
            9.0, "2026-03-01T00:00:00+00:00", environment={**ENVIRONMENT, "gpu": gpu()}
        ),
    }
    assert reached(warm, documents) == ("1.90 ×", "a/new.json")
    assert reached(cold, documents) == ("not measured", "–")
