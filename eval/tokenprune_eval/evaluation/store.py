"""The folder of a run: what is in it survives a kill at any moment, and only one run writes it.

    run.json       settings, conditions, data sets, versions, machine
    items.jsonl    the questions, one a line
    records.jsonl  the answers, one a line, appended as they come

A line that a kill cut short is taken off when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import filelock

from tokenprune.errors import ConfigError, TokenPruneError, reason_of
from tokenprune.formats import KEY
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.files import FORMAT, RECORDS, RUN, StoredRun, read_run, write_questions
from tokenprune_eval.results.records import Condition, Record
from tokenprune_eval.results.summary import QuestionInfo
from tokenprune_eval.shared.output import OutputError, prepare_folder, write_whole


class BusyFolderError(TokenPruneError, RuntimeError):
    """Another run is writing the folder."""


class Store:
    """A run's folder while the run writes it; a context manager that holds its lock.

    Attributes
    ----------
    folder
        Where it is.
    done
        (condition's key, question's id) of every record in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[tuple[str, str]] = set()
        prepare_folder(folder)
        self._lock = filelock.FileLock(folder / ".lock")
        self._stream: Any = None

    def __enter__(self) -> Store:
        """Take the folder.

        Raises
        ------
        BusyFolderError
            If another run has it.
        """
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BusyFolderError(
                f"another run is writing {self.folder}. Wait for it, or give another folder with "
                "--out."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the folder to others."""
        if self._stream is not None:
            self._stream.close()
        self._lock.release()

    def begin(
        self,
        settings: Settings,
        about: dict[str, Any],
        questions: Sequence[QuestionInfo],
        conditions: Sequence[Condition],
    ) -> StoredRun:
        """Begin a run, or go on with the one that is there; new questions and conditions are added.

        Parameters
        ----------
        settings
            Of this run.
        about
            Everything of ``run.json`` besides settings and conditions.
        questions, conditions
            What is asked, and how.

        Returns
        -------
        StoredRun
            All questions, conditions and records of the folder.

        Raises
        ------
        ConfigError
            If the folder holds a run with other settings.
        InputFileError
            If its files are damaged.
        OutputError
            If nothing can be written.
        """
        records: list[Record] = []
        before = run_before(self.folder, settings)
        if before is not None:
            if before.records:
                sets = (*before.about.get("data", ()), *about.get("data", ()))
                about = {**about, "data": list({one["name"]: one for one in sets}.values())}
                questions = list({one.id: one for one in (*before.questions, *questions)}.values())
                conditions = list(
                    {one.key: one for one in (*before.conditions, *conditions)}.values()
                )
            records = before.records
            self._cut_unfinished_line()
        self.done = {
            (record.condition, record.item)
            for record in records
            if record.error is None or not settings.retry_errors
        }
        about = {
            "settings": settings.model_dump(mode="json"),
            "conditions": [condition.model_dump() for condition in conditions],
            **about,
        }
        write_questions(self.folder, questions)
        try:
            # Unbuffered, so that what could not be written is not tried again at the end.
            self._stream = (self.folder / RECORDS).open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(self.folder / RECORDS, error) from None
        # Last, so that whoever finds it finds the other files too.
        self.write_about(about)
        return StoredRun(self.folder, about, list(questions), list(conditions), records)

    def write_about(self, about: dict[str, Any]) -> None:
        """Write ``run.json``."""
        write_whole(self.folder / RUN, json.dumps({KEY: FORMAT, **about}, indent=1) + "\n")

    def append(self, records: Iterable[Record]) -> None:
        """Put answers on disk.

        Raises
        ------
        OutputError
            If they cannot be written; what was written before stays, and a run in the same folder
            goes on behind it.
        """
        records = list(records)
        lines = "".join(
            record.model_dump_json(exclude_none=True, exclude_defaults=True) + "\n"
            for record in records
        )
        try:
            left = lines.encode()
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            raise _unwritable(self.folder / RECORDS, error) from None
        self.done.update((record.condition, record.item) for record in records)

    def _cut_unfinished_line(self) -> None:
        file = self.folder / RECORDS
        if not file.is_file():
            return
        with file.open("r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                stream.seek(start)
                newline = stream.read(end - start).rfind(b"\n")
                if newline >= 0:
                    stream.truncate(start + newline + 1)
                    return
                end = start
            stream.truncate(0)


def run_before(folder: Path, settings: Settings) -> StoredRun | None:
    """Return the run that a folder holds, which one with these settings would go on with.

    Raises
    ------
    ConfigError
        If its settings are others.
    InputFileError
        If its files are damaged.
    """
    if not (folder / RUN).is_file():
        return None
    before = read_run(folder)
    other = Settings.model_validate(before.about["settings"])
    # A run that ended before its first answer may be corrected.
    if before.records and (differing := settings.differences(other)):
        there = ", ".join(f"{name}={getattr(other, name)!r}" for name in differing)
        raise ConfigError(
            f"{folder} holds a run with other settings ({there}), and answers of both would be "
            "mixed. Give the same, or another folder with --out."
        )
    return before


def _unwritable(file: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{file} cannot be written: {reason_of(error)}. Make room and run the same command "
        "again: it goes on where it was."
    )
