"""The quality bench: what it counts, what it writes, and how two runs compare."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxkontext.bench import quality
from fluxkontext.bench.document import read
from fluxkontext.bench.mini.instructions import EDIT_KINDS, KINDS
from fluxkontext.bench.mini.requests import (
    Settings,
    answer,
    draw_chains,
    draw_requests,
    follow,
)
from fluxkontext.bench.mini.scenes import render
from fluxkontext.bench.mini.score import EditScore
from fluxkontext.bench.report.command import main as report
from fluxkontext.bench.synthetic import write_checkpoint
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.errors import InvalidInputError

from ..conftest import small_spec

SHORT = ["--samples", "2", "--chains", "2", "--turns", "2", "--device", "cpu"]


@dataclass
class Result:
    images: list[Image.Image]


class Oracle:
    """Knows every right answer; every ``wrong``-th of its pictures is the first context."""

    def __init__(self, samples: Sequence[Any], wrong: int = 0) -> None:
        self.answers = {
            (s.text, *(render(c).tobytes() for c in s.contexts)): render(s.target) for s in samples
        }
        self.wrong, self.made = wrong, 0
        self.seeds: list[int] = []

    def __call__(self, image: Any, prompt: list[str], *, seed: list[int], **_: Any) -> Any:
        self.seeds += seed
        pictures = []
        for i, text in enumerate(prompt):
            contexts = image[i] if image else []
            self.made += 1
            right = self.answers[text, *(c.tobytes() for c in contexts)]
            fails = self.wrong and self.made % self.wrong == 0
            pictures.append(Image.fromarray(contexts[0] if fails else right))
        return Result(pictures)


def test_right_answers_score_full_marks() -> None:
    requests = draw_requests(3, seed=5)
    assert tuple(requests) == KINDS
    answers = {}
    for kind, samples in requests.items():
        oracle = Oracle(samples)
        answers[kind] = answer(oracle, samples, Settings(batch=2), 7, lambda _: None)
        assert oracle.seeds == [7, 8, 9]
    rows = quality.summarise(answers)
    assert {row["exact"] for row in rows.values()} == {100.0}
    assert rows["single"]["n"] == 3 * len(EDIT_KINDS)
    assert {"single", "two_image", "caption", "nothing"} <= rows.keys()


def test_a_kinds_requests_depend_on_no_other_kind() -> None:
    assert draw_requests(2, 1, kinds=["swap"])["swap"] == draw_requests(2, 1)["swap"]


def test_wrong_answers_are_counted() -> None:
    samples = draw_requests(4, seed=1, kinds=["recolour"])["recolour"]
    answers = answer(Oracle(samples, wrong=2), samples, Settings(), 0, lambda _: None)
    assert [a.score.exact for a in answers] == [True, False, True, False]


def test_a_chain_ends_at_its_first_mistake() -> None:
    chains = draw_chains(2, 4, seed=0)
    everything = [sample for chain in chains for sample in chain]
    assert follow(Oracle(everything), chains, Settings(), 0, lambda _: None) == [[True] * 4] * 2


def test_a_chain_is_fed_its_own_outcomes() -> None:
    chains = draw_chains(1, 3, seed=0)
    seen = []

    def copies(image: Any, prompt: list[str], **_: Any) -> Any:
        seen.append(image[0][0])
        return Result([Image.fromarray(255 - image[0][0])])

    right = follow(copies, chains, Settings(), 0, lambda _: None)
    assert right == [[False] * 3]
    assert np.array_equal(seen[1], 255 - seen[0])


def test_comparisons_count_what_was_lost() -> None:
    score = EditScore(True, True, True, False, 40.0)
    better, worse = (
        {"backend": "a", "precision": p, "steps": 1, "scores": {"move": [row]}}
        for p, row in (("fp32", vars_of(score)), ("fp8", vars_of(replace(score, exact=False))))
    )
    found = quality.comparisons([better, worse], None)
    assert [(line["rows"], line["lost"], line["gained"]) for line in found] == [
        ("single", 1, 0),
        ("all", 1, 0),
    ]
    assert quality.comparisons([worse], {"runs": [better]})[0]["lost"] == 1


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        (["--seed", "3"], "seed 0 instead of 3;"),
        (["--split", "train"], "split held_out instead of train;"),
        (["--samples", "1"], "samples of move 2 instead of 1;"),
        (["--kinds", "swap"], "samples of swap none instead of 2, samples of move 2 instead of"),
    ],
)
def test_other_requests_are_refused_before_a_model_is_loaded(
    tmp_path: Path, options: list[str], differs: str
) -> None:
    file = tmp_path / "quality.json"
    runs = [{"scores": {"move": [[], []]}}]
    file.write_text(json.dumps({"schema": 1, "seed": 0, "split": "held_out", "runs": runs}))
    run = ["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--samples", "2"]
    with pytest.raises(InvalidInputError, match=f"found {differs}"):
        quality.main([*run, "--kinds", "move", *options, "--against", str(file)])
    assert not (tmp_path / "out").exists()


def vars_of(score: EditScore) -> list[Any]:
    return [getattr(score, field) for field in EditScore.__slots__]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "noise"
    spec = small_spec()
    write_checkpoint(folder, replace(spec, vae=replace(spec.vae, sample_size=128)))
    return folder


def test_end_to_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run = ["bench", "quality", "--model", str(model), *SHORT]
    assert main([*run, "--out", str(first), "--steps", "1,2", "--precision", "fp32"]) == 0
    assert "1 steps" in capsys.readouterr().out
    document = json.loads((first / "quality.json").read_text())
    assert [each["steps"] for each in document["runs"]] == [1, 2]
    for each in document["runs"]:
        assert {len(scores) for scores in each["scores"].values()} == {2}
        assert each["precision"] == "fp32"
        assert each["chains"] == {"n": 2, "exact": [0.0, 0.0]}
    assert document["summary"]["single"]["n"] == 2 * len(EDIT_KINDS)
    assert {line["steps"] for line in document["comparisons"]} == {2}
    common = read(first / "document.json")
    assert [row["name"] for row in common["results"]] == [
        "native fp32, 1 steps",
        "native fp32, 2 steps",
    ]
    for row, each in zip(common["results"], document["runs"], strict=True):
        assert row["quality"] == each["summary"]
    assert report([str(first / "document.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Exactly right" in page
    assert "recolour" in page
    for kind in KINDS:
        with Image.open(first / f"{kind}.png") as page:
            assert page.width > 3 * 128

    again = [*run, "--out", str(second), "--steps", "1", "--precision", "bf16"]
    assert main([*again, "--against", str(first / "quality.json")]) == 0
    lines = json.loads((second / "quality.json").read_text())["comparisons"]
    assert {line["precision"] for line in lines} == {"bf16"}
    assert main([*again, "--against", str(model / "model_index.json")]) == 2
    assert "of schema 1" in capsys.readouterr().err
