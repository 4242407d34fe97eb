from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenprune.errors import ConfigError, InputFileError
from tokenprune.media.images import load_image


def _gradient(width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([columns * 255 // width, rows * 255 // height, rows * 0 + 90], axis=-1)
    return Image.fromarray(picture.astype(np.uint8))


def _saved(file: Path, image: Image.Image, **options: Any) -> Path:
    image.save(file, **options)
    return file


def _png(width: int, height: int, rows: bytes, depth: int = 8, color: int = 0) -> bytes:
    """A PNG made by hand, for sizes that PIL would not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


def _pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


# What is right ----------------------------------------------------------------------------------


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    # PIL's own conversion makes 255 of all but the first two.
    expected = [0, 0, 1, 128, 255]
    for name in ("a.png", "a.tif"):
        image = load_image(_saved(tmp_path / name, Image.fromarray(values)))
        assert image.mode == "RGB"
        assert _pixels(image)[0].tolist() == [[value] * 3 for value in expected]
    pgm = tmp_path / "a.pgm"
    pgm.write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert _pixels(load_image(pgm))[0, :, 0].tolist() == expected


def test_16_bit_color_keeps_its_shades(tmp_path: Path) -> None:
    row = np.array([0, 32768, 65535, 257, 514, 65535], ">u2").tobytes()
    file = tmp_path / "rgb16.png"
    file.write_bytes(_png(2, 1, b"\0" + row, depth=16, color=2))
    # libpng's rounding down of 16 to 8 bits is off by one at most.
    assert np.abs(_pixels(load_image(file)) - [[[0, 128, 255], [1, 2, 255]]]).max() <= 1


def test_color_models_come_out_as_rgb(tmp_path: Path) -> None:
    gradient = _gradient()
    cmyk = load_image(_saved(tmp_path / "cmyk.tif", gradient.convert("CMYK")))
    assert cmyk.mode == "RGB"
    assert np.abs(_pixels(cmyk) - _pixels(gradient)).max() <= 1
    jpeg = load_image(_saved(tmp_path / "cmyk.jpg", gradient.convert("CMYK"), quality=98))
    assert np.abs(_pixels(jpeg) - _pixels(gradient)).mean() < 4
    palette = load_image(_saved(tmp_path / "p.png", gradient.quantize(256)))
    assert np.abs(_pixels(palette) - _pixels(gradient)).mean() < 8
    black_white = load_image(_saved(tmp_path / "1.png", gradient.convert("1")))
    assert set(np.unique(_pixels(black_white))) == {0, 255}


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 128, 255]
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    image = load_image(_saved(tmp_path / "rgba.png", Image.fromarray(rgba)))
    assert np.abs(_pixels(image)[0] - expected).max() <= 1
    grey = np.array([[[0, 0], [0, 255]]], np.uint8)
    image = load_image(_saved(tmp_path / "la.png", Image.fromarray(grey)))
    assert _pixels(image)[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = load_image(_saved(tmp_path / "p.png", palette, transparency=0))
    assert _pixels(image)[0].tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.kron([[0, 80, 160], [240, 40, 120]], np.ones((16, 16))).astype(np.uint8)
    # What EXIF says about where row 0 and column 0 of the stored picture are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    file = _saved(tmp_path / f"turned.{suffix}", image, exif=exif.tobytes())
    assert np.abs(_pixels(load_image(file))[..., 0] - upright).max() <= 3


def test_result_outlives_the_file(tmp_path: Path) -> None:
    file = _saved(tmp_path / "a.png", _gradient())
    image = load_image(file)
    file.unlink()
    assert np.array_equal(_pixels(image), _pixels(_gradient()))


def test_max_pixels_bounds_the_result_and_averages(tmp_path: Path) -> None:
    checks = np.indices((60, 80)).sum(0) % 2 * 255
    file = _saved(tmp_path / "a.png", Image.fromarray(checks.astype(np.uint8)))
    small = load_image(file, max_pixels=1200)
    assert small.size == (40, 30)
    assert np.abs(_pixels(small) - 127.5).max() <= 1
    strip = _saved(tmp_path / "strip.png", Image.new("L", (5000, 1), 7))
    assert load_image(strip, max_pixels=100).size == (100, 1)
    with pytest.raises(ConfigError, match="max_pixels=0"):
        load_image(file, max_pixels=0)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_100_megapixels_are_read_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    """In a process of its own, whose highest memory use is then the picture's."""
    file = tmp_path / f"large.{suffix}"
    if suffix == "png":
        rows = (b"\0" + b"\xc8\x14\x28" * 10_000) * 10_000
        file.write_bytes(_png(10_000, 10_000, rows, color=2))
        del rows
    else:
        Image.new("RGB", (10_000, 10_000), (200, 20, 40)).save(file, quality=80)
    code = (
        "import resource, sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "from tokenprune.media.images import load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "image = load_image(sys.argv[1])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(*image.size, *image.getpixel((7, 7)), after - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    width, height, *color, kilobytes = map(int, done.stdout.split())
    assert width * height <= 16_000_000
    assert min(width, height) > 2000
    assert np.abs(np.array(color) - [200, 20, 40]).max() <= 3
    # A PNG has to be decoded whole, 400 MB as PIL holds RGB; a JPEG has not.
    assert kilobytes < (700_000 if suffix == "png" else 150_000)


# What is wrong ----------------------------------------------------------------------------------


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, what its error has to say)."""
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG")
    png = picture.getvalue()
    contents = {
        "truncated.png": (png[: len(png) // 2], "damaged or incomplete"),
        "truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "damaged or incomplete"),
        "header-only.png": (png[:20], "damaged or incomplete"),
        "flipped.png": (png[:100] + bytes(200) + png[300:], "damaged or incomplete"),
        "empty.png": (b"", "empty"),
        "text.jpg": (b"hello, this is text", "no image that can be read"),
        "zero.png": (_png(0, 0, b""), "pixels|no image"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        "bomb.png": (_png(30_000, 30_000, b""), "more than 178 million pixels"),
        "large.png": (_png(178_001, 1_000, b""), "more than 178 million pixels"),
    }
    files = {}
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        files[name] = (folder / name, message)
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    (folder / "directory.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    files["float"] = (folder / "float.tif", "32-bit values")
    files["directory"] = (folder / "directory.png", "directory")
    files["missing"] = (folder / "missing.png", "no such file")
    files["pipe"] = (folder / "pipe.png", "no regular file")
    files["long name"] = (folder / ("x" * 400), "no such file|cannot be read")
    return files


def test_bad_files_are_errors_of_one_line_that_name_the_file(tmp_path: Path) -> None:
    for name, (file, message) in _bad_files(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputFileError, match=message) as caught:
                load_image(file)
        text = str(caught.value)
        assert text.startswith(f"{file}: "), name
        assert "\n" not in text, name
        assert text.endswith("."), name
        assert caught.value.__suppress_context__ or caught.value.__context__ is None, name


def test_any_cut_of_a_file_is_an_image_or_an_input_error(tmp_path: Path) -> None:
    """Every kind of damage that a cut can do, in every format."""
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "ppm"):
        whole = _saved(tmp_path / f"whole.{suffix}", _gradient(16, 12)).read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        for length in range(1, len(whole), max(1, len(whole) // 60)):
            cut.write_bytes(whole[:length])
            try:
                assert load_image(cut).size == (16, 12)
            except InputFileError:
                continue


def test_no_file_is_left_open(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else limit
    for file, _ in _bad_files(tmp_path).values():
        with pytest.raises(InputFileError):
            load_image(file)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else limit
    assert after == before
