"""Any picture that a user may hold; and files that are none."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxkontext.runtime import InvalidInputError
from fluxkontext.runtime.images import MAX_PIXELS, open_picture, read_picture, resize, to_pixels

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
ALPHA = np.where(np.indices((6, 9)).sum(0) % 2, 255, 0).astype(np.uint8)
HOLES = np.where(ALPHA[:, :, None] == 255, RGB, 255)
GREY_RGB = np.repeat(GREY[:, :, None], 3, axis=2)
GREY_HOLES = np.where(ALPHA[:, :, None] == 255, GREY_RGB, 255)
RGBA = np.dstack([RGB, ALPHA])
BLACK_AND_WHITE = np.where(GREY_RGB > 127, 255, 0).astype(np.uint8)
GREY_16 = GREY.astype(np.uint16) * 257


def reopened(picture: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    """As it comes out of a file."""
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return Image.open(file)


def palette(transparency: int | None = None) -> Image.Image:
    """Index 0 is red, 1 green, 2 blue."""
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) % 3)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)[
    np.arange(6).reshape(2, 3) % 3
]
NO_GREEN = COLOURS.copy()
NO_GREEN[:, 1] = 255


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


UNIT = (RGB / 255).astype(np.float32)
EXACT: dict[str, tuple[Any, Any]] = {
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBA over white": (Image.fromarray(RGBA), HOLES),
    "RGBa": (Image.fromarray(RGBA).convert("RGBa"), HOLES),
    "LA": (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), GREY_HOLES),
    "La": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]).convert("La"),
        GREY_HOLES,
    ),
    "PA": (palette().convert("PA"), COLOURS),
    "P": (palette(), COLOURS),
    "P from a PNG": (reopened(palette()), COLOURS),
    "P with a transparent colour": (reopened(palette(1), transparency=1), NO_GREEN),
    "P with transparency from a GIF": (reopened(palette(), "GIF", transparency=1), NO_GREEN),
    "RGB with tRNS": (
        reopened(Image.fromarray(COLOURS), transparency=(0, 255, 0)),
        NO_GREEN,
    ),
    "L with tRNS": (
        reopened(Image.fromarray(np.array([[0, 9]], np.uint8)), transparency=0),
        np.array([[[255] * 3, [9] * 3]], np.uint8),
    ),
    "L": (Image.fromarray(GREY), GREY_RGB),
    "1": (Image.fromarray(GREY > 127), BLACK_AND_WHITE),
    "1 from a PNG": (reopened(Image.fromarray(GREY > 127)), BLACK_AND_WHITE),
    "I;16": (Image.fromarray(GREY_16), GREY_RGB),
    "I;16 from a PNG": (reopened(Image.fromarray(GREY_16)), GREY_RGB),
    "I;16 from a TIFF": (reopened(Image.fromarray(GREY_16), "TIFF"), GREY_RGB),
    "I;16B": (
        Image.frombytes("I;16B", (9, 6), GREY_16.astype(">u2").tobytes()),
        GREY_RGB,
    ),
    "I": (Image.fromarray(GREY_16.astype(np.int32)), GREY_RGB),
    "I beyond 16 bits": (
        Image.fromarray(np.array([[-5, 0, 65535, 2**30]], np.int32)),
        np.array([[[0] * 3, [0] * 3, [255] * 3, [255] * 3]], np.uint8),
    ),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), GREY_RGB),
    "HWC uint8": (RGB, RGB),
    "HWC uint8, four channels": (RGBA, HOLES),
    "HW uint8": (GREY, GREY_RGB),
    "HW1 uint8": (GREY[:, :, None], GREY_RGB),
    "HW bool": (GREY > 127, BLACK_AND_WHITE),
    "HWC uint16": (RGB.astype(np.uint16) * 257, RGB),
    "HWC uint16, other byte order": ((RGB.astype(np.uint16) * 257).astype(">u2"), RGB),
    "HWC float32": (UNIT, RGB),
    "HWC float64": (RGB / 255, RGB),
    "HWC float16": (UNIT.astype(np.float16), RGB),
    "HWC float -1..1": (2 * UNIT - 1, RGB),
    "HWC float, four channels": ((RGBA / 255).astype(np.float32), HOLES),
    "HWC strided": (np.repeat(RGB, 2, axis=0)[::2], RGB),
    "HWC mirrored view": (np.ascontiguousarray(RGB[::-1])[::-1], RGB),
    "HWC read-only": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
    "CHW uint8 tensor": (tensor(RGB), RGB),
    "CHW float tensor": (tensor(UNIT), RGB),
    "CHW float tensor -1..1": (tensor(2 * UNIT - 1), RGB),
    "CHW float64 tensor with gradient": (tensor(RGB / 255).requires_grad_(), RGB),
    "CHW float16 tensor": (tensor(UNIT).half(), RGB),
    "1HW tensor": (tensor(UNIT[:, :, :1]), GREY_RGB),
    "HW tensor": (torch.from_numpy(UNIT[:, :, 0].copy()), GREY_RGB),
    "4HW tensor": (tensor(RGBA), HOLES),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_just_works(name: str) -> None:
    picture, pixels = EXACT[name]
    found = to_pixels(picture)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, pixels)


def test_bfloat16_is_as_near_as_it_can_be() -> None:
    found = to_pixels(tensor(UNIT).bfloat16())
    assert np.abs(found.astype(int) - RGB).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_colour_models(mode: str) -> None:
    smooth = np.dstack([np.full((8, 8), value, np.uint8) for value in (200, 100, 40)])
    found = to_pixels(Image.fromarray(smooth).convert(mode))
    assert np.abs(found.astype(int) - smooth).max() <= 5


def test_a_cmyk_jpeg() -> None:
    smooth = Image.new("RGB", (16, 16), (200, 100, 40)).convert("CMYK")
    found = to_pixels(reopened(smooth, "JPEG", quality=100))
    assert np.abs(found.astype(int) - [200, 100, 40]).max() <= 4


UPRIGHT: dict[int, Callable[[Any], Any]] = {  # orientation -> how the camera stored it
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_are_turned_upright(orientation: int, kind: str) -> None:
    """Four quarters of different colours tell all eight apart; wider than high."""
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16, :24], scene[:16, 24:] = (250, 0, 0), (0, 250, 0)
    scene[16:, :24], scene[16:, 24:] = (0, 0, 250), (250, 250, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](scene)))
    options = {"quality": 100} | ({"subsampling": 0} if kind == "JPEG" else {"lossless": True})
    found = to_pixels(reopened(stored, kind, exif=exif, **options))
    assert found.shape == scene.shape
    assert np.abs(found.astype(int) - scene).max() <= 8


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40, b"x"])
def test_damaged_metadata_does_not_matter(exif: bytes) -> None:
    picture = reopened(Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(to_pixels(picture), RGB)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3), (15, 17)])
def test_tiny_sides(size: tuple[int, int]) -> None:
    found = to_pixels(Image.new("RGBA", size, (10, 20, 30, 255)))
    assert found.shape == (size[1], size[0], 3)
    assert (found == (10, 20, 30)).all()
    assert resize(found, 16, 16).shape == (16, 16, 3)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        picture = reopened(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        assert (to_pixels(picture) == (255, 0, 0)).all(), kind


# what is no picture


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def rejects(file: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read_picture(file)
    problem = str(caught.value)
    assert problem.startswith(f"{file}: expected ")
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("side", [13378, 100_000, 2**31 - 1])
def test_a_decompression_bomb(side: int, tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png(side, side))
    assert "at most 179 megapixels, found more; scale it down first" in rejects(file)


def test_the_limit_is_pillows(tmp_path: Path) -> None:
    """Whose own refusal comes first, for files; it says nothing of what to do."""
    width = MAX_PIXELS // 10
    for height, name in ((10, "largest.png"), (11, "larger.png")):
        (tmp_path / name).write_bytes(png(width, height))
    with open_picture(tmp_path / "largest.png") as picture:
        assert picture.width * picture.height == MAX_PIXELS
    assert "at most 179 megapixels" in rejects(tmp_path / "larger.png")


def test_a_picture_in_memory_that_is_too_large() -> None:
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000, 3))
    with pytest.raises(InvalidInputError, match="at most 179 megapixels, found 20000x20000"):
        to_pixels(huge)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.png", b"not a picture at all\n"),
        ("empty.png", b""),
        ("zeros.png", bytes(1000)),
        ("script.jpg", b"#!/bin/sh\nexit 0\n"),
        ("nothing inside.png", png(8, 8)),
        ("signature.png", b"\x89PNG\r\n\x1a\n"),
        ("no width.png", png(0, 8)),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
    ],
)
def test_files_that_are_no_pictures(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    rejects(tmp_path / name)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert "found none" in rejects(tmp_path / "none.png")
    rejects(tmp_path)


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    noise = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    found = {}
    for kind in FORMATS:
        file = io.BytesIO()
        Image.fromarray(noise).save(file, format=kind)
        found[kind] = file.getvalue()
    return found


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "PPM"])
def test_a_file_cut_in_the_middle(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    for share in (0.1, 0.5, 0.9):
        file = tmp_path / "cut"
        file.write_bytes(files[kind][: int(share * len(files[kind]))])
        rejects(file)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_a_damaged_file_is_a_picture_or_an_error(
    kind: str,
    files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    content = bytearray(files[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 120) | st.integers(0, len(content) - 1))
        content[place % len(content)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    file = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    file.write_bytes(content[:cut])
    try:
        pixels = read_picture(file)
    except InvalidInputError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


@pytest.mark.parametrize(
    "wrong",
    [
        "photo.png",
        b"bytes",
        3,
        None,
        object(),
        {"image": RGB},
        RGB.tolist(),
        RGB[:, :, :2],
        np.zeros((6, 9, 5), np.uint8),
        np.zeros((3, 6, 9), np.uint8),
        np.zeros((0, 9, 3), np.uint8),
        np.zeros((6, 0, 3), np.uint8),
        np.zeros((6,), np.uint8),
        np.zeros((), np.uint8),
        np.zeros((1, 6, 9, 3, 1), np.uint8),
        RGB.astype(np.int64),
        RGB.astype(np.int8),
        RGB.astype(np.uint32),
        RGB.astype(np.complex64),
        RGB.astype("U3"),
        RGB.astype(object),
        RGB.astype(np.float32),
        UNIT * np.nan,
        np.full_like(UNIT, np.inf),
        UNIT - 2,
        torch.zeros(6, 9, 3),
        torch.zeros(2, 6, 9),
        torch.zeros(3, 6, 9, dtype=torch.int64),
        torch.full((3, 6, 9), float("nan")),
        torch.zeros(3, 0, 9),
        Image.new("RGB", (0, 5)),
        Image.new("L", (5, 0)),
        Image.fromarray(np.full((4, 4), np.nan, np.float32)),
        Image.fromarray(np.full((4, 4), 200, np.float32)),
    ],
    ids=lambda value: (
        f"{type(value).__name__} {getattr(value, 'dtype', '')} {np.shape(value)}"[:40]
        if not isinstance(value, Image.Image)
        else f"{value.mode} {value.size}"
    ),
)
def test_what_is_no_picture(wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^image: expected ") as caught:
        to_pixels(wrong)
    assert "\n" not in str(caught.value)


def test_opening_decodes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "whole header.png"
    file.write_bytes(png(3000, 2000))
    with open_picture(file) as picture:
        assert picture.size == (3000, 2000)
