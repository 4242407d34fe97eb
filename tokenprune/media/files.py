"""`check_file`: what is said of a path before a decoder is let at it."""

from __future__ import annotations

from pathlib import Path

from tokenprune.errors import InputFileError, reason_of

_A = {"image": "an image", "video": "a video"}


def check_file(file: Path, kind: str) -> None:
    """Raise unless `file` is a regular file with something in it.

    Parameters
    ----------
    file
        The path.
    kind
        ``"image"`` or ``"video"``.

    Raises
    ------
    InputFileError
        Saying what it is instead.
    """
    try:
        if not file.exists():
            raise InputFileError(f"{file}: there is no such file. Check the path.")
        if file.is_dir():
            raise InputFileError(f"{file}: this is a directory. Give the path of {_A[kind]} file.")
        if not file.is_file():
            raise InputFileError(f"{file}: this is no regular file. Give the path of {_A[kind]}.")
        if file.stat().st_size == 0:
            raise InputFileError(f"{file}: the file is empty. Copy or download it again.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputFileError):
            raise
        raise InputFileError(
            f"{file}: the file cannot be read ({reason_of(error)}). Check the path and its "
            "permissions."
        ) from None
