"""Progress bars with the time left: of work in steps, and of answers to questions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""

_SPEED_PERIOD = 120.0
"""Seconds over which the speed is averaged: the work of a step is known roughly, of many well."""


class Advance(Protocol):
    """Counts parts of a step that are done."""

    def __call__(self, parts: int, text: str | None = None) -> None:
        """Count them, and call the step otherwise from now on if `text` is given."""


class TerminalProgress:
    """Shows a bar for the whole run and one for the step at work.

    Where no bar can be drawn, as on a pipe, every step is a line with what is done and the time
    left. Use it as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        # FORCE_COLOR makes rich take a pipe for a terminal, but a bar in a file is no use.
        self.drawn = console.is_interactive and console.file.isatty()
        self._whole: TaskID | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Done(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not self.drawn,
            speed_estimate_period=_SPEED_PERIOD,
        )

    def __enter__(self) -> TerminalProgress:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bar.stop()

    def plan(self, work: float) -> None:
        """Say how much work all steps together are, in the unit that `step` is told."""
        self._whole = self._bar.add_task("the whole run", total=work, percent=True)

    @contextmanager
    def step(self, text: str, total: int, work: float = 1.0) -> Iterator[Advance]:
        """Show one step of `total` parts while the block runs, which is given what counts them."""
        if not self.drawn:
            self.console.print(text + self._standing(), highlight=False, soft_wrap=True)
        before = 0.0 if self._whole is None else self._task(self._whole).completed
        step = self._bar.add_task(text, total=total, percent=False)

        def advance(parts: int, text: str | None = None) -> None:
            if text is not None:
                self._bar.update(step, description=text)
            self._bar.advance(step, parts)
            if self._whole is not None and total:
                self._bar.advance(self._whole, work * parts / total)

        try:
            yield advance
        finally:
            self._bar.remove_task(step)
            if self._whole is not None:
                # Whatever the block counted: the step is over.
                rest = before + work - self._task(self._whole).completed
                self._bar.advance(self._whole, rest)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _task(self, number: TaskID) -> Task:
        return next(task for task in self._bar.tasks if task.id == number)

    def _standing(self) -> str:
        """Return how far the whole run is, where that was planned."""
        if self._whole is None:
            return ""
        task = self._task(self._whole)
        left = task.time_remaining
        about = "" if left is None else f", about {timedelta(seconds=round(left))} left"
        return f" ({task.percentage:.0f} % done{about})"


class _Done(ProgressColumn):
    """Parts that are done, of how many; of the whole run, whose parts differ, a percentage."""

    def render(self, task: Task) -> Text:
        if task.fields["percent"]:
            return Text(f"{task.percentage:.0f} %", style="progress.percentage")
        return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")


def progress_console(console: Console) -> Console:
    """Return where to draw progress: the errors' terminal where the output goes elsewhere."""
    errors = Console(stderr=True)
    here = console.file.isatty() or not errors.file.isatty()
    return console if here else errors


class RunProgress:
    """A bar with rate and time left; without a terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # FORCE_COLOR makes rich take a pipe for a terminal, but a bar in a file is no use.
        self.drawn = console.is_terminal and console.file.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not self.drawn,
        )
        self._task: TaskID | None = None
        self._total = self._done = self._before = 0
        self._started: float | None = None
        self._said = 0.0

    def __enter__(self) -> RunProgress:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing; after an error, say what is not lost."""
        self._bar.stop()
        if kind is not None and self._done:
            self._console.print(
                f"{self._done:,} answers are on disk: run the same command to continue.",
                highlight=False,
            )

    def plan(self, total: int, done: int) -> None:
        """Say how many answers there will be, and how many there were before."""
        self._total, self._done, self._before = total, done, done
        self._task = self._bar.add_task("starting", total=total, completed=done)
        self._console.print(
            f"{total:,} answers" + (f", {done:,} of them known" if done else ""), highlight=False
        )

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def at(self, text: str) -> None:
        """Say what is at work."""
        if self._task is not None:
            width = max(20, shutil.get_terminal_size().columns - 80)
            self._bar.update(self._task, description=text[:width])

    def advance(self, answers: int) -> None:
        """Count answers."""
        self._done += answers
        if self._task is not None:
            self._bar.advance(self._task, answers)
        now = time.monotonic()
        if self._started is None:
            # Loading the model tells nothing of how long an answer takes.
            self._started, self._said, self._before = now, now, self._done
        if not self.drawn and now - self._said >= EVERY:
            self._said = now
            rate = (self._done - self._before) / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            self._console.print(
                f"{self._done:,} of {self._total:,}, {rate:.1f} a second, {left:,.0f} s left",
                highlight=False,
            )
