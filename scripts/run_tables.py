"""Tables of runs of the evaluation for the documents: methods by group, and what they answered.

Every method that is installed is in a table, in the group that its own class tells: nothing here
names one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
