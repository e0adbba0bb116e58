"""Pictures in and out: anything a user may hold becomes 8-bit RGB, results become files."""

import io
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import BackendUnavailableError, InvalidInputError, KontextError
from .files import whole_file

MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused, as Pillow does: a decompression bomb, or a mistake."""
METADATA_KEY = "fluxkontext"
"""The PNG text chunk that holds a result's settings as JSON."""

Pixels = NDArray[np.uint8]
"""One picture: ``[height, width, 3]`` RGB."""


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file, without decoding it yet."""
    try:
        with warnings.catch_warnings():  # Pillow warns at half the limit already
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except FileNotFoundError:
        raise InvalidInputError(f"{path}: expected an image file, found none") from None
    except Image.DecompressionBombError:
        raise InvalidInputError(
            f"{path}: expected at most {MAX_PIXELS / 1e6:.0f} megapixels, found more; "
            "scale it down first"
        ) from None
    except UnidentifiedImageError:
        raise InvalidInputError(
            f"{path}: expected an image (PNG, JPEG, WebP ...), found something else"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in Pillow's readers
        raise InvalidInputError(f"{path}: expected a readable image, found: {error}") from None


def read_picture(path: str | os.PathLike[str]) -> Pixels:
    """8-bit RGB of an image file."""
    with open_picture(path) as picture:
        try:
            return to_pixels(picture)
        except InvalidInputError as error:
            text = str(error).removeprefix("image: ")
            raise InvalidInputError(f"{path}: {text}") from None


def to_pixels(picture: Any) -> Pixels:
    """8-bit RGB of a PIL image, an ``HWC`` or ``HW`` array (of numpy, or on a GPU), or a ``CHW``
    torch tensor.

    PIL images are turned upright by their EXIF orientation; transparency is laid over white. Arrays
    and tensors hold 0..255 as uint8, 0..65535 as uint16, or floats in 0..1 (or -1..1 when any is
    negative), as in diffusers.
    """
    if isinstance(picture, Image.Image):
        return _from_pil(picture)
    array = as_array(picture)
    if array is None:
        raise InvalidInputError(
            f"image: expected a PIL image, an array or a tensor, found {type(picture).__name__}"
        )
    if _is_tensor(picture) and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)  # torch tensors are CHW
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InvalidInputError(
            "image: expected height x width x 1, 3 or 4 channels (a tensor: channels first), "
            f"found {list(np.shape(picture))}"
        )
    _check_size(array.shape[1], array.shape[0])
    array = _to_uint8(array)
    if array.shape[2] == 4:
        return _from_pil(Image.fromarray(array))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def as_array(value: Any) -> NDArray[Any] | None:
    """A numpy array, a torch tensor (bfloat16 as float32) or what has
    ``__cuda_array_interface__`` (PyCUDA, CuPy, Numba) as numpy; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    if not _is_tensor(value):
        return _from_gpu(value) if hasattr(value, "__cuda_array_interface__") else None
    value = value.detach().cpu()
    value = value.float() if value.is_floating_point() else value
    return np.asarray(value.numpy())


def _is_tensor(value: Any) -> bool:
    """Whether it is torch's, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def _from_gpu(value: Any) -> NDArray[Any]:
    try:
        from .cuda import to_host
    except ImportError:
        raise BackendUnavailableError(
            "expected cuda-bindings to read an array on a GPU, found none; "
            "install it with: pip install cuda-bindings"
        ) from None
    return to_host(value)


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """Lanczos, stretching to the size (as BFL and diffusers do)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _from_pil(picture: Image.Image) -> Pixels:
    _check_size(*picture.size)
    try:
        picture.load()
        picture = _upright(picture)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in Pillow's readers
        raise InvalidInputError(f"image: expected a whole picture, found: {error}") from None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        array = np.asarray(picture)
        if picture.mode == "I":  # 32-bit integers hold what 16-bit files contain
            array = array.clip(0, 65535).astype(np.uint16)
        array = _to_uint8(array)
        return np.ascontiguousarray(np.broadcast_to(array[:, :, None], (*array.shape, 3)))
    try:
        if picture.has_transparency_data:
            rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            picture = Image.alpha_composite(white, rgba)
        return np.asarray(picture.convert("RGB"))
    except ValueError as error:  # LAB, for one, has no conversion without a profile
        raise InvalidInputError(f"image: expected a picture of colours, found: {error}") from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # the pixels are whole, what is said about them is not
        return picture


def _to_uint8(array: NDArray[Any]) -> Pixels:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return (array / 257.0 + 0.5).astype(np.uint8)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InvalidInputError("image: expected finite values, found NaN or infinity")
        low, high = float(array.min()), float(array.max())
        if low < -1 or high > 1:
            raise InvalidInputError(
                "image: expected floats in 0..1 or -1..1 (or uint8 in 0..255), "
                f"found {low:.4g}..{high:.4g}"
            )
        unit = (array + 1) / 2 if low < 0 else array
        return (unit * 255.0 + 0.5).astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    raise InvalidInputError(f"image: expected uint8, uint16 or floats, found {array.dtype}")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InvalidInputError(f"image: expected at least one pixel, found {width}x{height}")
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"image: expected at most {MAX_PIXELS / 1e6:.0f} megapixels, found {width}x{height}; "
            "scale it down first"
        )


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before any work is done."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=kind or "none")
    except (KeyError, OSError, ValueError):  # unknown, or known for reading only
        raise InvalidInputError(
            f"{path}: expected an image file name (.png, .jpg, .webp), found '{path.suffix}'"
        ) from None
    try:
        there = path.parent.is_dir() and not path.is_dir()
        taken = path.exists() and not os.access(path, os.W_OK)
        if there and not taken:  # permissions do not tell: try it
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: expected a place that can be written, found: {error.strerror}"
        ) from None
    if not there:
        raise InvalidInputError(f"{path}: expected a file in an existing folder")
    if taken:
        raise InvalidInputError(f"{path}: expected a file that can be written, found it read-only")


def save(picture: Image.Image, path: Path, settings: Mapping[str, Any] | None) -> None:
    """Write ``picture`` whole or not at all; into a PNG its settings too, unless None."""
    options: dict[str, Any] = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    if settings is not None and path.suffix.lower() == ".png":
        chunk = PngImagePlugin.PngInfo()
        text = json.dumps(settings, ensure_ascii=False)
        chunk.add_itxt(METADATA_KEY, text.encode(errors="backslashreplace").decode())
        options["pnginfo"] = chunk
    try:
        with whole_file(path) as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], **options)
    except (OSError, ValueError) as error:
        raise KontextError(f"{path}: expected to write an image, found: {error}") from None


def read_settings(picture: Image.Image) -> dict[str, Any] | None:
    """The settings that :func:`save` put into a picture, or None."""
    text = picture.info.get(METADATA_KEY)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None
