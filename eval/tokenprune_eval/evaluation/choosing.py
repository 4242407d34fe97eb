"""What chooses tokens in an evaluation where a method by itself would not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tokenprune.budget import Keep
from tokenprune.selecting import select
from tokenprune.selection import Selection
from tokenprune.tokens import VisualTokens
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.transformers import ChooseTokens
from tokenprune_eval.evaluation.runner import Planned


def random_draws(plan: Sequence[Planned]) -> dict[str, ChooseTokens]:
    """Return what draws anew for every image or video, for each condition of ``random``.

    With one seed every image loses the same places, and a set's accuracy hangs on that one draw.

    Parameters
    ----------
    plan
        What is asked. The seed of an image or video is its place in its data set.

    Returns
    -------
    dict
        By the key of the condition, see `TransformersEngine`.
    """
    seeds: dict[Path, int] = {}
    for one in plan:
        paths = dict.fromkeys(path for each in one.data.questions for path in each.paths)
        seeds |= {path: place for place, path in enumerate(paths)}
    return {
        condition.key: partial(_draw, seeds=seeds, keep=condition.keep)
        for one in plan
        for condition in one.conditions
        if condition.method == "random"
    }


def _draw(
    question: Question, number: int, tokens: VisualTokens, *, seeds: Mapping[Path, int], keep: Keep
) -> Selection:
    return select(tokens, "random", keep, seed=seeds[question.paths[number]])
