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
    """The visual tokens that were given are incomplete, inconsistent or not finite."""


class WeightsChangedError(TokenPruneError, RuntimeError):
    """Weights were edited behind torch's back since they were last looked at; call again."""


class UnknownMethodError(TokenPruneError, LookupError):
    """No selector is registered under that name."""


class OptionError(TokenPruneError, ValueError):
    """A method's option is unknown, has the wrong type or a value it cannot take."""


class ConfigError(TokenPruneError, ValueError):
    """A pruning configuration has unknown keys or values it cannot take."""


class AbstainedError(ConfigError):
    """What was read in place of a configuration says that a calibration found no budget."""


class SelectorError(TokenPruneError, ValueError):
    """A selector is not defined as it must be, or returns a value that it must not."""


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
    """A prompt's spans or sinks are not valid, or a mask does not fit the prompt."""


class InputFileError(TokenPruneError, ValueError):
    """A file given to tokenprune is missing, damaged or of a kind it cannot read."""


class OutputError(TokenPruneError, OSError):
    """A result cannot be written where it was asked for."""


class MissingPackageError(TokenPruneError, ImportError):
    """A package that this part of tokenprune needs is not installed."""


def reason_of(error: BaseException) -> str:
    """Return an exception's message as part of a sentence.

    All messages that quote another error use this function, so that they have one line and one full
    stop whatever the error says.

    Parameters
    ----------
    error
        Of the system or a library. One of ours is a whole message; hand it on as it is.

    Returns
    -------
    str
        Its first line without a full stop at the end, of the system's errors what the system
        says; its class where it says nothing.
    """
    said = getattr(error, "strerror", None) if isinstance(error, OSError) else None
    lines = (" ".join(line.split()).rstrip(".") for line in str(said or error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


class UntestedReleaseWarning(UserWarning):
    """An engine is of a release that was not tested; no exception, and none of the above."""


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
