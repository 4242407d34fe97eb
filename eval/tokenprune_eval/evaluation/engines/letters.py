"""Which tokens begin an answer with a letter: what the likelihood of a choice is read from."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import ConfigError
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.scoring import letters_of


class Letters:
    """The tokens of a tokenizer that stand for letters, with and without a space in front.

    Parameters
    ----------
    tokenizer
        Of the model.
    required
        Whether the run counts likelihoods; without, they are left out where letters are no tokens.
    """

    def __init__(self, tokenizer: Any, required: bool) -> None:
        self._tokenizer = tokenizer
        self._required = required
        self._known: dict[str, list[list[int]]] = {}

    def of(self, question: Question) -> list[list[int]]:
        """Return the tokens of each of a question's letters; nothing for an open question.

        Raises
        ------
        ConfigError
            If a letter is no token and likelihoods are required.
        """
        letters = letters_of(question)
        if letters not in self._known:
            self._known[letters] = self._find(letters)
        return self._known[letters]

    def _find(self, letters: str) -> list[list[int]]:
        result = []
        for letter in letters:
            ways = [
                self._tokenizer.encode(text, add_special_tokens=False)
                for text in (letter, f" {letter}")
            ]
            unknown = self._tokenizer.unk_token_id
            tokens = sorted({way[0] for way in ways if len(way) == 1 and way[0] != unknown})
            if not tokens and self._required:
                raise ConfigError(
                    f"this model's tokenizer has no token for the letter {letter}, so the "
                    "likelihood of a choice is not known. Use --choose-by text."
                )
            if not tokens:
                return []
            result.append(tokens)
        return result
