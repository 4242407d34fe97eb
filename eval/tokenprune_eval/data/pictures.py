"""Pictures that a data set's file holds itself: each is written once into a folder, under its hash.

Parquet files carry them as bytes, tables of text in base64. A run reads pictures from files, and
questions about one picture share its encoding, so equal pictures get one file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.files import write_whole
from tokenprune_eval.shared.output import prepare_folder

_ADVICE = "Make room, or set TOKENPRUNE_CACHE to a folder on another disk."


@dataclass(frozen=True)
class Picture:
    """A picture out of a data set's file.

    Attributes
    ----------
    path
        Where it lies now.
    size
        Width and height in pixels, as stored.
    """

    path: Path
    size: tuple[int, int]


class Pictures:
    """The folder that pictures are written to.

    Parameters
    ----------
    folder
        Made with the first picture; by default the folder ``pictures`` of tokenprune's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            from tokenprune_eval.bundled.model import default_cache_dir

            folder = default_cache_dir() / "pictures"
        self._folder = folder.absolute()
        self._ready = False

    def put(self, value: Any) -> Picture:
        """Write a picture, unless it is there.

        Parameters
        ----------
        value
            ``{"bytes": …, "path": …}`` as in parquet files, bytes, or text in base64.

        Raises
        ------
        ValueError
            If it is none of these, or no picture; the text says which.
        OutputError
            If it cannot be written.
        """
        data = _bytes_of(value)
        suffix, size = _header_of(data)
        # Two letters a folder: some data sets have 100,000 pictures.
        name = hashlib.sha256(data).hexdigest()[:32]
        path = self._folder / name[:2] / f"{name}{suffix}"
        if not path.is_file():
            if not self._ready:
                prepare_folder(self._folder)
                self._ready = True
            path.parent.mkdir(exist_ok=True)
            write_whole(path, data, _ADVICE)
        return Picture(path, size)


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, dict):
        if not value.get("bytes") and value.get("path"):
            raise ValueError(
                f"the picture is not in the file, which only names it ({value['path']!r}). "
                "Download the version with the pictures in it"
            )
        value = value.get("bytes")
    if isinstance(value, str) and value:
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError("the picture is no base64") from None
    if not isinstance(value, bytes) or not value:
        raise ValueError("there is no picture")
    return value


def _header_of(data: bytes) -> tuple[str, tuple[int, int]]:
    """Return the ending and the size of a picture, which is not decoded."""
    # Listing data sets imports neither.
    from PIL import Image

    from tokenprune.media.images import FORMATS

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(
                io.BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN]
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the picture cannot be read ({type(error).__name__}). Download the file again"
        ) from None
    suffix = {"JPEG": ".jpg", "MPO": ".jpg"}.get(opened.format or "", f".{opened.format}".lower())
    return suffix, opened.size
