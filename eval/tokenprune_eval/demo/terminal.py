"""The tables of a run in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenprune_eval.demo.preset import ORACLE, DemoSet
from tokenprune_eval.demo.results import Row
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.shared.tables import percent, plain_table


def label(method: str) -> str:
    """Return what a method's row is called for people."""
    return "oracle (the evidence)" if method == ORACLE else method


def print_accuracy(console: Console, run: str, asked: DemoSet, rows: Sequence[Row]) -> None:
    """Print a set's right answers; the title says which run it is and how much was asked.

    Parameters
    ----------
    console
        Where.
    run
        The run's name, see `Preset`.
    asked
        The set.
    rows
        All of its rows.
    """
    console.print(_accuracy(run, asked, rows))


def print_details(console: Console, rows: Sequence[Row], positions: Sequence[Row]) -> None:
    """Print, for each set, what was kept of the evidence, and the other way to count positions."""
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_set = [row for row in rows if row.dataset == dataset]
        if any(row.evidence_kept is not None for row in of_set):
            console.print(_evidence(dataset, of_set))
    if positions:
        console.print(_positions(rows, positions))


def _budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({row.keep for row in rows if row.method not in (UNPRUNED, ORACLE)}, reverse=True)


def _tokens(rows: Sequence[Row], keep: float) -> str:
    return f"{next(row.visual_tokens for row in rows if row.keep == keep):g}"


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.method not in (UNPRUNED, ORACLE)))


def _accuracy(run: str, asked: DemoSet, rows: Sequence[Row]) -> Table:
    count, whole = len(asked.data.questions), asked.of_questions
    amount = f"all {whole:,} questions" if count == whole else f"{count:,} of {whole:,} questions"
    table = plain_table(
        f"\n{asked.name}, {run} run: {amount}; right answers in % and 95 % intervals, by visual "
        f"tokens of {rows[0].of_visual_tokens}"
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
                f"{percent(row.accuracy)}, {_interval(row)}"
            )
    return table


def _with_interval(row: Row, style: str) -> Text:
    return Text.assemble(
        (percent(row.accuracy), style),
        (f"\n{_interval(row)}", "dim"),
    )


def _interval(row: Row) -> str:
    low, high = percent(row.ci_low), percent(row.ci_high)
    return f"{low}-{'100' if high == '100.0' else high}"


def _evidence(dataset: str, rows: Sequence[Row]) -> Table:
    table = plain_table(f"\n{dataset}: tokens of the evidence that were kept, %")
    table.add_column("method", no_wrap=True)
    budgets = _budgets(rows)
    for keep in budgets:
        table.add_column(_tokens(rows, keep), justify="right", no_wrap=True)
    for method in _methods(rows):
        shares = [
            next(row.evidence_kept for row in rows if row.method == method and row.keep == keep)
            for keep in budgets
        ]
        table.add_row(method, *(percent(share or 0.0) for share in shares))
    return table


def print_costs(console: Console, timed: str, rows: Sequence[Row]) -> None:
    """Print what a question of a set costs.

    Parameters
    ----------
    console
        Where.
    timed
        The model that was timed.
    rows
        All rows of the set.
    """
    table = plain_table(
        f"\n{rows[0].dataset}: milliseconds to the first answer token on {timed}, one core, by "
        "visual tokens"
    )
    table.add_column("", no_wrap=True)
    budgets = _budgets(rows)
    at = {
        keep: [row for row in rows if row.keep == keep and row.method not in (UNPRUNED, ORACLE)]
        for keep in budgets
    }
    for keep in budgets:
        table.add_column(_tokens(rows, keep), justify="right", no_wrap=True)
    for method in _methods(rows):
        own = [next(row for row in at[keep] if row.method == method) for keep in budgets]
        table.add_row(method, *(_sooner(row, rows[0]) for row in own))
    table.add_section()
    table.add_row("of it encoding", *(f"{at[keep][0].encode_ms:.0f}" for keep in budgets))
    table.add_row("of it prefill", *(f"{at[keep][0].prefill_ms:.0f}" for keep in budgets))
    memory = [statistics.median(row.peak_memory_mib for row in at[keep]) for keep in budgets]
    table.add_row("peak memory, MiB", *(f"{value:.1f}" for value in memory))
    console.print(table)


def _sooner(row: Row, unpruned: Row) -> Text:
    """Return a time and how many times as soon it is as the unpruned model's."""
    times = unpruned.first_token_ms / row.first_token_ms
    compared = "" if row.unpruned else "slower" if times < 1 else f"x{times:.2f}"
    return Text.assemble((f"{row.first_token_ms:.0f}", "bold"), (f"\n{compared}", "dim"))


def _positions(rows: Sequence[Row], others: Sequence[Row]) -> Table:
    main, other = rows[0].positions, others[0].positions
    table = plain_table(f"\n{others[0].dataset}: positions, right answers, %")
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
            percent(same.accuracy),
            percent(row.accuracy),
        )
    return table
