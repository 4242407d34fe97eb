"""How a question is put, and what its answer counts as.

Choices are laid out one a line behind their letters, and the letter is asked for, as LLaVA's
evaluation does. `tokenprune_eval.results.answer_text` reads the answers to them, and
`tokenprune_eval.results.scoring` those to open questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from tokenprune_eval.data.question import LETTERS, BoxUnit, Question
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.settings import ChooseBy, Settings
from tokenprune_eval.results.answer_text import read_choice
from tokenprune_eval.results.records import Condition, Record
from tokenprune_eval.results.scoring import RIGHT, RULES

LETTER_ONLY = "Answer with the option's letter from the given choices directly."

BOX_INSTRUCTIONS: Mapping[BoxUnit, str] = {
    "fraction": "Answer with one box, [left, top, right, bottom], in fractions of the image's "
    "width and height between 0 and 1.",
    "thousandth": "Answer with one box, [left, top, right, bottom], in thousandths of the image's "
    "width and height between 0 and 1000.",
    "pixel": "Answer with one box, [left, top, right, bottom], in pixels of the image.",
}
"""What is put behind a question for a box: the unit in which the answer is read."""


def prompt_of(question: Question, instruction: str = "", box_unit: BoxUnit = "fraction") -> str:
    """Return the text that is put to the model.

    Parameters
    ----------
    question
        The question.
    instruction
        Put behind an open question, on a line of its own, in place of the data set's own; a
        question with choices has its own.
    box_unit
        The unit that a question for a box asks for.
    """
    if question.choices:
        choices = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False)
        )
        return f"{question.question}\n{choices}\n{LETTER_ONLY}"
    own = BOX_INSTRUCTIONS[box_unit] if question.scoring == "box" else question.instruction
    behind = instruction or own
    return f"{question.question}\n{behind}" if behind else question.question


def prompts_of(settings: Settings) -> Callable[[Question], str]:
    """Return what makes a run's prompts."""
    return partial(prompt_of, instruction=settings.instruction, box_unit=settings.box_unit)


def letters_of(question: Question) -> str:
    """Return the letters of a question's choices, ``"ABCD"``."""
    return LETTERS[: len(question.choices)]


def likeliest(likelihoods: Mapping[str, float]) -> str:
    """Return the likeliest letter; of equals, the first."""
    return max(sorted(likelihoods), key=lambda letter: likelihoods[letter])


def score(
    question: Question,
    condition: Condition,
    said: EngineAnswer,
    choose_by: ChooseBy,
    box_unit: BoxUnit = "fraction",
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
    box_unit
        What the numbers of a box count, where the question asks for one.
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
        reading = RULES[question.scoring].read(said.text, question, said.cut, box_unit)
        record.correct_by_text = None if reading is None else reading.score >= RIGHT
        if reading is not None and question.scoring != "exact":
            record.read, record.score = reading.said, reading.score
    record.cut = True if record.correct_by_text is None else None
    by_text = choose_by == "text" or not question.choices
    record.correct = record.correct_by_text if by_text else record.correct_by_likelihood
    return record
