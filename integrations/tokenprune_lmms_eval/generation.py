"""A task's ``generation_kwargs`` as arguments of ``generate``, and stopping at a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria

from tokenprune.errors import ConfigError

MAX_NEW_TOKENS = 1024
"""Where a task does not say how long an answer may be."""

_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Generation:
    """How to generate.

    Attributes
    ----------
    arguments
        For ``model.generate``.
    until
        Texts that end an answer and are no part of it.
    unused
        Names that neither transformers nor this package knows.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...]
    unused: tuple[str, ...]


def read_generation(values: Mapping[str, Any]) -> Generation:
    """Translate a task's ``generation_kwargs``.

    Tokens are drawn if ``do_sample`` says so, or, where it is left out, if the temperature is above
    0; a temperature of 0 always is greedy.

    Parameters
    ----------
    values
        As the task, or ``--gen_kwargs``, has them.

    Returns
    -------
    Generation

    Raises
    ------
    ConfigError
        If ``until`` is neither text nor a list of texts.
    """
    hf: Any = transformers  # much of it is not typed
    known = set(vars(hf.GenerationConfig()))
    arguments = {
        name: value for name, value in values.items() if name in known and value is not None
    }
    unused = tuple(name for name in values if name not in known and name != "until")

    temperature = arguments.get("temperature")
    sample = arguments.get("do_sample", temperature is not None and temperature > 0)
    arguments["do_sample"] = bool(sample) and temperature != 0
    if not arguments["do_sample"]:
        # None also puts aside what the checkpoint's own configuration says.
        arguments.update(dict.fromkeys(_SAMPLING))
    if "max_new_tokens" not in arguments and "max_length" not in arguments:
        arguments["max_new_tokens"] = MAX_NEW_TOKENS

    until = values.get("until") or []
    if isinstance(until, str):
        until = [until]
    if not isinstance(until, Sequence) or not all(isinstance(text, str) for text in until):
        raise ConfigError(f"until={until!r} must be a text or a list of texts.")
    return Generation(arguments, tuple(text for text in until if text), unused)


class StopAtText(StoppingCriteria):
    """Ends an answer as soon as it holds one of some texts; the prompt is not looked at.

    Parameters
    ----------
    tokenizer
        Of the model.
    until
        The texts.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return BoolTensor [B] for token ids [B, L]: whether each answer is over."""
        if self._start is None:
            # First asked when there is one new token. The prompt's own length does not help, as
            # pruning has shortened it.
            self._start = input_ids.shape[1] - 1
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        over = [any(text in answer for text in self._until) for answer in texts]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)


def cut(answer: str, until: Sequence[str]) -> str:
    """Return an answer up to the first of some texts."""
    for text in until:
        answer = answer.split(text, 1)[0]
    return answer
