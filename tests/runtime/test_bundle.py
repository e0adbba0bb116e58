"""A bundle that is not what its manifest says is refused, whatever was changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fluxkontext.runtime import (
    BackendUnavailableError,
    CheckpointError,
    CorruptedError,
    KontextError,
    KontextPipeline,
    OutOfMemoryError,
    loader,
)
from fluxkontext.runtime import bundle as bundles
from fluxkontext.runtime.bundle import (
    digest,
    dump_manifest,
    open_bundle,
    read_manifest,
    update_manifest,
)
from fluxkontext.runtime.cli import main


@pytest.fixture
def copy(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own, and a cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(small_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def flip(file: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def names(bundle: Path) -> list[str]:
    return sorted(read_manifest(bundle)["files"])


def test_a_flipped_bit_in_any_file_is_found(copy: Path) -> None:
    files = names(copy)
    assert len(files) > 20
    for name in files:
        size = (copy / name).stat().st_size
        for byte in (0, size // 2, size - 1):
            flip(copy / name, byte)
            with pytest.raises(CorruptedError, match=f"{name}: expected digest .* found"):
                open_bundle(copy)
            flip(copy / name, byte)
    open_bundle(copy, "always")


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(copy: Path) -> None:
    size = (copy / "manifest.json").stat().st_size
    for byte in range(0, size, 7):
        for bit in (0, 5):
            flip(copy / "manifest.json", byte, bit)
            with pytest.raises((CorruptedError, CheckpointError)):
                open_bundle(copy)
            flip(copy / "manifest.json", byte, bit)
    open_bundle(copy)


def test_truncated_and_missing_files(copy: Path) -> None:
    graph = copy / "clip.cpu.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1])
    with pytest.raises(CorruptedError, match=f"expected {len(data)} bytes, found {len(data) - 1}"):
        open_bundle(copy, "never")
    graph.unlink()
    with pytest.raises(CheckpointError, match="expected this file of the bundle, found none"):
        open_bundle(copy, "never")


def test_a_missing_tokenizer_has_exit_code_3(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer" / "vocab.json").unlink()
    output = tmp_path / "o.png"
    assert main(["generate", "-p", "x", "--model", str(copy), "-o", str(output)]) == 3
    assert not output.exists()


def test_a_changed_file_has_exit_code_6(copy: Path, tmp_path: Path) -> None:
    flip(copy / "transformer.cpu.onnx", 100)
    output = tmp_path / "o.png"
    assert main(["generate", "-p", "x", "--model", str(copy), "-o", str(output)]) == 6
    assert main(["doctor", str(copy)]) == 6
    assert not output.exists()


def test_a_manifest_from_the_future(copy: Path) -> None:
    manifest = read_manifest(copy)
    manifest["schema_version"] = bundles.SCHEMA_VERSION + 1
    (copy / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(CheckpointError, match="upgrade fluxkontext"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "..\\outside"])
def test_names_that_lead_out_are_refused(copy: Path, name: str) -> None:
    manifest = read_manifest(copy)
    manifest["files"][name] = {"size": 0, "digest": ""}
    (copy / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(CorruptedError, match="inside the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../../tmp/x", {}),
        ("..", {}),
        ("", {}),
        ("ada", {"key": "/home/u/.ssh/authorized_keys"}),
        ("ada", {"key": "../" * 9 + "tmp/x"}),
        ("ada", {"key": "a" * 63}),
        ("ada", {"file": "../outside"}),
        ("ada", {"file": "/etc/hostname"}),
        ("ada", {"file": "unlisted.engine"}),
    ],
)
def test_engines_that_lead_out_are_refused(copy: Path, name: str, part: dict[str, str]) -> None:
    """Kernels are cached under the names of the set and the key: both would be written to."""

    def write(name: str, part: dict[str, str]) -> None:
        engine = {"file": "clip.cpu.onnx", "key": "0123456789abcdef" * 4, "profile": {}, **part}
        manifest = {**read_manifest(copy), "engines": {name: {"components": {"clip": engine}}}}
        (copy / "manifest.json").write_text(dump_manifest(manifest))

    write("tensorrt-rtx-sm_120", {})
    open_bundle(copy)
    write(name, part)
    with pytest.raises(CorruptedError, match=r"inside the bundle.*found '.*; do not use it"):
        open_bundle(copy)


def test_engines_of_an_older_version_are_to_be_built_again(copy: Path) -> None:
    """Which said whether they had passed, not where."""
    entry = {"qualified": False, "components": {}}
    manifest = {**read_manifest(copy), "engines": {"tensorrt-rtx-sm_120": entry}}
    (copy / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(CheckpointError, match="of an older version; build it again"):
        open_bundle(copy)


@pytest.mark.parametrize("graph", ["../outside.onnx", "/etc/hostname", "unlisted.onnx"])
def test_a_graph_that_is_not_verified_is_refused(copy: Path, graph: str) -> None:
    manifest = read_manifest(copy)
    manifest["components"]["clip"]["graphs"]["cpu"] = graph
    (copy / "manifest.json").write_text(dump_manifest(manifest))
    shutil.copy(copy / "clip.cpu.onnx", copy / "unlisted.onnx")
    with pytest.raises(CorruptedError, match="of files that it lists"):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema_version": "x"}', "\xff"])
def test_a_manifest_of_something_else(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises((CorruptedError, CheckpointError)):
        open_bundle(copy)


def test_large_files_are_hashed_once_per_change(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 'large' made small: a second load trusts the stamp, a changed file is read again."""
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(bundles, "digest", counting)
    monkeypatch.setattr(bundles, "_LARGE", 100_000)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    counts = []
    for _ in range(2):
        hashed.clear()
        open_bundle(copy)
        counts.append(hashed.count(weights.name))
    assert counts == [2, 0]  # the transformer's and the VAE's, then neither
    flip(weights, weights.stat().st_size - 1)
    with pytest.raises(CorruptedError):
        open_bundle(copy)
    flip(weights, weights.stat().st_size - 1)
    hashed.clear()
    open_bundle(copy, "always")
    assert hashed.count(weights.name) == 2


def test_a_digest_is_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, against a plain computation."""
    import hashlib

    monkeypatch.setattr(bundles, "_CHUNK", 1000)
    data = os.urandom(3500)
    (tmp_path / "file").write_bytes(data)
    parts = [hashlib.sha256(data[i : i + 1000]).digest() for i in range(0, 3500, 1000)]
    assert digest(tmp_path / "file") == hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_bundle_that_cannot_be_written_says_what_to_do(copy: Path) -> None:
    (copy / ".manifest.lock").mkdir()  # permissions would not hold a root user
    with pytest.raises(KontextError, match=r"can be written, found: .*; copy it to a") as caught:
        update_manifest(copy, lambda it: it.update(model="other"))
    assert "\n" not in str(caught.value)


def test_inspect_and_doctor(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(copy), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "bundle"
    assert set(facts["components"]) == {
        "clip", "t5", "vae_encoder", "modulation", "transformer", "vae_decoder",
    }  # fmt: skip
    assert main(["doctor", str(copy), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bundle"]["files verified"] == len(names(copy))
    assert facts["backends"]["onnx"]["available"] is True


@pytest.mark.parametrize("error", [BackendUnavailableError, OutOfMemoryError])
def test_doctor_reports_a_bundle_that_nothing_can_replay(
    error: type[KontextError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the report is what tells why."""

    def fail(*_: object) -> None:
        raise error("expected more")

    if error is BackendUnavailableError:
        monkeypatch.setattr(loader, "find_spec", lambda _: None)  # as in the core installation
    else:
        monkeypatch.setattr("fluxkontext.runtime.doctor.replay", fail)
    assert main(["doctor", "mini", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bundle"]["files verified"] > 20
    assert facts["bundle"]["golden edit"].startswith("not replayed: expected ")
    assert "backends" in facts


def test_a_cache_that_cannot_be_written_does_not_matter(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_LARGE", 100_000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with KontextPipeline.from_pretrained(copy, device="cpu") as pipe:
        assert pipe.about["backend"] == "onnx"
