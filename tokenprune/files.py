"""Files that are there whole or not at all, and JSON that is read line by line.

Whoever reads a file while it is written, or after a run was killed, finds the old one or the new
one: it is written beside its place, under a name of its own, and renamed.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import InputFileError, OutputError, reason_of

MAKE_ROOM = "Make room, or give another place."
"""What to do where a file cannot be written."""


# Writing ----------------------------------------------------------------------------------------


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `file` when the block ends.

    After an error in the block, what was there before is untouched.

    Parameters
    ----------
    file
        Its folder must be there.

    Yields
    ------
    Path
        Beside `file`; an empty file.

    Raises
    ------
    OSError
        If nothing can be written there.
    """
    part = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    part.touch(exist_ok=False)
    try:
        # What any new file may be read by; some libraries make theirs private.
        mode = part.stat().st_mode & 0o777
        yield part
        part.chmod(mode)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes, advice: str = MAKE_ROOM) -> None:
    """Write a file so that a reader, or an interruption, never meets half of it.

    Parameters
    ----------
    file
        Its folder must be there.
    content
        Text is written as UTF-8.
    advice
        What to do where it cannot be written.

    Raises
    ------
    OutputError
        If it cannot be written; what was there before is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with replacing(file) as part:
            part.write_bytes(data)
    except OSError as error:
        raise unwritable(file, error, advice) from None


def unwritable(file: Path, error: Exception, advice: str = MAKE_ROOM) -> OutputError:
    """Return the error for a file that cannot be written."""
    return OutputError(f"{file} cannot be written: {reason_of(error)}. {advice}")


@contextmanager
def making_folder(target: Path, known_by: str | None = None) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of `target` when the block ends.

    Parameters
    ----------
    target
        Must not be there, or be empty; the folder around it must be there.
    known_by
        A file by which a whole folder is known, where several processes may make the same one: the
        one that was faster is then as good. None: another's folder is an error.

    Yields
    ------
    Path
        Beside `target`.

    Raises
    ------
    OSError
        If nothing can be written there, or something else is in the place.
    """
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)  # temporary folders start readable by their owner only
        try:
            made.rename(target)
        except OSError:
            if known_by is None or not (target / known_by).is_file():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


# JSON, one value a line -------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonLine:
    """One line of a file.

    Attributes
    ----------
    place
        File and number of the line, the beginning of a message about it.
    text
        As it stands there.
    fields
        Its keys and values; empty where it is JSON and no object.
    """

    place: str
    text: str
    fields: dict[str, Any]


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1.

    Only a line feed ends a line of JSON: `str.splitlines` would also cut at U+2028 inside a text.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def parse_json(text: str) -> Any:
    """Return the value of a JSON text in which no object has a key twice.

    Raises
    ------
    json.JSONDecodeError
        If it is no JSON.
    ValueError
        If a key is there twice: which of both was meant is not known.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands twice in one object")
    return record


def read_json_lines(file: Path, what: str, advice: str) -> list[JsonLine]:
    """Read a file of one JSON object a line, in UTF-8; blank lines are passed over.

    Parameters
    ----------
    file
        The file.
    what
        What it holds, for the message: ``"needles"``.
    advice
        What to give in its place, a sentence.

    Raises
    ------
    InputFileError
        If it cannot be read, or a line is no JSON; the line is named.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "not UTF-8"
        raise InputFileError(f"{file}: the {what} cannot be read ({reason}). {advice}") from None
    lines = []
    for number, line in numbered_lines(text):
        place = f"{file}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise InputFileError(f"{place}: not JSON ({reason_of(error)}). {advice}") from None
        lines.append(JsonLine(place, line, value if isinstance(value, dict) else {}))
    return lines
