"""How a question is put, and what its answer counts as.

Choices are laid out one a line behind their letters, and the letter is asked for, as LLaVA's
evaluation does. `tokenprune_eval.results.answer_text` reads the answers.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenprune_eval.data.question import LETTERS, Question
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.settings import ChooseBy
from tokenprune_eval.results.answer_text import is_right, read_choice
from tokenprune_eval.results.records import Condition, Record

LETTER_ONLY = "Answer with the option's letter from the given choices directly."


def prompt_of(question: Question, instruction: str = "") -> str:
    """Return the text that is put to the model.

    Parameters
    ----------
    question
        The question.
    instruction
        Put behind an open question, on a line of its own; a question with choices has its own.
    """
    if question.choices:
        choices = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False)
        )
        return f"{question.question}\n{choices}\n{LETTER_ONLY}"
    return f"{question.question}\n{instruction}" if instruction else question.question


def letters_of(question: Question) -> str:
    """Return the letters of a question's choices, ``"ABCD"``."""
    return LETTERS[: len(question.choices)]


def likeliest(likelihoods: Mapping[str, float]) -> str:
    """Return the likeliest letter; of equals, the first."""
    return max(sorted(likelihoods), key=lambda letter: likelihoods[letter])


def score(
    question: Question, condition: Condition, said: EngineAnswer, choose_by: ChooseBy
) -> Record:
    """Return the record of an answer, read against the right one.

    Parameters
    ----------
    question
        The question.
    condition
        How the model was pruned.
    said
        What it said.
    choose_by
        What counts for questions with choices.
    """
    record = Record(item=question.id, condition=condition.key, error=said.error)
    if said.error is not None:
        return record
    for name in (
        "text",
        "likelihoods",
        "visual_tokens",
        "of_visual_tokens",
        "prompt_tokens",
        "answer_tokens",
        "mass_kept",
        "kv_bytes",
        "batch",
        "seconds",
    ):
        setattr(record, name, getattr(said, name))
    if question.choices:
        record.choice = read_choice(said.text, question, cut=said.cut)
        undecided = said.cut and not record.choice
        record.correct_by_text = None if undecided else record.choice == question.answer
        if said.likelihoods is not None:
            record.correct_by_likelihood = likeliest(said.likelihoods) == question.answer
    else:
        record.correct_by_text = is_right(said.text, question.answer, cut=said.cut)
    record.cut = True if record.correct_by_text is None else None
    by_text = choose_by == "text" or not question.choices
    record.correct = record.correct_by_text if by_text else record.correct_by_likelihood
    return record
