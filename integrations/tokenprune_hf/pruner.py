"""Pruner: what is asked for of a call's images and videos, up to the tokens that stay.

It encodes what a call brings and chooses tokens of it; `tokenprune_hf.shortening` then leaves the
others out of the prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.config import Positions
from tokenprune.errors import PromptError
from tokenprune.representation import tokens_represented
from tokenprune.scope import Joined, Scope
from tokenprune.selecting import check_known, select_unchecked
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.transfer import to_device
from tokenprune_hf.caches import cache_length
from tokenprune_hf.crops import join_crops
from tokenprune_hf.encoder_inputs import arguments_on_host
from tokenprune_hf.encoding import Encoded, encode_media, merged
from tokenprune_hf.engine import cache_of
from tokenprune_hf.reading import placed_items
from tokenprune_hf.shortened import Application, Shortened
from tokenprune_hf.shortening import shorten_prompt
from tokenprune_hf.vision import ENCODED, EncodedModality, Item, VisionModel, items_in_prompt


@dataclass(frozen=True)
class Chosen:
    """What was chosen in one call.

    Attributes
    ----------
    selections
        Of every item, in prompt order.
    seconds
        How long that took; on a GPU, until the device was told.
    by_modality
        The same selections in the order of the encoder's items, per modality.
    unchecked
        What is left to do to check them; see `checked`.
    joined
        Of each selection, the crops that it is of together, or None; empty where none is.
    """

    selections: list[Selection]
    seconds: float
    by_modality: dict[str, list[Selection]]
    unchecked: Callable[[], object] | None = None
    joined: Sequence[Joined | None] = ()

    def checked(self) -> Chosen:
        """Return the same, once it is known that it may be used.

        Raises
        ------
        TokensError, SelectorError
            As `tokenprune.select_many`.
        """
        if self.unchecked is not None:
            self.unchecked()
        if not any(self.joined):
            return dataclasses.replace(self, unchecked=None)
        # Of each crop, now that the host waits anyway.
        split = [
            [selection] if joined is None else joined.split(selection)
            for selection, joined in zip(self.selections, self.joined, strict=True)
        ]
        every = [one for of_item in split for one in of_item]
        return dataclasses.replace(self, selections=every, unchecked=None, joined=())


NOTHING = Chosen([], 0.0, {})
"""What a call without images and videos chooses."""


@dataclass(frozen=True)
class Pruner:
    """Encodes and chooses for one model.

    Attributes
    ----------
    vision
        The model's.
    selector, budget, positions, application, scope
        See `tokenprune_hf.prune`.
    proportional
        Whether selections have to say how many tokens each kept one stands for.
    """

    vision: VisionModel
    selector: Selector
    budget: Budget
    positions: Positions
    application: Application
    proportional: bool
    scope: Scope = "item"

    def encoded(
        self, arguments: dict[str, Any], known_cache: bool
    ) -> tuple[Encoded, dict[str, Any]] | None:
        """Encode a call's images and videos; None where it brings none.

        Parameters
        ----------
        arguments
            The call's, by name; ``encoded`` is taken out of them.
        known_cache
            Whether it goes on from a cache that is known to hold a pruned prompt.

        Returns
        -------
        tuple or None
            What was encoded, and the call's arguments on the CPU; see
            `tokenprune_hf.encoder_inputs.arguments_on_host`.

        Raises
        ------
        PromptError
            If the call cannot be pruned.
        """
        encoded: Encoded | None = arguments.pop("encoded", None)
        if arguments.get("mm_encoder_outputs"):
            raise PromptError(
                "mm_encoder_outputs cannot be pruned: they no longer hold what selectors look at. "
                "Pass the processor's pixel values, or encoded=tokenprune_hf.encode(...)."
            )
        filled = cache_length(cache_of(arguments)) > 0
        if encoded is None and not self.vision.encoder_inputs(arguments):
            if filled and not known_cache:
                self._check_no_placeholders(arguments.get("input_ids"))
            return None
        if filled:
            raise PromptError(
                "images or videos cannot be added to a cache that is already filled. Leave out "
                "the pixel values if the cache holds them, or call without a cache."
            )
        if arguments.get("input_ids") is None or arguments.get("inputs_embeds") is not None:
            raise PromptError(
                "pruning finds visual tokens by their id: pass input_ids, and no inputs_embeds, "
                "together with images or videos."
            )
        on_host = arguments_on_host(arguments)
        if encoded is None:
            encoded = encode_media(self.vision, arguments, self.selector.gathers, on_host)
        from_encoder = [name for name in self.selector.gathers if name in ENCODED]
        missing = [name for name in from_encoder if name not in encoded.needs]
        if missing:
            raise PromptError(
                f"encoded was made without {', '.join(missing)}, which method "
                f"{self.selector.name!r} needs. Encode again with needs including them."
            )
        return encoded, on_host

    def _check_no_placeholders(self, input_ids: Tensor | None) -> None:
        """Raise if a prompt that speaks of images goes on from a cache of unknown content."""
        if input_ids is None:
            return
        for modality in ("image", "video"):
            count = int((input_ids == self.vision.token_id(modality)).sum())
            if count:
                raise PromptError(
                    f"the prompt holds {count} {modality} placeholders and comes with a filled "
                    f"cache, and it is not known whether that holds a pruned {modality}. Go on "
                    "from the cache that a call inside a block of tokenprune_hf.prune returned, or "
                    "pass the pixel values without a cache."
                )

    def scoped(
        self, encoded: Encoded, placeholders: Mapping[str, Tensor], crops: Sequence[int] | None
    ) -> Encoded:
        """Return the same with one item for each set that is chosen from; see `join_crops`."""
        if self.scope == "item":
            return encoded
        return join_crops(self.vision, encoded, placeholders.get("image"), crops)

    def choose(
        self,
        on_host: Mapping[str, Any],
        encoded: Encoded,
        placeholders: Mapping[str, Tensor],
        known: Sequence[Selection | None] | None,
        device: torch.device,
    ) -> Chosen:
        """Choose the tokens of every item; what there is to check is left to `Chosen.checked`.

        Parameters
        ----------
        on_host
            The call's arguments, by name, on the CPU.
        encoded
            What its images and videos were encoded to; see `scoped`.
        placeholders
            See `tokenprune_hf.shortening.find_placeholders`.
        known
            A selection for each item in prompt order that was made before, or None where it is to
            be made now; None for no item.
        device
            Where the model takes ids.
        """
        started = time.perf_counter()
        items = placed_items(
            self.vision, on_host, encoded, placeholders, self.selector.needs, device
        )
        in_prompt = items_in_prompt(encoded.modalities, placeholders)
        placed = [encoded.modalities[modality].items[index] for modality, index in in_prompt]
        earlier = [None] * len(in_prompt) if known is None else _of_items(placed, known)
        known_of = dict(zip(in_prompt, earlier, strict=True))
        # Items of one shape go through the selector together, and come back in their order.
        every = [one for tokens in items.values() for one in tokens]
        already = [known_of[name, index] for name in items for index in range(len(items[name]))]
        counts = [
            item.count(self.budget) for name in items for item in encoded.modalities[name].items
        ]
        unchecked = select_unchecked(
            every, self.selector, self.budget, known=already, counts=counts
        )
        chosen = iter(unchecked.selections)
        by_modality = {}
        for modality, tokens in items.items():
            selections = [next(chosen) for _ in tokens]
            if self.proportional:
                selections = _represent(self.vision, encoded.modalities[modality], selections)
            by_modality[modality] = selections
        selections = [by_modality[modality][index] for modality, index in in_prompt]
        seconds = time.perf_counter() - started
        joined = [item.joined for item in placed]
        return Chosen(selections, seconds, by_modality, unchecked.checked, joined)

    def shorten(
        self,
        arguments: Mapping[str, Any],
        on_host: Mapping[str, Any],
        encoded: Encoded,
        placeholders: Mapping[str, Tensor],
        chosen: Chosen,
    ) -> Shortened:
        """Leave out of a call's prompts what was not chosen; see `shorten_prompt`."""
        return shorten_prompt(
            self.vision,
            arguments,
            on_host,
            merged(encoded, chosen.by_modality),
            placeholders,
            chosen.by_modality,
            self.positions,
            self.application,
        )


def _of_items(items: Sequence[Item], known: Sequence[Selection | None]) -> list[Selection | None]:
    """Return a selection of each item that is chosen from, of those of its crops."""
    crops = [[item.tokens] if item.joined is None else item.joined.crops for item in items]
    check_known(known, [crop.total for of_item in crops for crop in of_item])
    left = iter(known)
    found = []
    for item, of_item in zip(items, crops, strict=True):
        own = list(itertools.islice(left, len(of_item)))
        found.append(own[0] if item.joined is None else item.joined.whole(own))
    return found


def _represent(
    vision: VisionModel, media: EncodedModality, selections: Sequence[Selection]
) -> list[Selection]:
    """Return the selections of a modality's items, saying how many tokens each kept one is for."""
    result = []
    for item, selection in zip(media.items, selections, strict=True):
        if selection.represented is None:
            # By what the language model reads, whatever the selector looked at.
            rows = vision.as_read(media.rows[to_device(item.rows, media.rows.device)])
            counts = tokens_represented(rows[None], selection.kept[None])
            selection = dataclasses.replace(selection, represented=counts[0])
        result.append(selection)
    return result
