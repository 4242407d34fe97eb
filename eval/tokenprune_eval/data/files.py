"""Reading records out of files, and finding media without leaving their folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenprune.errors import MissingPackageError, reason_of
from tokenprune.files import numbered_lines, parse_json
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.question import LETTERS, DataSet, Question

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")
"""Tried in this order where a data set names a video without its suffix."""

_ROWS_AT_ONCE = 64
"""Rows with pictures that are in memory together."""

Record = tuple[str, dict[str, Any]]
"""A place such as ``"line 3"``, and what stands there."""


# --- containers ---------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without byte order mark.

    Raises
    ------
    DataSetError
        If it is missing, cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataSetError(f"{file} does not exist. Check the path.") from None
    except UnicodeDecodeError as error:
        raise DataSetError(
            f"{file} is no UTF-8 text (byte {error.start}). Give the file with the questions, "
            "saved as UTF-8."
        ) from None
    except OSError as error:
        raise DataSetError(f"{file} cannot be read: {reason_of(error)}.") from None


def read_jsonl(file: Path, problems: Problems) -> list[Record]:
    """Read one JSON object a line; empty lines are passed over.

    Lines that are no JSON object are noted in `problems` and left out.

    Raises
    ------
    DataSetError
        See `read_text`.
    """
    records: list[Record] = []
    for number, line in numbered_lines(read_text(file)):
        place = f"line {number}"
        try:
            record = parse_json(line)
        except json.JSONDecodeError as error:
            problems.add(place, f"no JSON ({error.msg} at character {error.colno})")
            continue
        except ValueError as error:
            problems.add(place, str(error))
            continue
        if isinstance(record, dict):
            records.append((place, record))
        else:
            problems.add(place, f"a JSON object is needed, got {type(record).__name__}")
    return records


def read_json(file: Path, problems: Problems) -> list[Record]:
    """Read a JSON list of objects; entries count from 1.

    Entries that are no object are noted in `problems` and left out.

    Raises
    ------
    DataSetError
        If it is no JSON, or no list; see also `read_text`.
    """
    content = load_json(file)
    if not isinstance(content, list):
        raise DataSetError(
            f"{file} holds a JSON {type(content).__name__}, and a list of questions is needed."
        )
    return objects_of(content, problems)


def objects_of(entries: Sequence[Any], problems: Problems) -> list[Record]:
    """Return the entries that are objects; others are noted in `problems`. They count from 1."""
    records: list[Record] = []
    for number, record in enumerate(entries, start=1):
        place = f"entry {number}"
        if isinstance(record, dict):
            records.append((place, record))
        else:
            problems.add(place, f"a JSON object is needed, got {type(record).__name__}")
    return records


def load_json(file: Path) -> Any:
    """Read a JSON file, whatever it holds.

    Raises
    ------
    DataSetError
        If it is no JSON; see also `read_text`.
    """
    text = read_text(file)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DataSetError(
            f"{file} is no JSON: {error.msg} at line {error.lineno}, character {error.colno}."
        ) from None
    except ValueError as error:
        raise DataSetError(f"{file}: {reason_of(error)}.") from None


def read_parquet(file: Path) -> list[Record]:
    """Read a parquet file; rows count from 1.

    Raises
    ------
    MissingPackageError
        If pyarrow is not installed.
    DataSetError
        If the file is missing or no parquet.
    """
    return [(f"row {number}", row) for number, row in enumerate(parquet_rows(file), start=1)]


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, a few of which are in memory; see `read_parquet`."""
    with _parquet(file) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a parquet file's columns; see `read_parquet`."""
    with _parquet(file) as opened:
        return list(opened.schema_arrow.names)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:
        raise MissingPackageError(
            f"reading {file} needs the package pyarrow. Install it with: pip install pyarrow"
        ) from None
    try:
        # A ParquetFile reads the one file it is given; read_table would take "key=value" folders
        # of the path for columns.
        with parquet.ParquetFile(file) as opened:
            yield opened
    except FileNotFoundError:
        raise DataSetError(f"{file} does not exist. Check the path.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataSetError(
            f"{file} is no parquet file that can be read: {reason_of(error)}."
        ) from None


def columns_of(records: Iterable[Record]) -> set[str]:
    """Return every key that any of the records has."""
    return {key for _, record in records for key in record}


def check_columns(file: Path, needed: Iterable[str], records: Sequence[Record], kind: str) -> None:
    """Make sure that some record has each of the keys.

    Parameters
    ----------
    file
        Named in the message.
    needed
        The keys.
    records
        All records of the file.
    kind
        What the file was read as, for the message.

    Raises
    ------
    DataSetError
        Says which keys are missing and which there are; or that there are no records.
    """
    if not records:
        raise DataSetError(f"{file} holds no questions.")
    check_names(file, needed, columns_of(records), kind)


def check_names(file: Path, needed: Iterable[str], found: set[str], kind: str) -> None:
    """Make sure that a file has all columns of a format.

    Parameters
    ----------
    file
        Named in the message.
    needed, found
        Names of columns.
    kind
        What the file was read as, for the message.

    Raises
    ------
    DataSetError
        Says which columns are missing and which there are.
    """
    missing = sorted(set(needed) - found)
    if missing:
        raise DataSetError(
            f"{file} is not in the format {kind}: {_listed(missing)} missing, {_listed(found)} "
            "found. Give the file as its authors published it, or name another format "
            "(FORMAT:PATH)."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


# --- media --------------------------------------------------------------------------------------


def media_folder(media: Path | None, usual: Sequence[Path]) -> Path:
    """Return the folder with the media of a data set, absolute.

    Parameters
    ----------
    media
        What the user gave; None for the usual place.
    usual
        Where authors put them; the first that exists is taken. Where none does it is the first,
        so that what is missing can be told.

    Raises
    ------
    DataSetError
        If the user gave one that is no folder.
    """
    if media is not None:
        folder = media.expanduser()
        if not folder.is_dir():
            raise DataSetError(
                f"the media folder {folder} is not there. Give the folder with the images or "
                "videos, or leave it out for the place beside the file."
            )
    else:
        folder = next((one for one in usual if one.is_dir()), usual[0])
    return Path(os.path.abspath(folder))


def inside(folder: Path, name: str) -> Path:
    """Return the path of a media file, which must not leave its folder.

    The path is checked as it is written. A symbolic link inside the folder may lead elsewhere:
    whoever made the link meant that, and videos often lie on another disk.

    Parameters
    ----------
    folder
        Absolute.
    name
        Relative to the folder, or an absolute path into it.

    Raises
    ------
    ValueError
        If it leads out of the folder or names no file in it; the text says which.
    """
    if "\0" in name:
        raise ValueError(f"the path {name!r} contains a null character")
    path = Path(os.path.normpath(folder / name))
    if path == folder or name.endswith("/"):
        raise ValueError(f"the path {name!r} names no file")
    if not path.is_relative_to(folder):
        raise ValueError(
            f"the path {name!r} leads out of the media folder {folder}. Paths are relative to "
            "that folder; give another one as media folder if the file lies elsewhere"
        )
    return path


def video_of(folder: Path, stem: str) -> Path:
    """Return the video of that name with whichever usual suffix it has; ``.mp4`` where none is.

    Raises
    ------
    ValueError
        See `inside`.
    """
    paths = [inside(folder, stem + suffix) for suffix in VIDEO_SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


# --- questions ----------------------------------------------------------------------------------


def check_choices(choices: Sequence[str]) -> None:
    """Make sure that a question's choices can be told apart by letters.

    Raises
    ------
    ValueError
        If there are fewer than 2 or more than 26, or one is empty.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"2 to {len(LETTERS)} choices are needed, got {len(choices)}")
    if not all(choice.strip() for choice in choices):
        raise ValueError("a choice is empty")


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """Read an answer that is the letter of a choice or the exact text of one.

    Raises
    ------
    ValueError
        If it is neither, or could be meant for two different choices.
    """
    letters = LETTERS[: len(choices)]
    meant = {number for number, choice in enumerate(choices) if choice == answer}
    if len(answer) == 1 and answer in letters:
        meant.add(letters.index(answer))
    if len(meant) == 1:
        return letters[meant.pop()]
    if meant:
        both = " and ".join(f"{letters[n]} ({choices[n]!r})" for n in sorted(meant))
        raise ValueError(
            f"the answer {answer!r} could be {both}. Change the choices so that it is one of them"
        )
    raise ValueError(
        f"the answer {answer!r} is none of the choices. Give a letter, {letters[0]} to "
        f"{letters[-1]}, or the exact text of a choice"
    )


ANNOTATORS = 4
"""The fewest whose answers VQA accuracy can be made of: three of the others make one right."""


def check_answers(question: Question) -> None:
    """Make sure that the right answers of an open question can be scored.

    Raises
    ------
    ValueError
        If one is empty, or cannot be what the question's scoring compares.
    """
    if question.choices:
        return
    if not all(answer.strip() for answer in question.accepted):
        raise ValueError("an answer is empty")
    answer = question.answer.strip()
    if question.scoring == "yes-no" and answer.lower() not in ("yes", "no"):
        raise ValueError(f"the answer {answer!r} is neither yes nor no")
    if question.scoring == "count" and not (answer.isascii() and answer.isdecimal()):
        raise ValueError(f"the answer {answer!r} is no count. Give a whole number, such as 3")
    if question.scoring == "vqa" and len(question.accepted) < ANNOTATORS:
        raise ValueError(
            f"VQA accuracy needs the answers of {ANNOTATORS} annotators or more, got "
            f"{len(question.accepted)}"
        )
    if question.scoring == "box":
        left, top, right, bottom = json.loads(answer)
        if question.size is None or min(question.size) < 1 or left >= right or top >= bottom:
            raise ValueError(f"the box {answer} has no area, or the image no size")


def finish(
    name: str, file: Path, questions: list[tuple[str, Question]], problems: Problems
) -> DataSet:
    """Make the data set, or say all that is wrong with the file.

    Parameters
    ----------
    name
        Of the data set.
    file
        Where the questions are from.
    questions
        With the place of each.
    problems
        Found so far; questions with the id of an earlier one are added.

    Raises
    ------
    DataSetError
        If there are problems, or no questions.
    """
    places: dict[str, str] = {}
    for place, question in questions:
        first = places.setdefault(question.id, place)
        if first != place:
            problems.add(
                place, f"the id {question.id!r} is that of {first} too. Ids must be unique"
            )
    problems.check()
    if not questions:
        raise DataSetError(f"{file} holds no questions.")
    return DataSet(name, tuple(question for _, question in questions))
