"""What is wrong with a data set's files, gathered so that one run shows all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenprune.errors import InputFileError, did_you_mean

SHOWN = 20
"""The most problems of one file that a message lists."""


class DataSetError(InputFileError):
    """A data set is unknown, its file cannot be read, or what the file says cannot be right."""


class Problems:
    """What is wrong with one file.

    Parameters
    ----------
    file
        Named in the message.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: list[str] = []

    def add(self, place: str, text: str) -> None:
        """Note one problem at a place such as ``"line 3"``."""
        self._found.append(f"{place}: {text}")

    def add_all(self, place: str, error: ValidationError, allowed: list[str]) -> None:
        """Note everything that pydantic says about one record.

        Parameters
        ----------
        place
            Where the record is.
        error
            What pydantic raised.
        allowed
            The keys a record may have, for records that may have no other.
        """
        for one in error.errors():
            self.add(place, _described(dict(one), allowed))

    def check(self) -> None:
        """Raise what was found, if anything was.

        Raises
        ------
        DataSetError
            With the first 20 problems, and how many more there are.
        """
        if not self._found:
            return
        count = len(self._found)
        lines = "".join(f"\n  {text}" for text in self._found[:SHOWN])
        more = f"\n  and {count - SHOWN} more" if count > SHOWN else ""
        noun = "problem" if count == 1 else "problems"
        raise DataSetError(f"{self._file} cannot be used, {count} {noun}:{lines}{more}")


def _described(error: dict[str, Any], allowed: list[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}. {did_you_mean(key, allowed)}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    given = repr(error["input"])
    given = given if len(given) <= 60 else f"{given[:57]}..."
    message = str(error["msg"])
    return f"{key}: {message[:1].lower()}{message[1:]}, got {given}"
