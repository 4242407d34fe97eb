"""Which tokens begin an answer with a letter: what the likelihood of a choice is read from."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import ConfigError


def letter_tokens(tokenizer: Any, letters: str) -> list[list[int]]:
    """Return, for each letter, its tokens with and without a space in front.

    Parameters
    ----------
    tokenizer
        Of the model.
    letters
        For example ``"ABCD"``.

    Raises
    ------
    ConfigError
        If a letter is no token.
    """
    result = []
    for letter in letters:
        ways = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
        unknown = tokenizer.unk_token_id
        tokens = sorted({way[0] for way in ways if len(way) == 1 and way[0] != unknown})
        if not tokens:
            raise ConfigError(
                f"this model's tokenizer has no token for the letter {letter}, so its likelihood "
                "is not known. Use --choose-by text."
            )
        result.append(tokens)
    return result
