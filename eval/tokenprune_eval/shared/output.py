"""The folder a run writes to: checked before the work starts, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tokenprune.errors import OutputError as OutputError
from tokenprune.errors import reason_of


def prepare_folder(folder: Path) -> None:
    """Make the folder if need be, and make sure that files can be written into it.

    Raises
    ------
    OutputError
        If it is a file, cannot be made or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            f"{folder} is a file, and the results need a folder. Give another with --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"nothing can be written to {folder}: {reason_of(error)}. Give another folder "
            "with --out."
        ) from None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or an interruption, never meets half of it.

    Raises
    ------
    OutputError
        If it cannot be written; what was there before is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            # mkstemp makes files private; a result is as readable as any new file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(
            f"{file} cannot be written: {reason_of(error)}. Make room, or give another place."
        ) from None
