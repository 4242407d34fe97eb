"""Reading an image or video together with its question, by a language model's own first layers.

`PromptReader` builds the prompt of each set of tokens out of the caller's prompt; an engine's
`FirstLayers` runs the layers on it as they are, up to the reference layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenprune.question.attention import QueryKeys
from tokenprune.question.prompt import ItemPrompt, SetPrompt, positions_on_axes
from tokenprune.transfer import to_device


@dataclass(frozen=True, eq=False)
class SetPrompts:
    """S prompts of one length, embedded, with the encoder's rows in their places.

    Attributes
    ----------
    states
        [S, L, D].
    is_visual
        BoolTensor [S, L], where the rows are; V of them in all.
    visual
        The same for each prompt: LongTensors, columns.
    positions
        LongTensor [S, L], or [3, S, L] for models with M-RoPE; with gaps where tokens of a set are
        not read.
    deeper
        [V, D] each, what is added to the rows behind the first layers (DeepStack).
    asked
        For each prompt LongTensor [n], the columns of the tokens asked about.
    questions
        Q; the last Q tokens of each prompt are the question.
    gaps
        Whether positions have gaps.
    """

    states: Tensor
    is_visual: Tensor
    visual: Sequence[Tensor]
    positions: Tensor
    deeper: Sequence[Tensor]
    asked: Sequence[Tensor]
    questions: int
    gaps: bool = False


class FirstLayers(Protocol):
    """A language model whose first layers can be run on prompts; one for each engine."""

    def reference_layer(self, asked: int | None) -> int:
        """Return the layer to read, from 0; see `tokenprune.families.registry.reference_layer`."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return [S, L, D] of ids [S, L], on the model's device."""

    def run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        """Run the layers up to the last one asked for; of each prompt return layer -> q and k.

        Parameters
        ----------
        prompts
            What is read.
        layers
            Which layers, from 0.
        values, hidden
            Whether `QueryKeys.value_norm` and `QueryKeys.hidden` are wanted.
        """


@dataclass(frozen=True, eq=False)
class PromptReader:
    """A `tokenprune.question.attention.QueryReader` of one item in one prompt.

    Attributes
    ----------
    layers
        What reads.
    prompt
        The item's part in the prompt.
    rows
        [M, D], what `SetPrompt.sources` stands for: the item's rows, then loose ones.
    deeper
        [M, D] each, the same rows' features for deeper layers.
    grid
        Of the item.
    interval
        See `tokenprune.question.prompt.positions_on_axes`; None for models with ordinary RoPE.
    finite
        Whether numbers that are not finite count as 0.
    """

    layers: FirstLayers
    prompt: ItemPrompt
    rows: Tensor
    deeper: Sequence[Tensor]
    grid: tuple[int, int, int]
    interval: int | None
    finite: bool = False

    def made_finite(self) -> PromptReader:
        """Return a reader in which nothing is NaN or infinite."""
        return replace(
            self,
            rows=_finite(self.rows),
            deeper=[_finite(rows) for rows in self.deeper],
            finite=True,
        )

    def read(
        self,
        sets: Sequence[Tensor],
        layer: int | None,
        *,
        values: bool,
        hidden: bool,
        among: Sequence[Tensor] | None = None,
    ) -> list[QueryKeys]:
        """Return q and k of the reference layer for each set; see the protocol."""
        number = self.layers.reference_layer(layer)
        return [seen[number] for seen in self.read_layers(sets, [number], values, hidden, among)]

    def read_layers(
        self,
        sets: Sequence[Tensor],
        layers: Sequence[int],
        values: bool,
        hidden: bool,
        among: Sequence[Tensor] | None = None,
    ) -> list[dict[int, QueryKeys]]:
        """Return q and k of several layers, by layer, for each set.

        Parameters
        ----------
        sets
            As in `read`.
        layers
            Layers of the language model, from 0.
        values, hidden, among
            As in `read`.
        """
        read_of_sets: Sequence[Tensor | None] = [None] * len(sets) if among is None else among
        prompts = [
            self.prompt.of_set(tokens, read)
            for tokens, read in zip(sets, read_of_sets, strict=True)
        ]
        found: dict[int, dict[int, QueryKeys]] = {}
        for length in sorted({len(prompt.ids) for prompt in prompts}):
            # Prompts of one length go through the layers together; no padding, so no mask.
            same = [index for index, prompt in enumerate(prompts) if len(prompt.ids) == length]
            embedded = self._embedded([prompts[index] for index in same])
            seen = self.layers.run(embedded, layers, values, hidden)
            found.update(zip(same, seen, strict=True))
        ordered = [found[index] for index in range(len(prompts))]
        if not self.finite:
            return ordered
        return [{layer: _all_finite(keys) for layer, keys in one.items()} for one in ordered]

    def _embedded(self, prompts: Sequence[SetPrompt]) -> SetPrompts:
        # The prompts are on the host: places and positions are worked out there.
        is_visual = torch.stack([prompt.is_visual for prompt in prompts])
        # Placeholders' ids may lie beyond the vocabulary; what they embed to is written over.
        ids = torch.stack([prompt.ids for prompt in prompts]).masked_fill(is_visual, 0)
        states = self.layers.embed(ids).clone(memory_format=torch.contiguous_format)
        sources = to_device(torch.cat([prompt.sources for prompt in prompts]), self.rows.device)
        columns = to_device(torch.cat([prompt.visual for prompt in prompts]), states.device)
        visual = list(columns.split([len(prompt.visual) for prompt in prompts]))
        in_all = to_device(is_visual.flatten().nonzero()[:, 0], states.device)
        states.view(-1, states.shape[-1])[in_all] = self.rows[sources].to(states)
        asked = to_device(torch.cat([prompt.asked for prompt in prompts]), states.device)
        return SetPrompts(
            states,
            to_device(is_visual, states.device),
            visual,
            to_device(self._positions(prompts), states.device),
            [rows[sources].to(states) for rows in self.deeper],
            list(asked.split([len(prompt.asked) for prompt in prompts])),
            prompts[0].questions,
            any(prompt.whole is not None for prompt in prompts),
        )

    def _positions(self, prompts: Sequence[SetPrompt]) -> Tensor:
        """Return fresh positions of prompts [S, L], as if each set was a whole video."""
        return torch.stack([self._positions_of(prompt) for prompt in prompts], dim=-2)

    def _positions_of(self, prompt: SetPrompt) -> Tensor:
        """Return LongTensor [L] or [3, L]."""
        if prompt.whole is not None:
            return self._positions_of(prompt.whole)[..., prompt.columns]
        if self.interval is None:
            return torch.arange(len(prompt.ids), device=prompt.ids.device)
        return positions_on_axes(prompt.is_visual, self.grid, self.interval)


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


def _all_finite(seen: QueryKeys) -> QueryKeys:
    finite: dict[str, Any] = {
        name: _finite(value)
        for name in ("query", "key", "value_norm", "hidden")
        if (value := getattr(seen, name)) is not None
    }
    return replace(seen, **finite)
