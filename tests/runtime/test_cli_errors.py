"""What the command line refuses: one line on stderr, its exit code, and no file."""

import os
import shutil
from pathlib import Path

import pytest

from .commands import Run, assert_error, command


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["improve"],
        ["edit"],
        ["edit", "scene.png"],
        ["edit", "-p", "x", "-o", "out.png", "--model", "m"],
        ["inspect", "a", "b"],
        ["doctor", "--loudly"],
    ],
)
def test_usage(run: Run, arguments: list[str]) -> None:
    assert_error(run(*arguments), 2, "; see fluxkontext", "--help")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--size", "big"], "--size: expected WxH, each 1 to 8192, or auto, found 'big'"),
        (["--size", "64"], "--size"),
        (["--size", "64x"], "--size"),
        (["--size", "-1x64"], "--size"),
        (["--size", "0x64"], "--size"),
        (["--size", "64x64x64"], "--size"),
        (["--size", "1x8192"], "size: expected sides of"),
        (["--size", "1000000x1000000"], "--size"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1000000000"], "--steps"),
        (["--steps", "2.5"], "--steps"),
        (["-n", "0"], "--num-images"),
        (["-n", "-1"], "--num-images"),
        (["--seed", "seven"], "--seed"),
        (["--guidance", "nan"], "guidance_scale"),
        (["--guidance", "strong"], "--guidance"),
        (["--true-cfg", "inf", "--negative-prompt", "blue"], "true_cfg_scale"),
        (["--true-cfg", "4"], "--true-cfg: expected --negative-prompt beside it, found none"),
        (["--true-cfg", "0.5"], "--true-cfg: expected --negative-prompt"),
        (["--negative-prompt", "blue"], "--negative-prompt: expected --true-cfg above 1 beside it"),
        (["--negative-prompt", "blue", "--true-cfg", "nan"], "above 1 beside it, found nan"),
        (["--deadline", "0"], "deadline"),
        (["--deadline", "nan"], "deadline"),
        (["--context-layout", "sideways"], "--context-layout"),
        (["--backend", "magic"], "backend"),
        (["-p", "\udcff"], "prompt: expected Unicode"),
    ],
)
def test_wrong_options(
    run: Run, edit: list[object], tmp_path: Path, options: list[str], part: str
) -> None:
    assert_error(run(*edit, *options), 2, part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("text.png", b"this is text", "expected an image"),
        ("empty.png", b"", "expected an image"),
        ("bomb.png", None, "expected"),
        ("cut.png", None, "expected a whole picture"),
        ("none.png", None, "expected an image file, found none"),
    ],
)
def test_wrong_pictures(
    run: Run,
    edit: list[object],
    scene: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    part: str,
) -> None:
    file = tmp_path / name
    if name == "bomb.png":
        data = bytearray(scene.read_bytes())
        data[16:24] = (100_000).to_bytes(4, "big") * 2
        import zlib

        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        content = bytes(data)
    elif name == "cut.png":
        content = scene.read_bytes()[:2000]
    if content is not None:
        file.write_bytes(content)
    assert_error(run("edit", file, *edit[2:]), 2, str(file), part)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "output",
    [
        "missing/out.png",
        "out.txt",
        "out",
        "folder.png",
        "file.txt/out.png",
        "x" * 300 + ".png",
        ".",
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_that_cannot_be_written(
    run: Run, edit: list[object], tmp_path: Path, output: str, count: int
) -> None:
    for folder in ("folder.png", "folder-1.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file.txt").touch()
    outcome = run(*edit, "--model", "not looked at", "-o", tmp_path / output, "-n", count)
    assert_error(outcome, 2, "expected")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_folder_that_takes_no_files(run: Run, edit: list[object]) -> None:
    outcome = run(*edit, "--model", "not looked at", "-o", "/proc/out.png")
    assert_error(outcome, 2, "expected a place that can be written")


def test_weights_that_are_missing_or_damaged(
    run: Run, edit: list[object], small_model: Path, tmp_path: Path
) -> None:
    assert_error(run(*edit, "--model", tmp_path / "no model"), 3, "expected a folder")
    assert_error(run(*edit, "--model", "nobody/nothing"), 3, "hf download nobody/nothing")
    (file,) = (small_model / "transformer").glob("*.safetensors")
    assert_error(
        run(*edit, "--model", file), 3, "--vae, --text-encoder, --text-encoder-2, --tokenizer"
    )
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    (file,) = (model / "vae").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    assert_error(run(*edit, "--model", model), 3, str(file), "damaged")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("options", [["--device", "cuda:99"], ["--precision", "fp4"]])
def test_what_this_machine_cannot_run(run: Run, edit: list[object], options: list[str]) -> None:
    assert_error(run(*edit, *options), 1, "expected", options[1])


def test_a_deadline_leaves_no_output(run: Run, edit: list[object], tmp_path: Path) -> None:
    outcome = run(*edit, "--deadline", 0.05, "--steps", 1000)
    assert_error(outcome, 7, "expected to finish in 0.05 s")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_and_keeps_the_code(
    edit: list[object], namespace_env: dict[str, str], tmp_path: Path
) -> None:
    done = command([*edit, "--model", "no model", "--debug"], namespace_env, tmp_path)
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fluxkontext: no model: expected")
