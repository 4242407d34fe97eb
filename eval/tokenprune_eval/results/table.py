"""The results as tables of text: one for each data set, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console, Group
from rich.text import Text

from tokenprune_eval.results import words
from tokenprune_eval.results.scores import Scores
from tokenprune_eval.results.summary import DataInfo, Results, Row
from tokenprune_eval.shared.tables import plain_table

NOTES = (
    "right: share of right answers over the answered questions, 95 % Wilson interval. "
    "difference: to unpruned in percentage points over the questions answered under both, 95 % "
    "paired bootstrap interval; p: exact McNemar test, not adjusted for the number of "
    "conditions. same: same answer as unpruned. "
    "group A: right answers among the questions that are right unpruned and wrong with resize at "
    "the same budget. tokens: visual tokens read, mean. first token: median seconds until it, "
    "encoding and selecting included; answers/s: answers per second of work; speed-up: seconds to "
    "the first token unpruned over those here, median over the questions of both; slower: stands "
    "where the 95 % bootstrap interval of that, or of the same for the whole answer, is below 1. "
    "cut: answers cut off before they named anything, neither "
    "right nor wrong; at least: the share of right answers if all of these were wrong. answered:"
    " shown where some questions have no answer, because it was cut, because of an error, or "
    "because they are not asked yet. Questions are taken as independent."
)

Columns = Sequence[tuple[str, Sequence[str]]]
"""Title and cells of each column; the first columns are texts, those with digits numbers."""

_ALWAYS = 4
_NAMING = 3
_TEXTS = 1
_ANSWERED = "answered"
_NOTE = "slower"
"""The column that holds words, in the rows that have any."""
_TIMES = ("first token, s", "answers/s", "speed-up", _NOTE)
"""What a terminal has no room for beside all the rest."""

_Column = tuple[str, Callable[[Row], str]]

_COLUMNS: tuple[_Column, ...] = (
    ("method", lambda row: words.plain(words.label(row.method, row.variant))),
    ("keep", lambda row: words.keep_text(row.method, row.keep)),
    ("tokens", lambda row: words.number(row.visual_tokens)),
    ("right, %", lambda row: words.share_with_interval(row.accuracy)),
    ("difference", lambda row: words.difference_with_interval(row.against_unpruned)),
    ("p", lambda row: words.p_value(row.against_unpruned)),
    ("same, %", lambda row: words.agreement(row.against_unpruned)),
    ("group A, %", lambda row: words.share_with_interval(row.group_a)),
    (_TIMES[0], lambda row: words.seconds(row.seconds.first_token)),
    (_TIMES[1], lambda row: words.rate(row.items_per_second)),
    (_TIMES[2], lambda row: words.speed_up(row.first_token_speed_up)),
    ("cut", lambda row: f"{row.cut:,}" if row.cut else words.NOTHING),
    ("at least, %", lambda row: words.percent(row.at_least) if row.cut else words.NOTHING),
    (_ANSWERED, lambda row: f"{row.answered:,}"),
    (
        _NOTE,
        lambda row: (
            words.slower(row.method, row.first_token_speed_up, row.answer_speed_up) or words.NOTHING
        ),
    ),
)


def columns(rows: Sequence[Row]) -> Columns:
    """Return the columns of one data set's table, without those that would say nothing.

    Parameters
    ----------
    rows
        Of one data set, in the order of the table.
    """
    behind = [title for title, _ in _COLUMNS].index("group A, %") + 1
    return _filled([*_COLUMNS[:behind], *_score_columns(rows), *_COLUMNS[behind:]], rows)


def _filled(wanted: Sequence[_Column], rows: Sequence[Row]) -> Columns:
    """Return columns with their cells, without those that would say nothing."""
    made = [(title, [cell(row) for row in rows]) for title, cell in wanted]
    unanswered = any(row.answered < row.questions for row in rows)
    return [
        (title, cells)
        for place, (title, cells) in enumerate(made)
        if place < _ALWAYS
        or (unanswered if title == _ANSWERED else any(cell != words.NOTHING for cell in cells))
    ]


def _score_columns(rows: Sequence[Row]) -> list[_Column]:
    """Return the columns of a data set's own measure and its further figures."""
    scores = _scores(rows)
    columns: list[_Column] = []
    if metric := words.metric_of(scores):
        columns = [
            (f"{metric}, %", lambda row: words.score_with_interval(row.scores)),
            (
                f"{metric} difference",
                lambda row: words.difference_with_interval(
                    row.scores.against_unpruned if row.scores else None
                ),
            ),
        ]
    columns += [
        (words.figure_title(name), partial(_figure, name)) for name in words.figures_shown(scores)
    ]
    return columns


def _scores(rows: Sequence[Row]) -> list[Scores]:
    return [row.scores for row in rows if row.scores is not None]


def _figure(name: str, row: Row) -> str:
    return words.figure(name, row.scores.figures.get(name) if row.scores else None)


def title(results: Results, name: str) -> str:
    """Return what stands above a data set's table."""
    rows = [row for row in results.rows if row.data_set == name]
    data = next(one for one in results.data if one.name == name)
    total = next((row.of_visual_tokens for row in rows if row.of_visual_tokens is not None), None)
    text = f"{words.plain(name)}: {words.questions(data.questions, data.of_questions)}"
    return text if total is None else f"{text}, {words.number(total)} visual tokens unpruned"


def markdown(results: Results) -> str:
    """Return all tables as Markdown.

    Parameters
    ----------
    results
        What a run found.
    """
    lines = [f"# {escape(results.model) or 'Evaluation'}", ""]
    if results.bundled:
        lines += [f"**{words.BUNDLED}**", ""]
    if not results.complete:
        lines += ["The run is not complete; these are the answers so far.", ""]
    for one in results.data:
        rows = [row for row in results.rows if row.data_set == one.name]
        lines += [f"## {escape(title(results, one.name))}", ""]
        lines += [*markdown_table(columns(rows)), ""]
        for said in _left_out(one, rows):
            lines += [escape(said), ""]
    for note in words.score_notes(_scores(results.rows)):
        lines += [escape(note), ""]
    return "\n".join([*lines, NOTES, ""])


def print_tables(console: Console, results: Results) -> None:
    """Print all tables.

    Parameters
    ----------
    console
        Of at least 110 columns, to show every column whole.
    results
        What a run found.
    """
    for one in results.data:
        rows = [row for row in results.rows if row.data_set == one.name]
        # A terminal is too narrow for all of it side by side.
        answers = [column for column in _COLUMNS if column[0] not in _TIMES]
        times = [column for column in _COLUMNS if column[0] in _TIMES]
        console.print(rich_table(title(results, one.name), _filled(answers, rows)))
        if measured := _score_columns(rows):
            console.print(rich_table("", _filled([*_COLUMNS[:_NAMING], *measured], rows)))
        timed = _filled([*_COLUMNS[:_ALWAYS], *times], rows)
        if len(timed) > _ALWAYS:
            console.print(rich_table("Time beside accuracy", timed))
        for said in _left_out(one, rows):
            console.print(Text(said))
    for note in words.score_notes(_scores(results.rows)):
        console.print(Text(note, style="dim"))
    console.print(Text(NOTES, style="dim"))
    if not results.complete:
        console.print(Text("The run is not complete; these are the answers so far."))
    if results.bundled:
        console.print(Text(words.BUNDLED, style="bold"))


def _left_out(data: DataInfo, rows: Sequence[Row]) -> list[str]:
    """Return what the accuracies leave out, a line for each reason there is."""

    def counts(field: str) -> str:
        parts = [(words.plain(row.condition), getattr(row, field)) for row in rows]
        return ", ".join(f"{condition} {count:,}" for condition, count in parts if count)

    lines = []
    if cut := counts("cut"):
        lines.append(f"Answers cut off before they named anything: {cut}. {words.CUT}")
    if errors := counts("errors"):
        failed = f" {words.failed(data.failed)}" if data.failed else ""
        lines.append(f"Attempts that ended with an error: {errors}.{failed}")
    return lines


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    text = words.plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{sign}" if sign in "\\`*_[]|~#" else sign for sign in text)


def markdown_table(columns: Columns) -> list[str]:
    """Return a Markdown table's lines, padded so that it also reads well as text."""
    filled = [[title, *(escape(cell) for cell in cells)] for title, cells in columns]
    widths = [max(4, *(len(cell) for cell in column)) for column in filled]
    rows = [
        "| "
        + " | ".join(
            cell.ljust(width) if place < _TEXTS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in zip(*filled, strict=True)
    ]
    rule = " | ".join(
        "-" * width if place < _TEXTS else "-" * (width - 1) + ":"
        for place, width in enumerate(widths)
    )
    return [rows[0], f"| {rule} |", *rows[1:]]


def rich_table(title: str, columns: Columns) -> Group:
    """Return the same table for a terminal, under its title."""
    table = plain_table()
    for place, (name, _) in enumerate(columns):
        if name == _NOTE:
            # Words go on in the next line rather than take room from the numbers.
            table.add_column(name, min_width=12)
            continue
        table.add_column(
            name, justify="left" if place < _TEXTS else "right", no_wrap=True, overflow="ellipsis"
        )
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    # A table's own title would be broken to its width.
    return Group(Text(f"\n{title}" if title else "", style="bold"), table)
