"""Positions of pruned prompts on models with M-RoPE, where transformers counts as no one else does.

The papers of Qwen2-VL and Qwen2.5-VL, their first code and vLLM put the next token one behind the
highest position of an item, whichever axis has it. transformers puts it behind the rows and the
columns alone: in a video with more temporal positions than rows and columns, the text then stands
beside the frames in place of behind all of them. And where a frame's time falls on a whole
position, transformers multiplies in float32 and vLLM in float64, which can be one apart.

So that a pruned prompt has the same answer in both engines, it is counted here as vLLM counts. A
prompt that loses no token is left to the engine, so that its answer is the plain model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune_hf.encoding import Encoded
from tokenprune_hf.vision import VisionModel


def count_as_published(
    vision: VisionModel,
    arguments: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    positions: Tensor,
    mask: Tensor,
    samples: Tensor,
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
        See `tokenprune_hf.shortened.find_placeholders`.
    positions
        LongTensor [3 or 4, B, L] of the unpruned prompts; the last three rows are time, row and
        column.
    mask
        [B, L], 0 where there is padding.
    samples
        BoolTensor [B], which prompts.

    Returns
    -------
    Tensor
        LongTensor [3 or 4, B, L].
    """
    result = positions.clone()
    kinds = torch.zeros_like(mask, dtype=torch.long)
    for kind, places in enumerate(placeholders.values(), start=1):
        kinds[places[:, 0], places[:, 1]] = kind
    times = _times(vision, arguments, encoded, placeholders)
    for sample in samples.nonzero()[:, 0].tolist():
        for columns, offsets in times.get(sample, ()):
            result[-3, sample, columns] = result[-3, sample, columns[0]] + offsets
        real = mask[sample].bool()
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
        own = places[item.rows.to(places.device)]
        frames, rows, columns = item.tokens.grid
        interval = float(step) * vision.frame_interval("video")
        offsets = (torch.arange(frames, device=own.device).double() * interval).long()
        in_order = offsets.repeat_interleave(rows * columns)
        result.setdefault(int(own[0, 0]), []).append((own[:, 1], in_order))
    return result
