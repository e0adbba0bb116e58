"""Networks that are taken over as they are."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fluxkontext.export import bundle as exporter
from fluxkontext.export.bundle import write_bundle
from fluxkontext.export.model_folder import link_network
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.weights import find_files


def test_shards_come_with_their_own_index(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a checkpoint and into a bundle. Beside them lies a variant, with an index of its own
    that sorts before."""
    folder = Path(shutil.copytree(small_model, tmp_path / "model")) / "text_encoder_2"
    (whole,) = find_files(folder)
    tensors = sorted(load_file(whole).items())
    whole.unlink()
    for variant in ("", ".fp16"):
        parts = {f"model{variant}-{i}.safetensors": dict(tensors[i::2]) for i in (0, 1)}
        for name, part in parts.items():
            save_file(part, folder / name)
        places = {key: name for name, part in parts.items() for key in part}
        index = json.dumps({"weight_map": places})
        (folder / f"model{variant}.safetensors.index.json").write_text(index, encoding="utf-8")
    checkpoint = find(tmp_path / "model", {})
    link_network(checkpoint.text_encoder_2, tmp_path / "linked")
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])  # placing is what is looked at
    write_bundle(checkpoint, tmp_path / "bundle")
    for copy in (tmp_path / "linked", tmp_path / "bundle" / "text_encoder_2"):
        names = {path.name for path in copy.iterdir()}
        shards = {"model-0.safetensors", "model-1.safetensors"}
        assert names == {*shards, "model.safetensors.index.json", "config.json"}
        assert {file.name for file in find_files(copy)} == shards
