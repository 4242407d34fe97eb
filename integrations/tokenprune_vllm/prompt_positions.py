"""Positions of a pruned prompt, worked out from the engine's own positions of the unpruned one.

They count on three axes where the model does (M-RoPE). On other models, vLLM asks for them all the
same, since the exported config names `mrope_section`, and all three axes count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from tokenprune_vllm.processor import REGION, TICKET, Ticket
from tokenprune_vllm.regions import Region

_TEXT = 0
"""A token id that marks no image, no video and no sound."""

EnginePositions = Callable[[list[int], list[Any]], tuple[Tensor, int]]
"""Token ids and vLLM's features -> positions [3, L], and how far the next token is from L."""


def item_positions(
    engine_positions: EnginePositions,
    ticket: Ticket,
    fields: Mapping[str, Any],
    behind: bool = False,
) -> Tensor:
    """Return positions [3, L] of an item's unpruned region, from those of its `anchor`.

    Parameters
    ----------
    engine_positions
        The engine's own way to count.
    ticket
        Of the item.
    fields
        What the processor made of it.
    behind
        Whether those of a token of text behind it are wanted, too.
    """
    known = {
        name: MultiModalFieldElem(data=value, field=MultiModalBatchedField(keep_on_cpu=True))
        for name, value in fields.items()
    }
    region = ticket.region
    feature = MultiModalFeatureSpec(
        data=MultiModalKwargsItem(known),
        modality=ticket.modality,
        identifier="",
        # Some models find each frame of a video by where its rows are.
        mm_position=PlaceholderRange(0, region.length, region.is_row),
    )
    # A token of text behind it: Qwen3-Omni counts the mark of an item's end together with it.
    positions, _ = engine_positions([*region.token_ids.tolist(), _TEXT], [feature])
    positions = positions[:, : region.length + behind]
    first = anchor(region, ticket.text_moves)
    return positions - positions[:, first : first + 1]


def anchor(region: Region, text_moves: bool) -> int:
    """Return the column of a region from whose positions those of its rows are counted.

    The first row's: MiniCPM-V 4.7 puts the mark in front of an image beside the image, but not at
    the beginning of a prompt, where no place is left. Where the text inside travels with the rows,
    the region's first.
    """
    return 0 if text_moves else int(region.is_row.nonzero()[0])


def prompt_positions(
    engine_positions: EnginePositions, tokens: Sequence[int], features: Sequence[Any]
) -> tuple[Tensor, int]:
    """Return positions [3, L] of a pruned prompt and the distance of the next one from L.

    The unpruned prompt is put together again from the items' regions and counted by the engine.
    Of its positions those of the dropped tokens are left out. Kept tokens are all put where their
    item's `anchor` is: the rest of the way comes with the rows, once they have been chosen.

    Parameters
    ----------
    engine_positions
        The engine's own way to count.
    tokens
        Ids of the pruned prompt.
    features
        vLLM's description of its images and videos.
    """
    unpruned: list[int] = []
    unpruned_features: list[Any] = []
    places: list[tuple[PlaceholderRange, Region, int]] = []
    end = 0
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        ticket = Ticket.unpack(*_fields(feature))
        region, place = ticket.region, feature.mm_position
        unpruned += tokens[end : place.offset]
        if ticket.visual:
            places.append((place, region, len(unpruned)))
        moved = PlaceholderRange(len(unpruned), region.length, region.is_row)
        unpruned_features.append(replace(feature, mm_position=moved))
        unpruned += region.token_ids.tolist()
        end = place.offset + place.length
    unpruned += tokens[end:]
    positions, delta = engine_positions(unpruned, unpruned_features)
    parts: list[Tensor] = []
    end = 0
    for place, region, start in places:
        parts += [positions[:, end:start], _of_region(positions, place, region, start)]
        end = start + region.length
    parts.append(positions[:, end:])
    return torch.cat(parts, dim=1).contiguous(), len(unpruned) + delta - len(tokens)


def loses_nothing(features: Sequence[Any]) -> bool:
    """Say whether every token of a prompt's images and videos stands in it."""
    return all(
        feature.mm_position.length == Ticket.unpack(*_fields(feature)).region.length
        for feature in features
    )


def _fields(feature: Any) -> tuple[Tensor, Tensor]:
    return feature.data[TICKET].data, feature.data[REGION].data


def _of_region(positions: Tensor, place: PlaceholderRange, region: Region, start: int) -> Tensor:
    """Return positions [3, L'] of a pruned region; its text keeps its own, rows get one for all."""
    first = start + anchor(region, place.is_embed is None)
    found = positions[:, first : first + 1].repeat(1, place.length)
    if place.is_embed is not None:
        whole = positions[:, start : start + region.length]
        found[:, ~place.is_embed] = whole[:, ~region.is_row]
    return found
