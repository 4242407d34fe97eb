"""The number that says in which form a file is written, so that another version can tell.

Every file that somebody may read again with a later version has one, under the key ``format``; it
rises when the file's meaning changes. Files from before that have none, and are of format 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.errors import InputFileError, TokenPruneError

KEY = "format"


def check_format(
    values: Mapping[str, Any],
    newest: int,
    what: object,
    advice: str,
    *,
    key: str = KEY,
    kind: type[TokenPruneError] = InputFileError,
) -> dict[str, Any]:
    """Return what a file holds without its format, if this version reads that format.

    Parameters
    ----------
    values
        What the file holds.
    newest
        The newest format that is known.
    what
        The file, or what to call it in the message.
    advice
        What else to do than to upgrade, a sentence.
    key
        Under which the format stands.
    kind
        Of error.

    Raises
    ------
    InputFileError
        Or the error in `kind`, if the format is newer or no format at all.
    """
    found = values.get(key, 1)
    if type(found) is not int or found < 1:
        raise kind(f"{what} has {key} {found!r}, which is no whole number from 1 on. {advice}")
    if found > newest:
        raise kind(
            f"{what} has {key} {found} and was written by a newer version of tokenprune; this one "
            f"reads {key} {newest} and older. Install that version (pip install --upgrade "
            f"tokenprune-vlm). {advice}"
        )
    return {name: value for name, value in values.items() if name != key}
