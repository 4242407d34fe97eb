"""Reading a video together with its question, by the first layers of transformers' own decoder.

`prompt_items` adds the question to each item; `tokenprune.question.reader` builds the prompts that
are read, and `tokenprune_hf.prefix` runs the decoder's layers on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.registry import attending_layers, reference_layer
from tokenprune.question.attention import QueryKeys
from tokenprune.question.prompt import ItemPrompt, loose_rows
from tokenprune.question.reader import PromptReader, SetPrompts
from tokenprune.tokens import FROM_PROMPT, VisualTokens
from tokenprune.tower.layouts import places_on
from tokenprune.transfer import to_device
from tokenprune_hf.encoder_inputs import arguments_on_host
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.positions import full_positions
from tokenprune_hf.prefix import READ_BY_MODALITY, read_layers
from tokenprune_hf.shortening import attention_mask_of, find_placeholders
from tokenprune_hf.vision import VisionModel


def prompt_items(
    vision: VisionModel, arguments: Mapping[str, Any], encoded: Encoded, needs: Sequence[str]
) -> dict[str, list[VisualTokens]]:
    """Return every item's tokens, with what `needs` names of the prompt added.

    Parameters
    ----------
    vision
        The model's.
    arguments
        A call's, by name, with input_ids [B, L].
    encoded
        What the encoder returned.
    needs
        A selector's.

    Raises
    ------
    PromptError
        If the prompt does not match what was encoded, if no text comes after an item, or if it is
        not known which tiles make a video.
    """
    if not FROM_PROMPT & set(needs):
        return _of_encoder(encoded, needs)
    on_host = arguments_on_host(arguments)
    placeholders = find_placeholders(vision, on_host["input_ids"], encoded)
    device: torch.device = arguments["input_ids"].device
    return placed_items(vision, on_host, encoded, placeholders, needs, device)


def placed_items(
    vision: VisionModel,
    on_host: Mapping[str, Any],
    encoded: Encoded,
    placeholders: Mapping[str, Tensor],
    needs: Sequence[str],
    device: torch.device,
) -> dict[str, list[VisualTokens]]:
    """Return `prompt_items` of a call whose arguments were read already.

    Parameters
    ----------
    vision
        The model's.
    on_host
        A call's arguments, by name, with input_ids [B, L]; what is read of them on the CPU.
    encoded
        What the encoder returned.
    placeholders
        See `tokenprune_hf.shortening.find_placeholders`.
    needs
        A selector's.
    device
        Where the model takes ids.

    Raises
    ------
    PromptError
        If no text comes after an item, or it is not known which tiles make a video.
    """
    if not FROM_PROMPT & set(needs):
        return _of_encoder(encoded, needs)
    # Each item's prompt is laid out on the host, so that the device is not waited for item by item.
    input_ids: Tensor = on_host["input_ids"]
    attention_mask = attention_mask_of(vision, on_host)
    any_placeholder = torch.zeros_like(input_ids, dtype=torch.bool)
    for modality in ("image", "video"):
        any_placeholder |= input_ids == vision.token_id(modality)
    counted = OwnPositions(vision, on_host, encoded, placeholders, attention_mask)
    # Once a call: marks are read out of the whole config.
    users_text = vision.marks().users_text if "question_embeddings" in needs else None
    result: dict[str, list[VisualTokens]] = {}
    of_encoder = _of_encoder(encoded, needs)
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        vision.check_videos_told(media, places)
        result[modality] = []
        if not media.items:
            continue
        rows_of_items = [item.rows for item in media.items]
        for tokens, own in zip(of_encoder[modality], rows_of_items, strict=True):
            sample = int(places[own[0], 0])
            text = (attention_mask[sample].bool() & ~any_placeholder[sample]).nonzero()[:, 0]
            prompt, rows = _item_prompt(tokens, own, rows_of_items, places, input_ids[sample], text)
            rows = to_device(rows, media.rows.device)
            added: dict[str, Any] = {}
            if "question" in needs:
                added["question"] = to_device(prompt.question, device)
            if users_text is not None:
                words = to_device(users_text(prompt.question), device)
                added["question_embeddings"] = vision.embedded(words)
            if "query_attention" in needs:
                unpruned = partial(counted.around, sample, places[own, 1], text)
                interval = vision.interval_read(modality, tokens.grid, unpruned)
                added["query_attention"] = PromptReader(
                    DecoderLayers(vision, device, counted.numbered),
                    prompt,
                    vision.as_read(media.rows[rows]),
                    [layer[rows] for layer in media.deepstack],
                    tokens.grid,
                    interval,
                )
            result[modality].append(replace(tokens, **added))
    return result


def _of_encoder(encoded: Encoded, needs: Sequence[str]) -> dict[str, list[VisualTokens]]:
    """Return every item's tokens as the encoder made them, those at deepstack taps if needed."""
    if "deepstack" not in needs:
        return {
            modality: [item.tokens for item in media.items]
            for modality, media in encoded.modalities.items()
        }
    result = {}
    for modality, media in encoded.modalities.items():
        # What comes several times as one object stays one.
        seen: dict[int, VisualTokens] = {}
        rows = places_on([item.rows for item in media.items], media.rows.device)
        for item, own in zip(media.items, rows, strict=True):
            if id(item.tokens) not in seen:
                taps = torch.stack([layer[own] for layer in media.deepstack])
                seen[id(item.tokens)] = replace(item.tokens, deepstack=taps)
        result[modality] = [seen[id(item.tokens)] for item in media.items]
    return result


def _item_prompt(
    tokens: VisualTokens,
    rows: Tensor,
    rows_of_items: Sequence[Tensor],
    places: Tensor,
    ids: Tensor,
    text: Tensor,
) -> tuple[ItemPrompt, Tensor]:
    """Return an item's part in its prompt, and which rows of the encoder `SetPrompt.sources` means.

    Parameters
    ----------
    tokens
        The item's.
    rows
        LongTensor [N], its rows among all R that the encoder returned.
    rows_of_items
        Those of each item.
    places
        LongTensor [R, 2]: prompt and column of each row.
    ids, text
        The prompt [L] and the columns of its text.
    """
    columns = places[rows, 1]
    # Rows of other prompts and of all items are taken. Those left inside the item are newlines,
    # which are read with it and never ranked.
    taken = places[:, 0] != places[rows[0], 0]
    taken[torch.cat(list(rows_of_items))] = True
    loose = loose_rows(places[:, 1], rows, taken)
    prompt = ItemPrompt(ids, text, columns, places[loose, 1], tokens.grid, tokens.label)
    return prompt, torch.cat([rows, loose])


class OwnPositions:
    """The model's own positions of unpruned prompts, counted when they are first asked for.

    Parameters
    ----------
    vision
        The model's.
    arguments
        A call's, by name, on the CPU. Positions among them are left out: sets are counted by the
        model's rule.
    encoded
        What the encoder returned.
    placeholders
        See `tokenprune_hf.shortening.find_placeholders`.
    mask
        [B, L], 0 where there is padding.
    """

    def __init__(
        self,
        vision: VisionModel,
        arguments: Mapping[str, Any],
        encoded: Encoded,
        placeholders: Mapping[str, Tensor],
        mask: Tensor,
    ) -> None:
        self._vision = vision
        self._arguments = {**arguments, "position_ids": None}
        self._rest = encoded, placeholders, mask

    @cached_property
    def _positions(self) -> Tensor:
        unpruned = [False] * len(self._rest[2])
        return full_positions(self._vision, self._arguments, *self._rest, unpruned)

    @property
    def numbered(self) -> bool:
        """Whether an axis that numbers the tokens, for masks, stands in front of the others."""
        return self._vision.family.mrope or self._vision.has_masks_axis(self._positions)

    def around(self, sample: int, columns: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions [1 or 3, L] of an item and the text behind it, and its columns.

        Parameters
        ----------
        sample
            Number of the prompt.
        columns
            LongTensor [N], where the item's tokens stand, ascending.
        text
            LongTensor, the columns of the prompt's text.

        Returns
        -------
        tuple of Tensor
            Positions, and BoolTensor [L], where the item's tokens are.
        """
        first, last = int(columns[0]), int(columns[-1])
        end = last + (2 if bool((text == last + 1).any()) else 1)
        is_visual = torch.zeros(end - first, dtype=torch.bool, device=columns.device)
        is_visual[columns - first] = True
        own = self._positions[..., sample, first:end].to(columns.device)
        return own.reshape(-1, end - first)[-3:], is_visual


@dataclass(frozen=True, eq=False)
class DecoderLayers:
    """The first layers of a model's decoder: a `tokenprune.question.reader.FirstLayers`.

    Attributes
    ----------
    vision
        Whose language model reads.
    device
        Where it takes ids.
    numbered
        Whether, of positions on several axes, the decoder is told the number of each token first.
    """

    vision: VisionModel
    device: torch.device
    numbered: bool = True

    def reference_layer(self, asked: int | None) -> int:
        """Return the layer to read, from 0."""
        config = self.vision.model.config
        text_config = config.get_text_config()
        return reference_layer(
            config.model_type,
            text_config.num_hidden_layers,
            text_config.hidden_size,
            asked,
            attending_layers(text_config),
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return [S, L, D]."""
        ids = to_device(ids, self.device)
        embedded: Tensor = self.vision.model.get_input_embeddings()(ids)
        return embedded

    def run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        """Run the layers on all prompts at once."""
        extra: dict[str, Any] = {}
        if prompts.deeper:
            extra["visual_pos_masks"] = prompts.is_visual
            extra["deepstack_visual_embeds"] = list(prompts.deeper)
        decoder = self.vision.language_model()
        for name in READ_BY_MODALITY & set(inspect.signature(decoder.forward).parameters):
            extra[name] = prompts.is_visual.int()
        positions = prompts.positions
        if positions.ndim == 3 and self.numbered:
            # The first of four rows numbers the tokens, for the engine's masks.
            plain = torch.arange(positions.shape[2], device=positions.device)
            positions = torch.cat([plain.expand(1, positions.shape[1], -1), positions])
        elif positions.ndim == 3 or prompts.gaps:
            # Without that axis or a mask, masks are made of positions: times and gaps would be
            # taken for ends of packed prompts.
            extra["attention_mask"] = torch.ones_like(prompts.is_visual, dtype=torch.int64)
        return read_layers(
            decoder,
            prompts.states,
            positions,
            layers,
            asked=prompts.asked,
            questions=prompts.questions,
            values=values,
            hidden=hidden,
            **extra,
        )
