"""The document: its summary is numpy's, it keeps to its schema, and nothing else is read as one."""

import json
from pathlib import Path

import numpy as np
import pytest

from fluxkontext.bench.document import (
    P99_SAMPLES,
    SCHEMA,
    distribution,
    fault,
    memory,
    read,
    result,
    write,
)
from fluxkontext.runtime.errors import InvalidInputError

from .documents import full as example
from .documents import parameters


def test_a_distribution_is_what_numpy_says() -> None:
    values = np.random.default_rng(0).lognormal(size=250).tolist()
    found = distribution(values)
    assert found["values"] == values
    assert found["count"] == 250
    for q in (50, 90, 95, 99):
        assert found[f"p{q}"] == pytest.approx(np.quantile(values, q / 100), rel=1e-12)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["stdev"] == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize(("count", "known"), [(P99_SAMPLES - 1, False), (P99_SAMPLES, True)])
def test_one_in_a_hundred_needs_a_hundred(count: int, known: bool) -> None:
    assert (distribution(range(count))["p99"] is not None) is known


def test_one_sample_has_no_spread() -> None:
    found = distribution([2.0])
    assert found["stdev"] is None
    assert found["p50"] == found["p95"] == found["mean"] == 2.0


def test_the_schema_is_one() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text("utf-8")))


def test_written_and_read(tmp_path: Path) -> None:
    found = example()
    write(found, tmp_path / "new folder" / "run.json")
    assert read(tmp_path / "new folder" / "run.json") == found
    assert [f.name for f in (tmp_path / "new folder").iterdir()] == ["run.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_written(tmp_path: Path, value: float) -> None:
    found = example()
    found["results"][0]["latency"]["p50"] = value
    with pytest.raises(ValueError, match="Out of range float"):
        write(found, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match=r"run\.json: expected to write there"):
        write(example(), tmp_path / "file" / "run.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a benchmark document"),
        ("[]", "schema_version None instead of 1"),
        ('{"schema_version": 2}', "schema_version 2 instead of 1"),
        ('{"schema_version": 1}', r"'benchmark' is a required property"),
        (json.dumps({**example(), "more": 1}), "'more' was unexpected"),
    ],
)
def test_what_is_no_document(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.json").write_text(text, "utf-8")
    with pytest.raises(InvalidInputError, match=words):
        read(tmp_path / "x.json")


def test_a_summary_must_be_a_number() -> None:
    found = example()
    found["results"][0]["stages"]["denoise"]["p50"] = "fast"
    assert "$.results[0].stages.denoise.p50" in str(fault(found))


def test_a_row_takes_only_fields_that_there_are() -> None:
    with pytest.raises(TypeError, match="found speed"):
        result("x", "edit", parameters(), speed=1)
    assert result("x", "edit", parameters(), reason="no GPU")["status"] == "skipped"
    assert result("x", "edit", parameters())["status"] == "measured"


def test_memory_that_was_not_measured_is_null() -> None:
    assert memory(max_ram=3) == {
        "max_ram": 3,
        "max_allocated": None,
        "max_reserved": None,
        "max_process_vram": None,
        "max_global_vram": None,
        "predicted": None,
    }
