"""Positions of pruned prompts: `original` as in the full prompt, `compact` counted anew.

They are the engine's own, except on models with M-RoPE, where transformers counts as no one else
does, but for MiniCPM-V 4.7. The papers of Qwen2-VL and Qwen2.5-VL, their first code and vLLM put
the next token one behind the highest position of an item, whichever axis has it. transformers puts
it behind the rows and the columns alone: in a video with more temporal positions than rows and
columns, the text then stands beside the frames in place of behind all of them. And where a frame's
time falls on a whole position, transformers multiplies in float32 and vLLM in float64, which can be
one apart.

So that a pruned prompt has the same answer in both engines, it is counted here as vLLM counts. A
prompt that loses no token is left to the engine, so that its answer is the plain model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune_hf.encoding import Encoded
from tokenprune_hf.engine import CACHE_NAMES
from tokenprune_hf.prompt import ShortPrompt
from tokenprune_hf.vision import VisionModel

_NOT_FOR_POSITIONS = frozenset({"input_ids", "attention_mask", "position_ids", *CACHE_NAMES})
"""Arguments of a call that are given apart, or say where an earlier call stopped."""


def full_positions(
    vision: VisionModel,
    arguments: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    mask: Tensor,
    pruned: Sequence[bool],
) -> Tensor:
    """Return the positions of the unpruned prompts as the engine counts, or as was published.

    They are counted on the CPU, where the engine looks at every run of tokens: on a device each
    look would be a wait.

    Parameters
    ----------
    vision
        The model's.
    arguments
        The call's, by name, with input_ids [B, L]; what is read of them on the CPU.
    encoded
        What the encoder returned.
    placeholders
        See `tokenprune_hf.shortening.find_placeholders`.
    mask
        [B, L], 0 where there is padding.
    pruned
        For each prompt, whether it loses a token.

    Returns
    -------
    Tensor
        LongTensor [B, L], or [3 or 4, B, L] on models with M-RoPE.
    """
    input_ids: Tensor = arguments["input_ids"]
    # Models with M-RoPE read sizes of images, token types and whatever else tells where tokens are.
    known = {
        name: value
        for name, value in arguments.items()
        if value is not None and name not in _NOT_FOR_POSITIONS
    }
    # Working out positions leaves `rope_deltas` on the inner model, by which calls of other
    # threads, and plain calls after the block, would count. Copies of the two outer modules take
    # that note in their place; all that they hold is the model's own.
    outer = copy.copy(vision.model)
    outer._modules = dict(outer._modules)
    if "model" in outer._modules:
        outer._modules["model"] = copy.copy(outer._modules["model"])
    positions: Tensor = outer._prepare_position_ids_for_generation(
        input_ids, {"input_ids": input_ids, "attention_mask": mask, **known}
    )
    if not vision.mrope or not vision.family.text_behind_items:
        return positions
    return count_as_published(vision, arguments, encoded, placeholders, positions, mask, pruned)


def given_positions(arguments: Mapping[str, Any]) -> Tensor:
    """Return the positions that the caller gave, LongTensor [..., B, L]."""
    given: Tensor = arguments["position_ids"]
    return given.expand(*given.shape[:-2], *arguments["input_ids"].shape)


def original_positions(
    full: Tensor,
    prompt: ShortPrompt,
    mask: Tensor,
    short_mask: Tensor,
    *,
    published: bool,
    masks_axis: bool,
) -> tuple[Tensor, Tensor]:
    """Return the positions of the full prompt at what is left of it.

    Parameters
    ----------
    full
        What `full_positions` returned.
    prompt
        How [B, L] became [B, S].
    mask
        [B, L], 0 where there is padding.
    short_mask
        [B, S], 0 where there is padding or a hidden token.
    published
        Whether they were counted as the papers of M-RoPE count, and are not the caller's.
    masks_axis
        Whether the first axis turns no head; see `VisionModel.has_masks_axis`.

    Returns
    -------
    tuple of Tensor
        LongTensor [..., B, S], and [..., B]: the position of the first token after the prompt.
    """
    short = prompt.take(full, 0)
    # Padding may stand on the right: the last real token is the one counted furthest.
    last = mask.long().cumsum(dim=-1).argmax(dim=-1)
    columns = last[:, None].expand(*full.shape[:-1], 1)
    following = full.gather(-1, columns)[..., 0] + 1
    if published:
        # Behind everything, on every axis, as both engines go on from a cache.
        highest = full.masked_fill(mask == 0, -1)[-3:].amax(dim=(0, -1))
        following[-3:] = highest + 1
    if masks_axis:
        # The first axis is read by the engine's masks alone, which take gaps in it for the borders
        # of packed prompts. So it counts the short prompt, whatever the other axes say.
        counted = _counted(short_mask)
        short[0] = counted
        following[0] = counted.amax(dim=-1) + 1
    return short, following


def compact_positions(full: Tensor, short_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions without gaps, alike on every axis; see `original_positions`."""
    counted = _counted(short_mask)
    axes = full.shape[:-2]
    short = counted.expand(*axes, *counted.shape).clone()
    return short, (counted.amax(dim=-1) + 1).expand(*axes, len(counted)).clone()


def _counted(mask: Tensor) -> Tensor:
    """Return LongTensor [B, S], the number of each token among those that the mask shows."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def count_as_published(
    vision: VisionModel,
    arguments: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    positions: Tensor,
    mask: Tensor,
    samples: Sequence[bool],
) -> Tensor:
    """Return the engine's positions with those of some prompts counted as the papers count.

    Parameters
    ----------
    vision
        The model's; one with M-RoPE.
    arguments
        The call's, by name.
    encoded
        What the encoder returned.
    placeholders
        See `tokenprune_hf.shortening.find_placeholders`.
    positions
        LongTensor [3 or 4, B, L] of the unpruned prompts; the last three rows are time, row and
        column.
    mask
        [B, L], 0 where there is padding.
    samples
        For each prompt, whether it is counted so.

    Returns
    -------
    Tensor
        LongTensor [3 or 4, B, L].
    """
    # 0 is text. An image and a video that touch are two items, so kinds have different numbers.
    result = positions.clone()
    kinds = torch.zeros_like(mask, dtype=torch.long)
    for kind, places in enumerate(placeholders.values(), start=1):
        kinds[places[:, 0], places[:, 1]] = kind
    times = _times(vision, arguments, encoded, placeholders)
    for sample in (number for number, is_pruned in enumerate(samples) if is_pruned):
        for columns, offsets in times.get(sample, ()):
            result[-3, sample, columns] = result[-3, sample, columns[0]] + offsets
        real = mask[sample].nonzero()[:, 0]
        result[-3:, sample, real] = move_text_behind_items(
            result[-3:, sample, real], kinds[sample, real]
        )
    return result


def move_text_behind_items(positions: Tensor, kinds: Tensor) -> Tensor:
    """Return positions in which whatever follows an item begins behind all of its positions.

    Positions that are counted so already come back as they are.

    Parameters
    ----------
    positions
        LongTensor [3, L] of one prompt without padding: time, row, column.
    kinds
        LongTensor [L], 0 for text and another number for each kind of item. Columns of one number
        that follow each other make one item.

    Returns
    -------
    Tensor
        LongTensor [3, L].

    Notes
    -----
    Qwen2-VL (arXiv 2409.12191), section 2.1: the numbers of each modality begin one above the
    highest position of what comes before it.
    """
    runs, of_column, lengths = torch.unique_consecutive(
        kinds, return_inverse=True, return_counts=True
    )
    highest = torch.zeros_like(runs).scatter_reduce(
        0, of_column, positions.amax(dim=0), "amax", include_self=False
    )
    # Rows are counted from where an item begins, so its first token is there on that axis.
    begin = positions[1, lengths.cumsum(0) - lengths]
    missing = torch.zeros_like(runs)
    missing[1:] = (highest[:-1] + 1 - begin[1:]).where(runs[:-1] > 0, 0)
    return positions + missing.cumsum(0)[of_column]


def _times(
    vision: VisionModel,
    arguments: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Return, per prompt, the columns of each video and the temporal offset of each, in float64."""
    seconds = arguments.get("second_per_grid_ts")
    if seconds is None or "video" not in encoded.modalities:
        return {}
    places = placeholders["video"]
    result: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for item, step in zip(encoded.modalities["video"].items, seconds, strict=False):
        of_item = places[item.rows]
        frames, rows, columns = item.tokens.grid
        interval = float(step) * vision.frame_interval("video")
        # In float64, as vLLM does: in float32 a time on a whole position may fall below it.
        per_frame = (torch.arange(frames, device=places.device).double() * interval).long()
        offsets = per_frame.repeat_interleave(rows * columns)
        result.setdefault(int(of_item[0, 0]), []).append((of_item[:, 1], offsets))
    return result
