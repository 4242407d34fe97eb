"""Reading a video together with its question, by the language model's own first layers.

`PromptReader` builds the prompt of a set of frames out of the caller's prompt, and has
`tokenprune_hf.prefix` run the decoder layers up to the reference layer on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.reading import QueryKeys, reference_layer
from tokenprune.set_prompt import ItemPrompt, SetPrompt, loose_rows, positions_on_axes
from tokenprune.tokens import FROM_PROMPT, VisualTokens
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.families.base import EncodedModality, Family, Item
from tokenprune_hf.prefix import read_layers
from tokenprune_hf.shortened import attention_mask_of, find_placeholders


def prompt_items(
    family: Family, arguments: Mapping[str, Any], encoded: Encoded, needs: Sequence[str]
) -> dict[str, list[VisualTokens]]:
    """Return every item's tokens, with what `needs` names of the prompt added.

    Parameters
    ----------
    family
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
        return {
            modality: [item.tokens for item in media.items]
            for modality, media in encoded.modalities.items()
        }
    input_ids: Tensor = arguments["input_ids"]
    placeholders = find_placeholders(family, input_ids, encoded)
    attention_mask = attention_mask_of(family, arguments)
    any_placeholder = torch.zeros_like(input_ids, dtype=torch.bool)
    for modality in ("image", "video"):
        any_placeholder |= input_ids == family.token_id(modality)
    result: dict[str, list[VisualTokens]] = {}
    for modality, media in encoded.modalities.items():
        places = placeholders[modality]
        family.check_videos_told(media, places)
        result[modality] = []
        for item in media.items:
            sample = int(places[item.rows[0], 0])
            text = (attention_mask[sample].bool() & ~any_placeholder[sample]).nonzero()[:, 0]
            prompt, rows = _item_prompt(media, item, places, input_ids[sample], text)
            added: dict[str, Any] = {}
            if "question" in needs:
                added["question"] = prompt.question
            if "query_attention" in needs:
                added["query_attention"] = PromptReader(
                    family, media, modality, item.tokens.grid, prompt, rows
                )
            result[modality].append(replace(item.tokens, **added))
    return result


def _item_prompt(
    media: EncodedModality, item: Item, places: Tensor, ids: Tensor, text: Tensor
) -> tuple[ItemPrompt, Tensor]:
    """Return an item's part in its prompt, and which rows of the encoder `SetPrompt.sources` means.

    Parameters
    ----------
    media, item
        What the encoder returned.
    places
        LongTensor [R, 2]: prompt and column of each row.
    ids, text
        The prompt [L] and the columns of its text.
    """
    rows = item.rows.to(places.device)
    columns = places[rows, 1]
    taken = places[:, 0] != places[rows[0], 0]
    for other in media.items:
        taken[other.rows.to(places.device)] = True
    loose = loose_rows(places[:, 1], rows, taken)
    tokens = item.tokens
    prompt = ItemPrompt(ids, text, columns, places[loose, 1], tokens.grid, tokens.label)
    return prompt, torch.cat([rows, loose])


@dataclass(frozen=True, eq=False)
class PromptReader:
    """A `tokenprune.reading.QueryReader` of one item in one prompt.

    Attributes
    ----------
    family
        Whose language model reads.
    media, modality
        What the encoder returned, and ``"image"`` or ``"video"``.
    grid
        Of the item.
    prompt
        The item's part in the prompt.
    rows
        LongTensor, which of the encoder's rows each of `SetPrompt.sources` stands for.
    """

    family: Family
    media: EncodedModality
    modality: str
    grid: tuple[int, int, int]
    prompt: ItemPrompt
    rows: Tensor

    def read(
        self, sets: Sequence[Tensor], layer: int | None, *, values: bool, hidden: bool
    ) -> list[QueryKeys]:
        """Return q and k of the reference layer for each set; see the protocol."""
        config = self.family.model.config
        text_config = config.get_text_config()
        number = reference_layer(
            config.model_type, text_config.num_hidden_layers, text_config.hidden_size, layer
        )
        return [seen[number] for seen in self.read_layers(sets, [number], values, hidden)]

    def read_layers(
        self, sets: Sequence[Tensor], layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        """Return q and k of several layers, by layer, for each set.

        Parameters
        ----------
        sets
            As in `read`.
        layers
            Layers of the language model, from 0.
        values, hidden
            As in `read`.
        """
        prompts = [self.prompt.of_set(tokens) for tokens in sets]
        found: dict[int, dict[int, QueryKeys]] = {}
        for length in sorted({len(prompt.ids) for prompt in prompts}):
            # Prompts of one length go through the layers together; no padding, so no mask.
            mine = [index for index, prompt in enumerate(prompts) if len(prompt.ids) == length]
            seen = self._run([prompts[index] for index in mine], layers, values, hidden)
            found.update(zip(mine, seen, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _run(
        self, prompts: Sequence[SetPrompt], layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        ids = torch.stack([prompt.ids for prompt in prompts])
        is_visual = torch.stack([prompt.is_visual for prompt in prompts])
        rows = self.rows[torch.cat([prompt.sources for prompt in prompts])]
        rows = rows.to(self.media.rows.device)
        embeddings = self.family.model.get_input_embeddings()(ids).clone()
        embeddings[is_visual] = self.media.rows[rows].to(embeddings)
        extra: dict[str, Any] = {}
        if self.media.deepstack:
            extra["visual_pos_masks"] = is_visual
            extra["deepstack_visual_embeds"] = [layer[rows] for layer in self.media.deepstack]
        return read_layers(
            self.family.language_model(),
            embeddings,
            self._positions(is_visual),
            layers,
            asked=[prompt.asked for prompt in prompts],
            questions=prompts[0].questions,
            values=values,
            hidden=hidden,
            **extra,
        )

    def _positions(self, is_visual: Tensor) -> Tensor:
        """Return fresh positions of sets [S, L], as if each was a whole video."""
        plain = torch.arange(is_visual.shape[1], device=is_visual.device)
        plain = plain[None].expand(len(is_visual), -1)
        if not self.family.mrope:
            return plain
        interval = self.family.frame_interval(self.modality)
        axes = [positions_on_axes(own, self.grid, interval) for own in is_visual]
        # The first of four rows numbers the tokens, for the engine's masks.
        return torch.cat([plain[None], torch.stack(axes, dim=1)])
