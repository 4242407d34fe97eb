"""From a call's prompts and selections to `Shortened`: which columns stay, and their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.config import Positions
from tokenprune.errors import PromptError
from tokenprune.selection import Selection
from tokenprune.transfer import to_device
from tokenprune_hf.encoding import Encoded, KeptRows
from tokenprune_hf.positions import (
    compact_positions,
    full_positions,
    given_positions,
    original_positions,
)
from tokenprune_hf.prompt import FILL, ShortPrompt, check_attention_mask, pads_right
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
        LongTensor [B, L] on the CPU.
    encoded
        What the encoder returned.

    Returns
    -------
    dict
        LongTensor [R, 2] on the CPU: prompt and column of each row, in the order of rows.

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
    on_host: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    selections: Mapping[str, list[Selection]],
    positions: Positions,
    application: Application = "drop",
) -> Shortened:
    """Drop, or hide, the placeholders of every token that was not selected.

    Which tokens these are the device knows; how many there are of each prompt the host does, so
    that nothing is waited for.

    Parameters
    ----------
    vision
        The model's.
    arguments
        The call's, by name, with input_ids [B, L].
    on_host
        The same, those that are read on the CPU; see
        `tokenprune_hf.encoder_inputs.arguments_on_host`.
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
    input_ids: Tensor = arguments["input_ids"]
    device = input_ids.device
    told_mask = attention_mask_of(vision, on_host)
    given = arguments.get("attention_mask")
    mask = to_device(told_mask, device) if given is None else given
    # All over the full prompt [B, L]: what was selected, what is no text, what each token counts.
    selected = torch.ones(input_ids.numel(), dtype=torch.bool, device=device)  # text always is
    visual = torch.zeros(input_ids.shape, dtype=torch.bool, device="cpu")
    counts: Tensor | None = None
    kept, rows_per_sample = {}, {}
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        visual[places[:, 0], places[:, 1]] = True
        of_modality = KeptRows.of(media, selections[modality])
        flat = to_device(places[:, 0] * input_ids.shape[1] + places[:, 1], device)
        selected[flat] = of_modality.staying.to(device)
        for item, selection in zip(media.items, selections[modality], strict=True):
            if selection.represented is not None:
                if counts is None:
                    counts = torch.ones(input_ids.numel(), dtype=torch.int64, device=device)
                of_item = to_device(item.rows, selection.kept.device)[selection.kept]
                counts[flat[of_item.to(device)]] = selection.represented.to(counts)
        hides = application == "mask"  # then the model is handed every row
        kept[modality] = KeptRows.all_of(media) if hides else of_modality
        per_prompt = torch.bincount(places[:, 0], minlength=len(input_ids))
        rows_per_sample[modality] = per_prompt.tolist()
    selected = selected.view_as(input_ids)
    fewer = _dropped(encoded, placeholders, selections, told_mask)
    prompt = _short_prompt(selected, mask, told_mask, fewer, application)
    values = {**arguments, "attention_mask": mask * selected.to(mask)}
    fills = {**FILL, "input_ids": _pad_token(vision.model) or 0}
    short = {
        name: prompt.take(values[name], fill)
        for name, fill in fills.items()
        if isinstance(values.get(name), Tensor)
    }
    pruned = _loses_some(selections, encoded, placeholders, len(input_ids))
    if arguments.get("position_ids") is not None:
        full = given_positions(arguments)
    else:
        found = full_positions(vision, on_host, encoded, placeholders, told_mask, pruned)
        full = to_device(found, device)
    short_mask = short["attention_mask"]
    if positions == "compact" and all(pruned):
        numbered = compact_positions(full, short_mask)
    else:
        numbered = original_positions(
            full,
            prompt,
            mask,
            short_mask,
            published=vision.mrope and arguments.get("position_ids") is None,
            masks_axis=vision.has_masks_axis(full),
        )
        if positions == "compact":  # a prompt that loses nothing is the engine's all the same
            loses = to_device(torch.tensor(pruned, device="cpu"), device)
            compact = compact_positions(full, short_mask)
            numbered = (
                torch.where(loses[:, None], compact[0], numbered[0]),
                torch.where(loses, compact[1], numbered[1]),
            )
    short["position_ids"], following = numbered
    shape = prompt.columns.shape
    return Shortened(
        input_ids,
        prompt,
        short,
        kept,
        rows_per_sample,
        following,
        logs=(
            torch.zeros(shape, device=device)
            if counts is None
            else prompt.take(counts.view_as(input_ids), 1).float().log()
        ),
        visual=prompt.take(to_device(visual.long(), device), 0).bool(),
        text_at_end=_text_at_end(visual, told_mask),
    )


def _text_at_end(visual: Tensor, mask: Tensor) -> int:
    """Return how many columns at the end are text in every prompt; see `Shortened`."""
    others = (visual | ~mask.bool()).any(dim=0).nonzero()[:, 0]
    return visual.shape[1] if not len(others) else visual.shape[1] - 1 - int(others[-1])


def _dropped(
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    selections: Mapping[str, list[Selection]],
    mask: Tensor,
) -> Tensor | None:
    """Return how many tokens each prompt loses, LongTensor [B]; None where the host cannot know.

    Parameters
    ----------
    encoded, placeholders, selections
        As for `shorten_prompt`.
    mask
        [B, L] on the CPU, 0 where there is padding.
    """
    result = torch.zeros(len(mask), dtype=torch.int64, device="cpu")
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        if not bool(mask[places[:, 0], places[:, 1]].all()):
            return None  # of a token that is padding it is not known whether it was kept
        for item, selection in zip(media.items, selections[modality], strict=True):
            first, last = int(places[item.rows[0], 0]), int(places[item.rows[-1], 0])
            if first != last:
                return None
            result[first] += selection.total - len(selection)
    return result


def _loses_some(
    selections: Mapping[str, list[Selection]],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    prompts: int,
) -> list[bool]:
    """Say of each prompt whether it loses a token."""
    result = [False] * prompts
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        for item, selection in zip(media.items, selections[modality], strict=True):
            if len(selection) < selection.total:
                for prompt in places[item.rows, 0].unique().tolist():
                    result[prompt] = True
    return result


def _short_prompt(
    selected: Tensor,
    mask: Tensor,
    told_mask: Tensor,
    dropped: Tensor | None,
    application: Application,
) -> ShortPrompt:
    """Return what is left of prompts.

    Parameters
    ----------
    selected, mask
        [B, L], what is selected and what is no padding.
    told_mask
        The same mask, on the CPU.
    dropped
        What `_dropped` returned.
    application
        As for `shorten_prompt`.
    """
    lengths = told_mask.bool().sum(dim=1)
    if application == "mask":
        staying = mask.bool()
    else:
        staying = selected & mask.bool()
        lengths = staying.sum(dim=1).cpu() if dropped is None else lengths - dropped
    return ShortPrompt.of(staying, int(lengths.amax()), pads_right(told_mask))


def _pad_token(model: Any) -> int | None:
    pad: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad
