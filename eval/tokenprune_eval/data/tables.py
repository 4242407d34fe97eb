"""Tables of questions in the containers that data sets are published in, one record at a time.

A `Table` is a JSON file, JSON lines, tab-separated text or parquet, or a folder with the parts of a
split in parquet. Its records are read when they are asked for: a part with pictures may be larger
than memory. `Table.questions` makes questions of them and gathers what is wrong.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenprune.errors import reason_of
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    Record,
    check_answers,
    check_names,
    columns_of,
    finish,
    load_json,
    media_folder,
    objects_of,
    parquet_columns,
    parquet_rows,
    read_json,
    read_jsonl,
)
from tokenprune_eval.data.pictures import Pictures
from tokenprune_eval.data.question import DataSet, Question


class NoAnswerError(ValueError):
    """A record has no answer."""


@dataclass(frozen=True)
class Source:
    """What a data set is read from.

    Attributes
    ----------
    file
        A file, or a folder in which the parts of a split lie, called ``SPLIT-*.parquet``, or in
        folders of it.
    media
        Folder with the pictures of a file that only names them; None for the usual place beside it.
    split
        Of a folder.
    answers
        File with the answers that a test split lacks, for sets that have such files.
    pictures
        Where pictures are kept that a file holds itself.
    """

    file: Path
    media: Path | None = None
    split: str = "test"
    answers: Path | None = None
    pictures: Pictures = field(default_factory=Pictures)

    def folder(self, places: Iterable[str], above: int = 0) -> Path:
        """Return the folder of the pictures that a file names, absolute.

        Parameters
        ----------
        places
            Where it usually is, relative to the file's folder, in order.
        above
            In how many folders above it these are looked for, too.

        Raises
        ------
        DataSetError
            If the user gave one that is no folder.
        """
        home = self.file.absolute().parent
        homes = [home, *list(home.parents)[:above]]
        return media_folder(self.media, [at / place for at in homes for place in places])


class Table:
    """Records with named columns.

    Parameters
    ----------
    source
        What is read. Files that are neither parquet nor tab-separated text are JSON.

    Attributes
    ----------
    columns
        The names that some record has.

    Raises
    ------
    DataSetError
        If it cannot be read, or the folder lacks the split.
    MissingPackageError
        If it is parquet and pyarrow is not installed.
    """

    def __init__(self, source: Source) -> None:
        self._file = path = source.file
        self._problems = Problems(path)
        self._parts: list[Path] = []
        self._records: list[Record] | None = None
        if path.is_dir():
            self._parts = _parts(path, source.split)
        elif path.suffix.lower() == ".parquet":
            self._parts = [path]
        if self._parts:
            self.columns = {name for part in self._parts for name in parquet_columns(part)}
        elif path.suffix.lower() == ".tsv":
            self.columns = _tsv_columns(path)
        else:
            self._records = read_any_json(path, self._problems)
            self.columns = columns_of(self._records)

    def __iter__(self) -> Iterator[Record]:
        """Yield place and content of each record, in order."""
        if self._records is not None:
            yield from self._records
        elif self._parts:
            for part in self._parts:
                at = "" if part == self._file else f"{part.relative_to(self._file)}, "
                for number, row in enumerate(parquet_rows(part), start=1):
                    yield f"{at}row {number}", row
        else:
            yield from _tsv_rows(self._file)

    def check(self) -> None:
        """Raise what was wrong with lines that could not be read.

        Raises
        ------
        DataSetError
            If there are any.
        """
        self._problems.check()

    def questions(
        self,
        name: str,
        needed: Iterable[str],
        make: Callable[[int, dict[str, Any]], Iterable[Question]],
        no_answers: str,
    ) -> DataSet:
        """Make a data set of the records.

        Parameters
        ----------
        name
            Of the data set.
        needed
            Columns that there must be.
        make
            (number of the record from 1, record) -> its questions. It raises `NoAnswerError` where
            the record has no answer, and other errors of type ``ValueError`` for what is wrong
            with it.
        no_answers
            What to do where no record has an answer, a sentence.

        Raises
        ------
        DataSetError
            With everything that is wrong, by record; or if there are no questions, or no answers.
        """
        check_names(self._file, needed, self.columns, name)
        problems = self._problems
        questions: list[tuple[str, Question]] = []
        records = without = 0
        for place, record in self:
            records += 1
            try:
                made = list(make(records, record))
                for question in made:
                    check_answers(question)
            except ValidationError as error:
                problems.add_all(place, error, [])
            except ValueError as error:
                without += isinstance(error, NoAnswerError)
                problems.add(place, str(error))
            else:
                questions += [(place, question) for question in made]
        if records and without == records:
            raise DataSetError(f"{self._file} holds no answers. {no_answers}")
        return finish(name, self._file, questions, problems)


def columns_in(source: Source) -> set[str]:
    """Return the columns of a file or folder, empty for one without parquet.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table`; also for JSON lines of which none can be read.
    """
    if source.file.is_dir() and not _parquet_in(source.file):
        return set()
    table = Table(source)
    if not table.columns:
        table.check()
    return table.columns


# JSON -------------------------------------------------------------------------------------------


def read_any_json(file: Path, problems: Problems) -> list[Record]:
    """Read a JSON list of objects, an object that holds it as ``data``, or JSON lines.

    Several data sets have JSON lines in files called ``.json``.

    Raises
    ------
    DataSetError
        If it is none of these.
    """
    if file.suffix.lower() == ".jsonl":
        return read_jsonl(file, problems)
    try:
        content = load_json(file)
    except DataSetError:
        if not read_jsonl(file, Problems(file)):
            raise
        return read_jsonl(file, problems)
    if not isinstance(content, dict):
        return read_json(file, problems)
    if isinstance(entries := content.get("data"), list):
        return objects_of(entries, problems)
    # JSON lines of one line.
    return [("line 1", content)]


# Parquet ----------------------------------------------------------------------------------------


def _parquet_in(folder: Path) -> list[Path]:
    """Return the parquet files of a folder and of the folders in it, in order."""
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _parts(folder: Path, split: str) -> list[Path]:
    files = _parquet_in(folder)
    found = [file for file in files if file.name.startswith(f"{split}-")]
    if not found:
        splits = sorted({file.name.partition("-")[0] for file in files})
        there = f"it has {', '.join(splits)}" if splits else "it holds no parquet files"
        raise DataSetError(
            f"{folder} has no split {split!r} ({split}-*.parquet); {there}. Name one with --split, "
            "or give another folder or a file."
        )
    return found


# Tab-separated text -----------------------------------------------------------------------------


def _tsv_columns(file: Path) -> set[str]:
    header = next(_tsv_lines(file), [])
    return set(header) if len(header) > 1 else set()  # one column: any other text


def _tsv_rows(file: Path) -> Iterator[Record]:
    lines = _tsv_lines(file)
    header = next(lines, [])
    for number, line in enumerate(lines, start=1):
        yield f"row {number}", dict(zip(header, line, strict=False))


def _tsv_lines(file: Path) -> Iterator[list[str]]:
    # The limit is one of the process; pictures are longer than what it starts with.
    csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(stream, delimiter="\t")
    except FileNotFoundError:
        raise DataSetError(f"{file} does not exist. Check the path.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataSetError(
            f"{file} is no tab-separated text in UTF-8 ({error}). Download it again."
        ) from None
    except OSError as error:
        raise DataSetError(f"{file} cannot be read: {reason_of(error)}.") from None
