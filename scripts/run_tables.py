"""Tables of runs of the evaluation for the documents: methods by group, and what they answered.

Used by ``methods_table.py``. Every method that is installed is in a table,
in the group that its own class tells: nothing here names one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenprune.registry import GROUPS, Method, listed
from tokenprune_eval.results.files import StoredRun
from tokenprune_eval.results.statistics import Accuracy, Answer, answer_of


def by_group() -> Iterator[tuple[str, list[Method]]]:
    """Yield each group's heading and methods."""
    for group, meaning in GROUPS.items():
        found = [one for one in listed().values() if one.group == group]
        if found and group != "cross-attention":  # of no prompt's tokens
            yield meaning.partition(":")[0], found


def answers_by_set(stored: StoredRun) -> dict[str, dict[str, dict[str, Answer]]]:
    """Return data set -> key of a condition -> question -> what was answered."""
    sets = {question.id: question.data_set for question in stored.questions}
    found: dict[str, dict[str, dict[str, Answer]]] = {name: {} for name in sets.values()}
    for record in stored.records:
        if (answer := answer_of(record)) is not None:
            found[sets[record.item]].setdefault(record.condition, {})[record.item] = answer
    return found


def right(found: Accuracy | None) -> str:
    """Return a share of right answers in % and its interval, or a dash."""
    if found is None:
        return "-"
    return f"{100 * found.share:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def markdown(headings: Sequence[str], texts: int, lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first columns are texts, and the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def replace_between(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its markers of a page, which it must have once.

    Raises
    ------
    SystemExit
        If it has not.
    """
    text = page.read_text("utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} must hold the markers {start} and {end} once")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{table}\n{end}{after}"
    page.write_text(text, "utf-8")
