"""`load_image`: an image file as the 8-bit RGB picture that a processor of transformers expects.

What PIL leaves to its caller is done here: 16-bit greyscale is scaled and not clipped, transparency
is laid on white, the camera's orientation is applied, a huge picture is shrunk before it is
converted, and a file that cannot be read is an error that says what to do.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenprune.errors import ConfigError, InputFileError, reason_of
from tokenprune.media.files import check_file

LARGEST = 178_000_000
"""Pixels above which a file is refused: decoding them would take a gigabyte."""

MAX_PIXELS = 16_000_000
"""Pixels a picture is shrunk to. No processor of the supported families keeps more."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
"""Formats that draw pixels. PIL would also run Ghostscript on PostScript, and open containers."""

_UNREADABLE = (
    OSError,
    SyntaxError,  # PIL's own for a broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What PIL's decoders raise on damaged files."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""

_ORIENTATION = 0x0112
_ROWS_AT_ONCE = 512


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as 8-bit RGB, upright and on white.

    16-bit greyscale is scaled so that 65535 becomes 255, CMYK and palettes are converted,
    transparent parts become white, and the EXIF orientation is applied. Of an animation the first
    picture is taken. A picture of more than `max_pixels` is shrunk by a whole factor.

    Parameters
    ----------
    path
        A JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000 or TGA file.
    max_pixels
        The most pixels the result may have, at least 1.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, at least 1 x 1 pixel.

    Raises
    ------
    ConfigError
        If `max_pixels` is below 1.
    InputFileError
        If the file is missing, a directory, empty, truncated or otherwise damaged, no image, of
        no pixels, of more than `LARGEST` pixels, or holds 32-bit values of unknown range. The
        message names the file.
    """
    if max_pixels < 1:
        raise ConfigError(f"max_pixels={max_pixels} leaves no picture. Give at least 1.")
    file = Path(path)
    check_file(file, "image")
    with warnings.catch_warnings():
        # Size is judged below, and damaged metadata does not matter where the pixels are whole.
        warnings.simplefilter("ignore")
        try:
            with _open(file) as image:
                _check_size(file, image)
                across, down = _factors(image.width, image.height, max_pixels)
                # JPEG can be decoded at a half, a quarter or an eighth in the first place.
                image.draft("RGB", (image.width // across, image.height // down))
                image.load()
                orientation = _orientation(image)
                picture = _to_rgb(file, image, max_pixels)
        except InputFileError:
            raise
        except _UNREADABLE as error:
            raise InputFileError(
                f"{file}: the image is damaged or incomplete ({reason_of(error)}). Copy or "
                "download it again."
            ) from None
        except MemoryError:
            raise InputFileError(
                f"{file}: there is not enough memory to decode the image. Make it smaller first."
            ) from None
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _open(file: Path) -> Image.Image:
    """Open the image without decoding it."""
    Image.init()
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise InputFileError(
            f"{file}: this is no image that can be read. Give a JPEG, PNG, WebP, GIF, BMP, TIFF, "
            "PPM, AVIF, JPEG 2000 or TGA file; if it is one, it is damaged: copy or download it "
            "again."
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(file) from None
    except PermissionError:
        raise InputFileError(f"{file}: no permission to read the file. Change its mode.") from None


def _check_size(file: Path, image: Image.Image) -> None:
    if image.width < 1 or image.height < 1:
        raise InputFileError(
            f"{file}: the image is {image.width} x {image.height} pixels; there is nothing in it. "
            "Give another."
        )
    if image.width * image.height > LARGEST:
        raise _too_large(file)


def _too_large(file: Path) -> InputFileError:
    return InputFileError(
        f"{file}: the image has more than {LARGEST // 1_000_000} million pixels. Shrink it first; "
        f"models see {MAX_PIXELS // 1_000_000} million at most."
    )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _UNREADABLE:
        return 1


def _to_rgb(file: Path, image: Image.Image, max_pixels: int) -> Image.Image:
    """Return a decoded image as RGB of at most `max_pixels`."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(file, image)
    # Neighbouring entries of a palette, and black and white, do not average to anything.
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if _transparent(image) else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if _transparent(image):
        image = image.convert("RGBA")
    factors = _factors(image.width, image.height, max_pixels)
    if factors != (1, 1):
        image = image.reduce(factors)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    # A copy in any case: the file is closed afterwards.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _factors(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return by which whole factors to shrink; they differ only for strips a few pixels high."""
    start = max(1, math.isqrt(width * height // max_pixels))
    across, down = min(start, width), min(start, height)
    while math.ceil(width / across) * math.ceil(height / down) > max_pixels:
        if across < width and (across <= down or down == height):
            across += 1
        else:
            down += 1
    return across, down


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info


def _to_8_bits(file: Path, image: Image.Image) -> Image.Image:
    """Return a picture of 16 bits a pixel as mode L; PIL's own conversion would clip it at 255."""
    values: np.ndarray[Any, Any] = np.asarray(image)
    if image.mode == "F" or (
        image.mode == "I" and not 0 <= int(values.min()) <= int(values.max()) <= 65535
    ):
        raise InputFileError(
            f"{file}: the image holds 32-bit values, and nothing says which of them is white. "
            "Save it with 8 or 16 bits a channel."
        )
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS_AT_ONCE):
        part = values[start : start + _ROWS_AT_ONCE].astype(np.uint32)
        scaled[start : start + _ROWS_AT_ONCE] = (part * 255 + 32767) // 65535
    return Image.fromarray(scaled)
