"""The licence of weights goes where they go, and what is made of them says which it is."""

import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from fluxkontext.export import bundle as exporter
from fluxkontext.export.bundle import write_bundle
from fluxkontext.export.pack import packed
from fluxkontext.export.quantize import write_quantised
from fluxkontext.runtime.bundle import read_manifest
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.inspection import inspect

from .test_embed import schema

CARD = """---
language:
- en
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
---
# A model
license: of another kind
"""
NAME = "flux-1-dev-non-commercial-license"


@pytest.fixture
def model(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to add files to; graphs have no part in this."""
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "# A model\nlicense: mit\n"}, None),
        ({"README.md": ""}, None),
        ({"README.md": "---\nlicense: 'apache-2.0'\n---\n"}, {"name": "apache-2.0", "files": []}),
        ({"README.md": "---\nlicense: other\n---\n"}, {"name": "other", "files": []}),
        ({"LICENSE.txt": "text"}, {"name": None, "files": ["LICENSE.txt"]}),
        ({"README.md": CARD, "LICENSE.md": "text"}, {"name": NAME, "files": ["LICENSE.md"]}),
    ],
    ids=str,
)
def test_it_is_found_and_copied(
    files: dict[str, str], licence: dict[str, object] | None, model: Path, tmp_path: Path
) -> None:
    for name, text in files.items():
        (model / name).write_text(text, encoding="utf-8")
    write_bundle(find(model, {}), tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["licence"] == licence
    part = schema()["properties"]["licence"]
    Draft202012Validator({**part, "$defs": schema()["$defs"]}).validate(licence)
    assert inspect(tmp_path / "bundle").get("licence") == licence
    for name in licence["files"] if licence else []:
        assert (tmp_path / "bundle" / str(name)).read_text() == files[str(name)]
        assert name in manifest["files"]
        assert name in packed(manifest)["files"]


def test_a_quantised_checkpoint_keeps_it(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text(CARD, encoding="utf-8")
    (model / "LICENSE.md").write_text("text", encoding="utf-8")
    write_quantised(find(model, {}), tmp_path / "quantised", "nvfp4")
    write_bundle(find(tmp_path / "quantised", {}), tmp_path / "bundle")
    wanted = {"name": NAME, "files": ["LICENSE.md"]}
    assert read_manifest(tmp_path / "bundle")["licence"] == wanted


def test_a_manifest_without_it_is_read(model: Path, tmp_path: Path) -> None:
    """As of bundles that were made before."""
    write_bundle(find(model, {}), tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    del manifest["licence"]
    assert packed(manifest)["tokenizers"] == manifest["tokenizers"]
    assert "licence" not in schema()["required"]
