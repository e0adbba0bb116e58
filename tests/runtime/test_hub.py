"""A model by its hub id: found in the local cache, whole, or an error that says what to do."""

import os
import shutil
from pathlib import Path

import pytest

from fluxkontext.runtime import KontextPipeline

from .problems import problem_of


def hub(tmp_path: Path, source: Path, repo: str = "black-forest-labs/FLUX.1-Kontext-dev") -> Path:
    """A cache as the hub's library lays it out: files are links to blobs."""
    folder = tmp_path / "home" / "hub" / f"models--{repo.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = folder / "snapshots" / revision, folder / "blobs"
    blobs.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for i, file in enumerate(path for path in source.rglob("*") if path.is_file()):
        (blobs / f"{i:064x}").write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{i:064x}", link.parent))
    return folder


def test_a_hub_id_in_the_cache(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(tmp_path, small_model)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    repo = "black-forest-labs/FLUX.1-Kontext-dev"
    with KontextPipeline.from_pretrained(repo, device="cpu") as pipe:
        assert pipe.name == repo
        assert pipe(prompt="", num_inference_steps=1, seed=0).settings[0]["model"] == repo
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    KontextPipeline.from_pretrained(repo, device="cpu").close()


@pytest.mark.parametrize("broken", ["nothing", "empty", "no ref", "ref to nothing"])
def test_a_hub_id_that_is_not_in_the_cache(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    if broken != "nothing":
        folder = hub(tmp_path, small_model / "tokenizer")
        if broken == "no ref":
            (folder / "refs" / "main").unlink()
        elif broken == "ref to nothing":
            (folder / "refs" / "main").write_text("f" * 40)
        else:
            shutil.rmtree(folder)
            folder.mkdir()
    repo = "black-forest-labs/FLUX.1-Kontext-dev"
    problem = problem_of(lambda: KontextPipeline.from_pretrained(repo))
    assert problem == (
        f"{repo}: expected a path or a model in the local cache {tmp_path / 'home' / 'hub'}, found "
        f"neither; accept its licence at https://huggingface.co/{repo} and run: hf download {repo}"
    )


def test_a_half_downloaded_snapshot(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub(tmp_path, small_model)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    weights = next(folder.glob("snapshots/*/vae/*.safetensors"))
    os.remove(weights.resolve())  # the link hangs
    problem = problem_of(
        lambda: KontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev")
    )
    assert "vae" in problem
