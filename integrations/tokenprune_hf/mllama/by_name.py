"""Deprecated: cross-attention trimmed by ``prune(model, "trimmed-attention", keep)``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tokenprune.budget import Keep
from tokenprune.errors import ConfigError, OptionError, did_you_mean
from tokenprune_hf.mllama.method import METHOD
from tokenprune_hf.mllama.trimmed import TrimmedAttention, trim_cross_attention


def trim_by_name(
    model: Any, keep: Keep, options: dict[str, Any], about_prompts: Mapping[str, tuple[Any, Any]]
) -> TrimmedAttention:
    """Warn, and do what `tokenprune_hf.trim_cross_attention` does.

    Parameters
    ----------
    model, keep
        As there.
    options
        Its options by name.
    about_prompts
        Parameters of `prune` that speak of tokens in a prompt: name -> what was given, and the
        default.

    Raises
    ------
    ConfigError
        If one of `about_prompts` is not the default.
    OptionError
        For an option that is not there.
    BudgetError, OptionError, UnsupportedModelError, TokenPruneError
        As `tokenprune_hf.trim_cross_attention`.
    """
    for name, (given, default) in about_prompts.items():
        if given != default:
            raise ConfigError(
                f"{name}={given!r} has no meaning for method {METHOD.name!r}: the vision tokens "
                "it trims stand beside the prompt, without positions and without a place in the "
                f"attention mask. Leave {name} out."
            )
    for name in options:
        if name not in METHOD.options:
            raise OptionError(
                f"method {METHOD.name!r} has no option {name!r}. "
                f"{did_you_mean(name, METHOD.options)}"
            )
    warnings.warn(
        f'prune(model, "{METHOD.name}") and apply(model, "{METHOD.name}") are deprecated. Call '
        f"{METHOD.call} instead; it has the same options.",
        DeprecationWarning,
        stacklevel=4,
    )
    return trim_cross_attention(model, keep, **options)
