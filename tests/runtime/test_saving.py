"""Pictures are written whole or not at all, and their settings come back out of them."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fluxkontext.runtime import EditResult, InvalidInputError, KontextError
from fluxkontext.runtime.images import check_output, read_settings, save

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


class Broken(Image.Image):
    """A picture whose writing fails half way, as on a full disk."""

    def save(self, fp: Any, format: str | None = None, **_: Any) -> None:
        fp.write(b"half of it")
        fp.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Interrupted(Broken):
    def save(self, fp: Any, format: str | None = None, **_: Any) -> None:
        fp.write(b"half of it")
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("picture", "error"), [(Broken, KontextError), (Interrupted, KeyboardInterrupt)]
)
@pytest.mark.parametrize("before", [b"what was there before", None])
def test_a_file_is_written_whole_or_not_at_all(
    picture: type[Image.Image], error: type[BaseException], before: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "out.png"
    if before:
        file.write_bytes(before)
    with pytest.raises(error):
        save(picture(), file, None)
    assert [path.name for path in tmp_path.iterdir()] == (["out.png"] if before else [])
    assert not before or file.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one: every write to the temporary file goes to a device that has no room."""
    real = Path.open

    def onto_full_device(path: Path, mode: str) -> Any:
        file = real(path, mode)
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        return file

    monkeypatch.setattr(Path, "open", onto_full_device)
    with pytest.raises(KontextError, match=r"expected to write an image, found: .*No space left"):
        save(Image.fromarray(RGB), tmp_path / "out.png", None)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_is_replaced_and_keeps_usual_permissions(tmp_path: Path) -> None:
    file, other = tmp_path / "out.png", tmp_path / "other"
    for _ in range(2):
        save(Image.fromarray(RGB), file, None)
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode
    np.testing.assert_array_equal(np.asarray(Image.open(file)), RGB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out.png"]


def test_the_umask_holds_and_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the whole process's: changed for a moment, it is another thread's for that moment."""
    usual, before = os.umask, os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    try:
        save(Image.fromarray(RGB), tmp_path / "out.png", None)
    finally:
        usual(before)
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "suffix", [".png", ".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".tiff", ".gif"]
)
def test_outputs_by_suffix(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a picture{suffix}"
    check_output(file)
    save(Image.fromarray(RGB), file, {"seed": 1})
    with Image.open(file) as found:
        assert found.size == (9, 6)
        expected = {"seed": 1} if suffix.lower() == ".png" else None
        assert read_settings(found) == expected


def test_a_name_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 251 + ".png")
    check_output(file)
    save(Image.fromarray(RGB), file, None)
    assert file.is_file()


@pytest.mark.parametrize(
    "name",
    [
        "out",
        "out.",
        ".png",
        "out.txt",
        "out.png.exe",
        "out.psd",
        "out.h5",
        "missing/out.png",
        "folder.png",
        "file.txt/out.png",
        "x" * 300 + ".png",
        "",
    ],
)
def test_outputs_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(InvalidInputError, match="expected") as caught:
        check_output(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.png"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_folder_that_takes_no_files() -> None:
    """Permissions do not tell, above all not to root."""
    with pytest.raises(InvalidInputError, match="expected a place that can be written"):
        check_output(Path("/proc/out.png"))


def result(settings: dict[str, Any], count: int = 1) -> EditResult:
    picture = Image.fromarray(RGB)
    return EditResult([picture] * count, [0] * count, [[]] * count, [settings] * count, {})


texts = st.text(max_size=60) | st.text(
    st.characters(categories=["Cc", "Cs", "Co", "Zl"]), max_size=9
)


@given(prompt=texts)
@example(prompt="mach den Kreis blau – ÄÖÜ ß 円を青く 🎨\n\0\t\"'\\")
@example(prompt="\ud800 lone surrogate")
@example(prompt="x" * 200_000)
def test_settings_come_back_out_of_a_png(
    tmp_path_factory: pytest.TempPathFactory, prompt: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "settings.png"
    settings = {"prompt": prompt, "seed": 2**40, "size": "9x6", "contexts": [{"source": "1x1"}]}
    result(settings).save(file, metadata=True)
    with Image.open(file) as picture:
        assert read_settings(picture) == settings


def test_settings_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    (file,) = result({"prompt": "secret"}).save(tmp_path / "out.png")
    assert b"secret" not in file.read_bytes()
    with Image.open(file) as picture:
        assert read_settings(picture) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_foreign_settings_are_none(text: str) -> None:
    picture = Image.new("RGB", (1, 1))
    picture.info["fluxkontext"] = text
    assert read_settings(picture) is None


def test_several_pictures_are_numbered(tmp_path: Path) -> None:
    paths = result({}, count=3).save(tmp_path / "out.v2.png")
    assert [path.name for path in paths] == ["out.v2-1.png", "out.v2-2.png", "out.v2-3.png"]
    assert sorted(tmp_path.iterdir()) == paths


def test_no_picture_is_written_when_one_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "out-2.png").mkdir()
    with pytest.raises(InvalidInputError, match=r"out-2\.png"):
        result({}, count=3).save(tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out-2.png"]


def test_arrays_are_not_saved(tmp_path: Path) -> None:
    arrays = EditResult(np.zeros((1, 4, 4, 3), np.float32), [0], [[]], [{}], {})
    with pytest.raises(InvalidInputError, match="expected output_type 'pil', found arrays"):
        arrays.save(tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []
