"""Every exception tokenprune raises on purpose, and the "did you mean" they share.

All derive from `TokenPruneError`, so one ``except`` clause catches the lot; each also derives
from the built-in exception a Python programmer would expect in its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenPruneError(Exception):
    """Base of every exception that tokenprune raises on purpose."""


class BudgetError(TokenPruneError, ValueError):
    """`keep` is not a number of tokens or a fraction that can be kept."""


class TokensError(TokenPruneError, ValueError):
    """The visual tokens given are incomplete, inconsistent or not finite."""


class UnknownMethodError(TokenPruneError, LookupError):
    """No selector is registered under that name."""


class OptionError(TokenPruneError, ValueError):
    """A method's option is unknown, has the wrong type or a value it cannot take."""


class ConfigError(TokenPruneError, ValueError):
    """A pruning configuration has unknown keys or values it cannot take."""


class SelectorError(TokenPruneError, ValueError):
    """A selector is defined wrongly, or returns something else than a selector must."""


class RegistryError(TokenPruneError, RuntimeError):
    """A selector cannot be registered or loaded."""


class UnsupportedModelError(TokenPruneError, TypeError):
    """The model is no vision-language model that tokenprune can prune, or not with that method."""


class UnreadableProjectorError(UnsupportedModelError):
    """A projector's weights are not what it computes with, or not known.

    Parameters
    ----------
    reason
        Why, without a full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}. Load the projector plain, in float16, bfloat16 or float32, with adapters "
            "merged; or choose a method that does not look at its weights."
        )
        self.reason = reason


class PromptError(TokenPruneError, ValueError):
    """The prompt does not match its images or videos, or cannot be pruned as it was passed."""


class LayoutError(TokenPruneError, ValueError):
    """A prompt's spans or sinks cannot be, or a mask does not fit the prompt."""


class InputFileError(TokenPruneError, ValueError):
    """A file given to tokenprune is missing, damaged or of a kind it cannot read."""


class MissingPackageError(TokenPruneError, ImportError):
    """A package that this part of tokenprune needs is not installed."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return the sentence that lists what is allowed, led by the nearest name if there is one.

    Parameters
    ----------
    given
        What the user wrote.
    allowed
        Every name that would have been accepted.

    Returns
    -------
    str
        ``"Did you mean 'x'? Allowed: a, b, x."``, without the question where nothing is near.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    question = f"Did you mean {near[0]!r}? " if near else ""
    return f"{question}Allowed: {', '.join(names) if names else '(none)'}."
