"""How a question is put and how its answer is read.

Choices are laid out one a line behind their letters, and the letter is asked for, as LLaVA's
evaluation does; the text is read leniently, since models wrap the letter in words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from tokenprune_eval.data.item import LETTERS, Item

LETTER_ONLY = "Answer with the option's letter from the given choices directly."

_LETTER = r"[\(\[\"'*_`]*([A-Z])[\)\]\"'*_`]*"
_STANDING_ALONE = re.compile(rf"^{_LETTER}(?:[.:,;)\-\s]|$)")
_ANNOUNCED = re.compile(
    rf"(?:answer|option|choice)(?:\s+is)?\s*[:\-]?\s*(?:the\s+)?(?:option|choice|letter)?\s*{_LETTER}"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(r"(?<![A-Za-z'])\(?([A-Z])\)?(?![A-Za-z'])")


def prompt_of(item: Item, instruction: str = "") -> str:
    """Return the text that is put to the model.

    Parameters
    ----------
    item
        The question.
    instruction
        Put behind an open question, on a line of its own; a question with choices has its own.
    """
    if item.choices:
        choices = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)
        )
        return f"{item.question}\n{choices}\n{LETTER_ONLY}"
    return f"{item.question}\n{instruction}" if instruction else item.question


def letters_of(item: Item) -> str:
    """Return the letters of a question's choices, ``"ABCD"``."""
    return LETTERS[: len(item.choices)]


def read_choice(text: str, item: Item) -> str:
    """Return the letter that an answer names, or ``""``.

    In this order: a letter at the start, standing alone; a letter announced by "answer", "option"
    or "choice"; the text of exactly one choice; a single letter that stands alone anywhere.

    Parameters
    ----------
    text
        What the model said.
    item
        A question with choices.
    """
    said = text.strip()
    letters = letters_of(item)
    # "A man in a hat" begins with a word.
    if (match := _STANDING_ALONE.match(said)) and match[1] in letters and said[:2] != "A ":
        return str(match[1])
    announced = [
        str(match[1]).upper() for match in _ANNOUNCED.finditer(said) if match[1].upper() in letters
    ]
    if announced:
        return announced[-1]
    plain = normalised(said)
    texts = [normalised(choice) for choice in item.choices]
    exact = [letter for letter, choice in zip(letters, texts, strict=True) if choice == plain]
    within = exact or [
        letter
        for letter, choice in zip(letters, texts, strict=True)
        if choice and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", plain)
    ]
    if len(within) == 1:
        return within[0]
    alone = {match for match in _ANYWHERE.findall(said) if match in letters}
    if len(alone) == 1 and not within and not re.search(r"\bA [a-z]", said):
        return str(alone.pop())
    return ""


def normalised(text: str) -> str:
    """Return an open answer as it is compared: lower case, single spaces, no outer punctuation."""
    plain = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return plain.strip(" .,;:!?\"'`()[]")


def likeliest(likelihoods: Mapping[str, float]) -> str:
    """Return the likeliest letter; of equals, the first."""
    return max(sorted(likelihoods), key=lambda letter: likelihoods[letter])
