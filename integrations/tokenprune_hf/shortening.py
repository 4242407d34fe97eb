"""From a call's prompts and selections to `Shortened`: which columns stay, and their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.config import Positions
from tokenprune.errors import PromptError
from tokenprune.selection import Selection
from tokenprune_hf.encoding import Encoded, KeptRows
from tokenprune_hf.positions import compact_positions, full_positions, original_positions
from tokenprune_hf.prompt import FILL, ShortPrompt, check_attention_mask
from tokenprune_hf.shortened import Application, Shortened
from tokenprune_hf.vision import VisionModel


def find_placeholders(
    vision: VisionModel, input_ids: Tensor, encoded: Encoded
) -> dict[str, Tensor]:
    """Return, per modality, where each row of the encoder belongs in the prompts.

    Parameters
    ----------
    vision
        Knows the placeholders' ids.
    input_ids
        LongTensor [B, L].
    encoded
        What the encoder returned.

    Returns
    -------
    dict
        LongTensor [R, 2]: prompt and column of each row, in the order of rows.

    Raises
    ------
    PromptError
        If there are not as many placeholders as rows, or images cannot be told from videos.
    """
    family = vision.family
    if family.videos_as_images and not family.videos_marked and len(encoded.modalities) > 1:
        raise PromptError(
            f"{type(vision.model).__name__} has the same placeholder for images and videos, and "
            "takes no call with both of them in transformers. Pass images and videos in calls of "
            "their own, or serve the model with vLLM, which takes both."
        )
    placeholders = {}
    for modality, media in encoded.modalities.items():
        is_row = input_ids == vision.token_id(modality)
        if family.videos_marked:
            is_row &= _in_videos(vision, input_ids) == (modality == "video")
        places = is_row.nonzero()
        if len(places) != len(media.rows):
            raise PromptError(
                f"the prompt holds {len(places)} {modality} placeholders and its {modality}s make "
                f"{len(media.rows)} tokens. Pass input_ids and pixel values of one and the same "
                "processor call, neither truncated."
            )
        placeholders[modality] = places
    return placeholders


def _in_videos(vision: VisionModel, input_ids: Tensor) -> Tensor:
    """Return BoolTensor [B, L], where a video's mark in front stands before and that behind not."""
    config = vision.model.config
    starts = (input_ids == int(config.video_start_token_id)).cumsum(dim=-1)
    return starts > (input_ids == int(config.video_end_token_id)).cumsum(dim=-1)


def attention_mask_of(vision: VisionModel, arguments: Mapping[str, Any]) -> Tensor:
    """Return a call's attention mask [B, L], all ones where none is needed.

    Raises
    ------
    PromptError
        If it is missing where it is needed, or does not fit.
    """
    model = vision.model
    pad = _pad_token(model)
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    # Where padding also ends sequences, such a token in the prompt may be a turn's end.
    only_padding = None if pad in ends else pad
    given = arguments.get("attention_mask")
    return check_attention_mask(arguments["input_ids"], given, only_padding)


def shorten_prompt(
    vision: VisionModel,
    arguments: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    selections: Mapping[str, list[Selection]],
    positions: Positions,
    application: Application = "drop",
) -> Shortened:
    """Drop, or hide, the placeholders of every token that was not selected.

    Parameters
    ----------
    vision
        The model's.
    arguments
        The call's, by name, with input_ids [B, L].
    encoded
        What the encoder returned.
    placeholders
        See `find_placeholders`.
    selections
        Per modality, one for each of `encoded`'s items.
    positions
        ``"original"`` or ``"compact"``.
    application
        ``"drop"``, or ``"mask"``: every token stays in the prompt, and the attention mask is 0
        where one was not selected.

    Raises
    ------
    PromptError
        See `attention_mask_of`.
    """
    # All over the full prompt [B, L]: what was selected, what is no text, what each token counts.
    input_ids: Tensor = arguments["input_ids"]
    mask = attention_mask_of(vision, arguments)
    selected = torch.ones_like(input_ids, dtype=torch.bool)  # text always is
    visual = torch.zeros_like(selected)
    counts = torch.ones_like(input_ids)
    kept, rows_per_sample = {}, {}
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        visual[places[:, 0], places[:, 1]] = True
        of_modality = KeptRows.of(media, selections[modality])
        dropped = places[~of_modality.staying.to(places.device)]
        selected[dropped[:, 0], dropped[:, 1]] = False
        for item, selection in zip(media.items, selections[modality], strict=True):
            if selection.represented is not None:
                stay = places[item.rows[selection.kept].to(places.device)]
                counts[stay[:, 0], stay[:, 1]] = selection.represented.to(counts)
        hides = application == "mask"  # then the model is handed every row
        kept[modality] = KeptRows.all_of(media) if hides else of_modality
        rows_per_sample[modality] = torch.bincount(places[:, 0], minlength=len(input_ids)).tolist()

    prompt = ShortPrompt.of(selected if application == "drop" else torch.ones_like(selected), mask)
    values = {**arguments, "attention_mask": mask * selected.to(mask)}
    fills = {**FILL, "input_ids": _pad_token(vision.model) or 0}
    short = {
        name: prompt.take(values[name], fill)
        for name, fill in fills.items()
        if isinstance(values.get(name), Tensor)
    }
    pruned = (~selected).any(dim=-1)
    full = full_positions(vision, arguments, encoded, placeholders, mask, pruned)
    short_mask = short["attention_mask"]
    if positions == "original":
        published = vision.mrope and arguments.get("position_ids") is None
        numbered = original_positions(
            full,
            prompt,
            mask,
            short_mask,
            published=published,
            masks_axis=vision.has_masks_axis(full),
        )
    else:
        numbered = compact_positions(full, short_mask)
    short["position_ids"], following = numbered
    return Shortened(
        input_ids,
        prompt,
        short,
        kept,
        rows_per_sample,
        following,
        logs=prompt.take(counts, 1).float().log(),
        visual=prompt.take(visual.long(), 0).bool(),
    )


def _pad_token(model: Any) -> int | None:
    pad: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad
