"""Which files of a folder are its weights: by their names, by an index, and never a guess."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fluxkontext.runtime import CheckpointError
from fluxkontext.runtime.weights import find_files, read_json

from .json_files import json_values


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.safetensors"


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected 2 shards, found no model-2\.safetensors"):
        find_files(tmp_path)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("variant", ["diffusion_pytorch_model.fp16", "a", "z"])
def test_the_usual_name_comes_before_variants(sharded: bool, variant: str, tmp_path: Path) -> None:
    """Whichever is first in the alphabet, and whichever has shards."""
    for name in (variant, "diffusion_pytorch_model"):
        file = tmp_path / f"{name}.safetensors"
        if sharded or name == variant:
            index = {"weight_map": {"a": f"{name}-1.safetensors"}}
            (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
            file = tmp_path / f"{name}-1.safetensors"
        save_file({"a": torch.ones(2)}, file)
    assert find_files(tmp_path) == [file]


def test_one_of_several_variants_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found a\.safetensors\.index\.json, b\.safe"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "", ".", "a/b.safetensors"]
)
def test_an_index_names_only_files_beside_it(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="expected"):
        find_files(tmp_path)


@given(value=json_values | st.fixed_dictionaries({"weight_map": json_values}))
def test_any_json_as_an_index(value: object, scratch: Path) -> None:
    index = scratch.with_name("model.safetensors.index.json")
    index.write_text(json.dumps(value))
    try:
        files = find_files(index.parent)
    except CheckpointError:
        pass
    else:
        assert value == {"weight_map": {}}
        assert files == []
    finally:
        index.unlink()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b"\0", b"[" * 200_000, b"9" * 9999],
    ids=lambda content: repr(content[:8]),
)
def test_json_that_is_no_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        read_json(tmp_path / "config.json")


def test_json_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(CheckpointError, match="expected"):
            read_json(path)


def test_a_folder_without_weights_or_with_too_many(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        find_files(tmp_path)
    for name in ("a", "b"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"found a\.safetensors, b\.safetensors"):
        find_files(tmp_path)
