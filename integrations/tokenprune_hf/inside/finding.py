"""Finding out where the items of a call's prompts stand, and the text behind each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.question.prompt import no_text_behind
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.inside.items import Placed, PlacedItem
from tokenprune_hf.prompt import ShortPrompt, pads_right
from tokenprune_hf.shortening import attention_mask_of
from tokenprune_hf.vision import VisionModel, items_in_prompt


def placed(
    vision: VisionModel,
    on_host: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
) -> Placed:
    """Return the items of a call, of whose prompts everything is read at first.

    Parameters
    ----------
    vision
        The model's.
    on_host
        The call's arguments on the CPU, by name, with input_ids [B, L].
    encoded
        What its images and videos were encoded to.
    placeholders
        See `tokenprune_hf.shortening.find_placeholders`.

    Raises
    ------
    PromptError
        If no text comes behind an item.
    """
    mask = attention_mask_of(vision, on_host).bool()
    right = pads_right(mask.long())
    lengths = mask.sum(dim=1)
    # The columns as the model reads them: padding was laid anew, and on the host as on the device.
    read = ShortPrompt.of(mask, int(lengths.amax()), right)
    column = torch.zeros(mask.shape, dtype=torch.int64).scatter(
        1, read.columns, torch.arange(read.length).expand(len(mask), -1)
    )
    visual = torch.zeros_like(mask)
    for places in placeholders.values():
        visual[places[:, 0], places[:, 1]] = True
    items = []
    for modality, index in items_in_prompt(encoded.modalities, placeholders):
        item = encoded.modalities[modality].items[index]
        own = placeholders[modality][item.rows]
        prompt = int(own[0, 0])
        text = (mask[prompt] & ~visual[prompt]).nonzero()[:, 0]
        text = text[text > int(own[-1, 1])]
        if not len(text):
            raise no_text_behind(item.tokens.label)
        of_prompt = column[prompt]
        items.append(PlacedItem(prompt, of_prompt[own[:, 1]], of_prompt[text], item.tokens))
    layers: set[int] = set()
    for media in encoded.modalities.values():
        layers.update(media.container.layers or range(len(media.deepstack)))
    return Placed(tuple(items), tuple(lengths.tolist()), right, tuple(sorted(layers)))
