"""Choosing: from q and k of the first cross-attention layer to what each prompt keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import keeps_all
from tokenprune.errors import PromptError
from tokenprune.selection import Selection
from tokenprune.trimming import QueryReduction, head_scores, union_of_heads
from tokenprune_hf.mllama.choice import query_key, seen_tokens


@dataclass(frozen=True)
class Rule:
    """How one prompt's tokens are chosen; see `tokenprune_hf.mllama.trimmed.TrimmedAttention`."""

    keep: int | float
    queries: QueryReduction

    def select(
        self, scale: float, query: Tensor, key: Tensor, seen: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what one prompt keeps, LongTensor [K], and float32 scores [N].

        Parameters
        ----------
        scale
            Factor on q kᵀ.
        query, key
            [S, H, d] and [N, G, d].
        seen
            BoolTensor [S, N]; nothing is seen from padding.
        counted
            BoolTensor [N], which tokens may be chosen.
        """
        everything = torch.arange(len(key), device=key.device)
        if not bool(counted.any()):
            return everything, torch.zeros(len(key), device=key.device)
        # Rows without anything to see have no softmax, so they are no queries.
        asks = seen.any(dim=1)
        scores = head_scores(
            query[asks].transpose(0, 1), key.transpose(0, 1), scale, seen[asks], self.queries
        )
        kept, best = union_of_heads(scores, self.keep, counted)
        # 1.0 keeps padding too: then nothing has to be gathered, and outputs are the plain model's.
        return (everything if keeps_all(self.keep) else kept), best


def choose(
    rule: Rule,
    layer: Any,
    arguments: Mapping[str, Any],
    attended: Tensor | None,
    real_tiles: Tensor | None,
    sizes: tuple[int, int],
    prompts: int | None,
) -> list[Selection]:
    """Return one selection a prompt.

    Parameters
    ----------
    rule
        How.
    layer
        The first cross-attention layer.
    arguments
        What it is called with, by name.
    attended
        BoolTensor [B, S], False for padding, or None for no padding.
    real_tiles
        BoolTensor [B, images, tiles], False for padding tiles, or None if that is not known.
    sizes
        Tiles of an image, and tokens of a tile.
    prompts
        How many prompts the `generate` that is running reads; None where none is.

    Raises
    ------
    PromptError
        If the vision tokens are no whole images, or the tiles are not those of the call.
    """
    text, vision = arguments["hidden_states"], arguments["cross_attention_states"]
    rows, (per_image, per_tile) = len(text), sizes
    # Their shape is [tiles of the batch, tokens of a tile, C]: N is told by how many there are.
    total, rest = divmod(vision.numel(), rows * vision.shape[-1])
    images, part_of_image = divmod(total, per_image * per_tile)
    if rest or part_of_image:
        raise PromptError(
            f"cross_attention_states {list(vision.shape)} of {rows} prompts are no whole "
            f"number of images of {per_image} tiles with {per_tile} tokens each. Pass "
            "what the vision model and the projector returned, or pixel_values."
        )
    # Rows that `generate` repeats for beams belong to one prompt, and get one choice: the first of
    # them makes it.
    if prompts is None or rows % prompts:
        prompts = rows
    repeats = rows // prompts
    seen = seen_tokens(arguments, attended, total)[::repeats]
    counted = seen.any(dim=1)
    if real_tiles is not None:
        tiles = real_tiles[::repeats].flatten(1).to(counted.device)
        if tiles.shape != (prompts, images * per_image):
            raise PromptError(
                f"aspect_ratio_mask {list(real_tiles.shape)} does not fit {rows} prompts with "
                f"{images * per_image} tiles. Pass it as the processor returned it."
            )
        counted = counted & tiles.repeat_interleave(per_tile, dim=1)
    query, key = query_key(layer, text[::repeats], vision.reshape(rows, total, -1)[::repeats])
    seen, counted = seen.to(key.device), counted.to(key.device)
    grid, scale = (images, per_image, per_tile), float(layer.cross_attn.scaling)
    selections = []
    for prompt in zip(query, key, seen, counted, strict=True):
        kept, scores = rule.select(scale, *prompt)
        # Images, tiles, patches of a tile: places in lists, and not in a picture.
        selections.append(Selection(kept, total, grid, scores, is_picture=False))
    return selections
