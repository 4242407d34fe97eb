"""The run in the terminal: a progress bar, and the tables at its end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tokenprune_eval.demo.results import ORACLE, UNPRUNED, Row


class TerminalProgress:
    """Shows a bar for the whole run and one for the step at work; on a pipe, one line a step.

    Use it as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._whole: TaskID | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TerminalProgress:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bar.stop()

    def plan(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._whole = self._bar.add_task("the whole run, in steps", total=steps)

    @contextmanager
    def step(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one step while the block runs."""
        if not self.console.is_terminal:
            self.console.print(text, highlight=False)
        task = self._bar.add_task(text, total=total)
        try:
            yield lambda done: self._bar.advance(task, done)
        finally:
            self._bar.remove_task(task)
            if self._whole is not None:
                self._bar.advance(self._whole)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def label(method: str) -> str:
    """Return what a method's row is called for people."""
    return {UNPRUNED: "unpruned", ORACLE: "oracle (the evidence)"}.get(method, method)


def print_tables(console: Console, rows: Sequence[Row], positions: Sequence[Row]) -> None:
    """Print, for each set, accuracy and what was kept of the evidence, and what it costs."""
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_set = [row for row in rows if row.dataset == dataset]
        console.print(_accuracy(dataset, of_set))
        if any(row.evidence_kept is not None for row in of_set):
            console.print(_evidence(dataset, of_set))
        console.print(_costs(dataset, of_set))
    if positions:
        console.print(_positions(rows, positions))


def _table(title: str) -> Table:
    return Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )


def _budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({row.keep for row in rows if row.method not in (UNPRUNED, ORACLE)}, reverse=True)


def _tokens(rows: Sequence[Row], keep: float) -> str:
    return f"{next(row.visual_tokens for row in rows if row.keep == keep):g}"


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.method not in (UNPRUNED, ORACLE)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy(dataset: str, rows: Sequence[Row]) -> Table:
    total = rows[0].of_visual_tokens
    table = _table(
        f"{dataset}: right answers, %, of {rows[0].questions:,} questions, and 95 % interval, "
        f"by visual tokens of {total}"
    )
    table.add_column("method", no_wrap=True)
    budgets = _budgets(rows)
    best = {
        keep: max(row.accuracy for row in rows if row.keep == keep and row.method != ORACLE)
        for keep in budgets
    }
    for keep in budgets:
        table.add_column(_tokens(rows, keep), justify="right", no_wrap=True)
    for method in _methods(rows):
        cells = []
        for keep in budgets:
            row = next(row for row in rows if row.method == method and row.keep == keep)
            style = "bold green" if row.accuracy == best[keep] and not row.unpruned else "bold"
            cells.append(_with_interval(row, style))
        table.add_row(method, *cells)
    for row in rows:
        if row.method == ORACLE:
            table.caption_justify = "left"
            table.caption = (
                f"oracle, the evidence alone ({row.visual_tokens:.1f} tokens on average): "
                f"{_percent(row.accuracy)}, {_interval(row)}"
            )
    return table


def _with_interval(row: Row, style: str) -> Text:
    return Text.assemble(
        (_percent(row.accuracy), style),
        (f"\n{_interval(row)}", "dim"),
    )


def _interval(row: Row) -> str:
    low, high = _percent(row.ci_low), _percent(row.ci_high)
    return f"{low}-{'100' if high == '100.0' else high}"


def _evidence(dataset: str, rows: Sequence[Row]) -> Table:
    table = _table(f"{dataset}: tokens of the evidence that were kept, %")
    table.add_column("method", no_wrap=True)
    budgets = _budgets(rows)
    for keep in budgets:
        table.add_column(_tokens(rows, keep), justify="right", no_wrap=True)
    for method in _methods(rows):
        shares = [
            next(row.evidence_kept for row in rows if row.method == method and row.keep == keep)
            for keep in budgets
        ]
        table.add_row(method, *(_percent(share or 0.0) for share in shares))
    return table


def _costs(dataset: str, rows: Sequence[Row]) -> Table:
    table = _table(f"{dataset}: what one question costs, by visual tokens")
    table.add_column("", no_wrap=True)
    budgets = _budgets(rows)
    at = {
        keep: [row for row in rows if row.keep == keep and row.method not in (UNPRUNED, ORACLE)]
        for keep in budgets
    }
    for keep in budgets:
        table.add_column(_tokens(rows, keep), justify="right", no_wrap=True)
    prefill = [statistics.median(row.prefill_ms for row in at[keep]) for keep in budgets]
    memory = [statistics.median(row.peak_memory_mib for row in at[keep]) for keep in budgets]
    table.add_row("prefill, ms", *(f"{value:.1f}" for value in prefill))
    table.add_row("peak memory, MiB", *(f"{value:.2f}" for value in memory))
    table.add_section()
    for method in _methods(rows):
        own = [next(row for row in at[keep] if row.method == method) for keep in budgets]
        table.add_row(
            f"selection by {method}, ms",
            *("" if row.unpruned else f"{row.selection_ms:.1f}" for row in own),
        )
    return table


def _positions(rows: Sequence[Row], others: Sequence[Row]) -> Table:
    main, other = rows[0].positions, others[0].positions
    table = _table(f"{others[0].dataset}: positions, right answers, %")
    for title in ("method", "visual tokens", main, other):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in others:
        same = next(
            one
            for one in rows
            if (one.dataset, one.method, one.keep) == (row.dataset, row.method, row.keep)
        )
        table.add_row(
            label(row.method),
            f"{row.visual_tokens:.3g}",
            _percent(same.accuracy),
            _percent(row.accuracy),
        )
    return table
