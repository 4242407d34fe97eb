"""A progress bar with the time left, for commands that work in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SPEED_PERIOD = 120.0
"""Seconds over which the speed is averaged: the work of a step is known roughly, of many well."""


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
    def step(self, text: str, total: int, work: float = 1.0) -> Iterator[Callable[[int], None]]:
        """Show one step of `total` parts while the block runs, which is given what counts them."""
        if not self.drawn:
            self.console.print(text + self._standing(), highlight=False, soft_wrap=True)
        before = 0.0 if self._whole is None else self._task(self._whole).completed
        step = self._bar.add_task(text, total=total, percent=False)

        def advance(parts: int) -> None:
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
