"""The command line: results on stdout, one line on stderr for an error, and its exit code."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxkontext.runtime import __version__

from .commands import Run, assert_error


def test_an_edit(run: Run, edit: list[object], tmp_path: Path) -> None:
    code, out, err = run(*edit)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out.png'} (80x48, seed 7)\n"
    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (80, 48))


def test_the_same_seed_gives_the_same_file(run: Run, edit: list[object], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert run(*edit, "-o", file, "--seed", seed)[0] == 0
    first, same, other = (file.read_bytes() for file in files)
    assert first == same
    assert first != other


def test_a_report_as_json(run: Run, edit: list[object], tmp_path: Path) -> None:
    code, out, err = run(*edit, "--json", "-n", 2)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert out.count("\n") == 1
    assert sorted(report) == ["outputs", "settings", "timings"]
    assert report["outputs"] == [str(tmp_path / f"out-{i}.png") for i in (1, 2)]
    assert [settings["index"] for settings in report["settings"]] == [0, 1]
    assert report["timings"]["total"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.png", "out-2.png"]


def test_settings_are_in_the_picture_unless_not_wanted(
    run: Run, edit: list[object], tmp_path: Path
) -> None:
    prompt = "mach den Kreis blau, 円 🎨"
    assert run(*edit, "-p", prompt)[0] == 0
    code, out, _ = run("inspect", tmp_path / "out.png", "--json")
    facts = json.loads(out)
    assert (code, facts["kind"], facts["size"]) == (0, "picture", "80x48")
    assert facts["settings"]["prompt"] == prompt
    assert facts["settings"]["seed"] == 7
    code, out, _ = run("inspect", tmp_path / "out.png")
    assert f"prompt: {prompt}" in out

    assert run(*edit, "-p", prompt, "--no-metadata")[0] == 0
    assert json.loads(run("inspect", tmp_path / "out.png", "--json")[1])["settings"] is None
    assert b"fluxkontext" not in (tmp_path / "out.png").read_bytes()


def test_several_contexts(run: Run, edit: list[object], scene: Path, tmp_path: Path) -> None:
    files = []
    for layout in ("index", "offset"):
        files.append(tmp_path / f"{layout}.png")
        code, out, err = run(
            *edit[:2], scene, *edit[2:], "--context-layout", layout, "-o", files[-1], "--json"
        )
        assert (code, err) == (0, "")
        (settings,) = json.loads(out)["settings"]
        assert len(settings["contexts"]) == 2
        assert settings["context_layout"] == layout
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--size", "48x32"], "48x32"),
        (["--size", "50X47"], "48x32"),
        (["--size", "auto"], "80x48"),
        (["--no-auto-resize"], "64x32"),
    ],
)
def test_sizes(run: Run, edit: list[object], options: list[str], size: str) -> None:
    code, out, _ = run(*edit, *options)
    assert code == 0
    assert f"({size}, seed 7)" in out


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".PNG"])
def test_other_kinds_of_output(run: Run, edit: list[object], tmp_path: Path, suffix: str) -> None:
    assert run(*edit, "-o", tmp_path / f"out{suffix}")[0] == 0
    with Image.open(tmp_path / f"out{suffix}") as picture:
        assert picture.size == (80, 48)


def test_text_to_image(run: Run, edit: list[object], tmp_path: Path) -> None:
    code, out, err = run("generate", *edit[2:])
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out.png'} (64x64, seed 7)\n"
    code, out, _ = run("generate", *edit[2:-2], "--json")
    seed = json.loads(out)["settings"][0]["seed"]
    assert 0 <= seed < 2**32
    first = (tmp_path / "out.png").read_bytes()
    run("generate", *edit[2:-2], "--seed", seed)
    assert (tmp_path / "out.png").read_bytes() == first


def test_a_negative_prompt(run: Run, edit: list[object], tmp_path: Path) -> None:
    run(*edit)
    plain = (tmp_path / "out.png").read_bytes()
    code, out, _ = run(*edit, "--negative-prompt", "blue", "--true-cfg", 3, "--json")
    assert code == 0
    (settings,) = json.loads(out)["settings"]
    assert (settings["negative_prompt"], settings["true_cfg_scale"]) == ("blue", 3)
    assert (tmp_path / "out.png").read_bytes() != plain


def test_pictures_are_saved_before_the_model_goes(
    run: Run, edit: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxkontext.runtime import KontextPipeline

    left: list[bool] = []
    close = KontextPipeline.close

    def watched(pipe: KontextPipeline) -> None:
        left.append((tmp_path / "out.png").is_file())
        close(pipe)

    monkeypatch.setattr(KontextPipeline, "close", watched)
    assert run(*edit)[0] == 0
    assert left == [True]


def test_parts_from_elsewhere(
    run: Run, edit: list[object], small_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer_2")
    assert_error(run(*edit, "--model", model), 3, "text_encoder")
    parts = ["--text-encoder", small_model, "--tokenizer-2", small_model / "tokenizer_2"]
    assert run(*edit, "--model", model, *parts)[0] == 0


# inspect and doctor


def test_inspect_a_folder(run: Run, small_model: Path) -> None:
    code, out, err = run("inspect", small_model, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["kind"] == "diffusers folder"
    assert sorted(facts["networks"]) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    transformer = facts["networks"]["transformer"]
    assert transformer["dtypes"] == {"F32": transformer["tensors"]}
    assert transformer["bytes"] == 4 * transformer["parameters"]
    assert transformer["config"]["depth"] == 1
    code, out, _ = run("inspect", small_model / "vae")
    assert code == 0
    assert "kind: network\n" in out
    assert "    layout: diffusers\n" in out


def test_inspect_a_single_file(run: Run, small_model: Path, tmp_path: Path) -> None:
    (file,) = (small_model / "transformer").glob("*.safetensors")
    facts = json.loads(run("inspect", file, "--json")[1])
    assert facts["kind"] == "single file"
    assert list(facts["networks"]) == ["transformer"]
    assert facts["metadata"] == {"format": "pt"}
    whole = json.loads(run("inspect", small_model, "--json")[1])
    assert facts["networks"]["transformer"] == whole["networks"]["transformer"]
    alone = Path(shutil.copy(file, tmp_path))
    facts = json.loads(run("inspect", alone, "--json")[1])
    assert "config" not in facts["networks"]["transformer"]
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2, 3, dtype=torch.int64), "b": torch.ones(5).bool()}, other)
    facts = json.loads(run("inspect", other, "--json")[1])
    assert facts["kind"] == "safetensors file of no known network"
    assert facts["tensors"] == {
        "tensors": 2, "parameters": 11, "bytes": 53, "dtypes": {"I64": 1, "BOOL": 1}
    }  # fmt: skip


def test_inspect_a_picture_of_somebody_else(run: Run, scene: Path) -> None:
    code, out, err = run("inspect", scene)
    assert (code, err) == (0, "")
    assert out == "kind: picture\nformat: PNG\nsize: 70x40\nmode: RGB\nsettings: none\n"


def test_inspect_what_it_cannot(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "folder").mkdir()
    assert_error(run("inspect", tmp_path / "text.txt"), 2, "expected an image", "text.txt")
    assert_error(run("inspect", tmp_path / "text.safetensors"), 3, "damaged", "text.safetensors")
    assert_error(run("inspect", tmp_path / "folder"), 3, "expected a diffusers folder")
    assert_error(run("inspect", tmp_path / "nothing"), 3, "expected a folder, a file")
    assert_error(run("inspect"), 2, "path", "--help")


def test_doctor(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert f"fluxkontext: {__version__}\n" in out
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    native = facts["backends"]["native"]
    assert native["available"] is True
    device = native["devices"][0]
    kernels = device.pop("kernels (fp32)")
    assert device == {"device": "cpu", "precisions": ["fp32", "bf16", "fp16"]}
    assert kernels["norm_rope"]["complex"] == "passes"
    assert "need a CUDA device" in kernels["norm_rope"]["triton"]


def test_doctor_replays_on_a_device_of_ones_choice(run: Run) -> None:
    code, out, _ = run("doctor", "mini", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["bundle"]["golden edit"]["precision"] == "fp32"
    assert_error(run("doctor", "--device", "cuda:1"), 2, "--device: expected a bundle")


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"fluxkontext {__version__}\n", "")
    for arguments in (["--help"], ["edit", "--help"], ["inspect", "--help"]):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert out.startswith("usage: fluxkontext")
