"""Files that other packages ship: weights, clips and questions.

A package is found through its metadata. Nothing of it is imported, and what it asks for need not be
installed.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from tokenprune.errors import MissingPackageError
from tokenprune_eval.bundled.errors import BundledModelError


def shipped_file(distribution: str, file: str, install: str, absent: MissingPackageError) -> Path:
    """Return where an installed distribution keeps a file.

    Parameters
    ----------
    distribution
        Its name.
    file
        The file's path inside the distribution.
    install
        The command that installs the known version.
    absent
        What to raise if it is not installed: it says what needs it.

    Raises
    ------
    MissingPackageError
        If the distribution is not installed.
    BundledModelError
        If it is installed without the file.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise absent from None
    path = Path(str(found.locate_file(file)))
    if not path.is_file():
        raise BundledModelError(
            f"{distribution} {found.version} is installed, but {file} is not in it. Install the "
            f"known version with: {install}"
        )
    return path
