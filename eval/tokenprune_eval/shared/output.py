"""The folder that a run writes to, checked before the work starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenprune.errors import OutputError as OutputError
from tokenprune.errors import reason_of
from tokenprune.files import write_whole as write_whole


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
