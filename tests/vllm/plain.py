"""vLLM's own engine as the reference: a pruned prompt, put together by hand, is read by it.

For architectures that transformers has no class for. The weights are made from the names of the
parameters (`random_weights`), so that the plain engine and the pruned one have the same without a
checkpoint of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy


@contextmanager
def random_weights() -> Iterator[None]:
    """Let vLLM, told ``load_format="dummy"``, fill each parameter by a seed made of its name."""

    def fill(_loader: Any, model: Any, _config: Any) -> None:
        names = [name for name, _ in model.named_parameters()]
        # Where embeddings rate the next token, too, large ones would always say the last one again.
        embedding = 1.0 if any("lm_head" in name for name in names) else 0.2
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                if "embed" in name:
                    noise *= embedding
                elif "gate." not in name and "lm_head" not in name:
                    noise *= parameter[0].numel() ** -0.5
            else:
                noise = 0.1 * noise + float("bias" not in name)
            parameter.data.copy_(noise)

    with mock.patch.object(DummyModelLoader, "load_weights", fill):
        yield


@dataclass
class Whole:
    """What the plain model made of an unpruned prompt, read in one step.

    Attributes
    ----------
    ids, is_row
        LongTensor [L] and BoolTensor [L].
    rows
        Of each image or video, in the prompt's order: [n, D].
    positions
        [L] or [3, L].
    behind
        Where the first answered token stands: [1] or [3, 1].
    answered
        The tokens of the answer.
    """

    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    is_row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    rows: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    behind: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    answered: list[int] = field(default_factory=list)


class PlainEngine:
    """A plain `vllm.LLM` in this process, which reads each prompt in one step.

    Parameters
    ----------
    llm
        The engine, without caches of prompts or images.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._whole = Whole()
        self._steps = 0
        self._short: tuple[Tensor, list[Tensor], Tensor, Tensor | None] | None = None
        (self.model,) = llm.apply_model(lambda model: model)
        self._embed, self._forward = self.model.embed_input_ids, self.model.forward
        self.model.embed_input_ids, self.model.forward = self._embed_ids, self._run

    def ask(self, request: dict[str, Any]) -> Whole:
        """Return what the model makes of a request, and answers."""
        self._whole, self._steps, self._short = Whole(), 0, None
        (self._whole.answered,) = answer(self._llm, [request], greedy(words=WORDS))
        return self._whole

    def ask_pruned(
        self, whole: Whole, kept: Sequence[Sequence[int]], compact: bool = False
    ) -> list[int]:
        """Return the answer to a prompt of which some rows are left out.

        Parameters
        ----------
        whole
            The unpruned prompt.
        kept
            Of each image or video, the rows that stay.
        compact
            Whether the short prompt has the engine's own positions.
        """
        stays = ~whole.is_row
        offsets = [0, *torch.tensor([len(rows) for rows in whole.rows]).cumsum(0).tolist()]
        columns = whole.is_row.nonzero()[:, 0]
        for start, indices in zip(offsets[:-1], kept, strict=True):
            stays[columns[start + torch.tensor(indices)]] = True
        rows = [rows[list(indices)] for rows, indices in zip(whole.rows, kept, strict=True)]
        self._whole, self._steps = whole, 0
        positions = None if compact else whole.positions[..., stays]
        self._short = whole.ids[stays], rows, whole.is_row[stays], positions
        request = {"prompt_token_ids": self._short[0].tolist()}
        (answered,) = answer(self._llm, [request], greedy(words=WORDS))
        return answered

    def _embed_ids(
        self,
        ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Any:
        rows = multimodal_embeddings
        if self._steps == 0 and self._short is not None:
            _, rows, is_multimodal, _ = self._short
            assert len(ids) == len(is_multimodal), "the prompt was read in several steps"
        elif self._steps == 0:
            self._whole.ids = ids.clone()
            if rows and is_multimodal is not None:
                self._whole.rows = [of_item.clone() for of_item in rows]
                self._whole.is_row = is_multimodal.clone()
            else:
                self._whole.is_row = torch.zeros_like(ids, dtype=torch.bool)
        return self._embed(ids, rows, is_multimodal=is_multimodal)

    def _run(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._short is not None and self._short[3] is not None:
            own = self._whole.behind + self._steps - 1 if self._steps else self._short[3]
            positions = own.to(positions).expand_as(positions).contiguous()
        elif self._short is None and self._steps == 0:
            self._whole.positions = positions.clone()
        elif self._short is None and self._steps == 1:
            self._whole.behind = positions.clone()
        self._steps += 1
        return self._forward(input_ids, positions, *args, **kwargs)
