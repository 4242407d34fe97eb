"""Reading a video together with its question, by the language model's own first layers.

`PromptReader` builds the prompt of a set of frames out of the caller's prompt, and has
`tokenprune_hf.prefix` run the decoder layers up to the reference layer on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError
from tokenprune.reading import QueryKeys, reference_layer
from tokenprune.tokens import VisualTokens
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.families.base import EncodedModality, Family, Item
from tokenprune_hf.prefix import read_layers

PROMPT_SIDE = ("query_attention", "question")
"""What selectors may need that depends on the prompt, and so is no part of `Encoded`."""


def with_prompt(
    family: Family,
    input_ids: Tensor,
    attention_mask: Tensor,
    encoded: Encoded,
    placeholders: dict[str, Tensor],
    needs: Sequence[str],
) -> dict[str, list[VisualTokens]]:
    """Return every item's tokens, with what `needs` names of the prompt added.

    Parameters
    ----------
    family
        The model's.
    input_ids, attention_mask
        [B, L] of the caller.
    encoded
        What the encoder returned.
    placeholders
        See `find_placeholders`.
    needs
        A selector's.

    Raises
    ------
    PromptError
        If no text comes after an item, or if it is not known which tiles make a video.
    """
    items = {modality: media.items for modality, media in encoded.modalities.items()}
    if not set(needs) & set(PROMPT_SIDE):
        return {modality: [item.tokens for item in own] for modality, own in items.items()}
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
            spoken = attention_mask[sample].bool()
            prompt = _ItemPrompt(
                input_ids[sample], spoken, any_placeholder[sample], media, item, places
            )
            added: dict[str, Any] = {}
            if "question" in needs:
                added["question"] = input_ids[sample][prompt.question]
            if "query_attention" in needs:
                added["query_attention"] = PromptReader(family, modality, prompt)
            result[modality].append(replace(item.tokens, **added))
    return result


class _ItemPrompt:
    """One item's part in one prompt: what comes before it, inside it and after it.

    Attributes
    ----------
    question
        LongTensor, the columns of the text after the item.
    """

    def __init__(
        self,
        input_ids: Tensor,
        spoken: Tensor,
        is_placeholder: Tensor,
        media: EncodedModality,
        item: Item,
        places: Tensor,
    ) -> None:
        self.input_ids = input_ids
        self.media = media
        self.item = item
        rows = item.rows.to(places.device)
        self._columns = places[rows, 1]
        first, last = int(self._columns[0]), int(self._columns[-1])
        text = (spoken & ~is_placeholder).nonzero()[:, 0]
        self.question = text[text > last]
        if not len(self.question):
            raise PromptError(
                f"{item.tokens.label}: no text comes after it, and this method ranks its tokens by "
                "the text that does. Put the question after the image or video, or make the prompt "
                "with add_generation_prompt=True."
            )
        self._before = text[text < first]
        inside = text[(text > first) & (text < last)]
        # Text inside a video (time stamps, frame numbers) is about the frame that comes next.
        per_frame = item.tokens.grid[1] * item.tokens.grid[2]
        following = torch.searchsorted(self._columns, inside)
        self._labels, self._label_frames = inside, following // per_frame
        # Rows of the encoder that belong to no item (newlines) stay wherever they stand in it.
        loose = torch.ones(len(places), dtype=torch.bool, device=places.device)
        for other in media.items:
            loose[other.rows.to(places.device)] = False
        sample = int(places[rows[0], 0])
        near = (places[:, 1] > first) & (places[:, 1] <= last + 1)
        self._loose = (loose & near & (places[:, 0] == sample)).nonzero()[:, 0]
        self._loose_columns = places[self._loose, 1]

    def of_set(self, tokens: Tensor) -> _SetPrompt:
        """Return the prompt that holds some of the item's tokens and all of its text.

        Parameters
        ----------
        tokens
            LongTensor [n], ascending.
        """
        device = self.input_ids.device
        tokens = tokens.to(device)
        per_frame = self.item.tokens.grid[1] * self.item.tokens.grid[2]
        frames = torch.unique(tokens // per_frame)
        labels = self._labels[torch.isin(self._label_frames, frames)]
        text = torch.cat([self._before, labels, self.question])
        visual = torch.cat([self._columns[tokens], self._loose_columns])
        rows = torch.cat([self.item.rows.to(device)[tokens], self._loose])
        columns, order = torch.cat([text, visual]).sort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        visual_places, by_place = place[len(text) :].sort()
        return _SetPrompt(
            ids=self.input_ids[columns],
            visual=visual_places,
            rows=rows[by_place],
            asked=place[len(text) : len(text) + len(tokens)],
            questions=len(self.question),
            frames=len(frames),
        )


@dataclass(frozen=True, eq=False)
class _SetPrompt:
    """The prompt of one set of frames.

    Attributes
    ----------
    ids
        LongTensor [L].
    visual, rows
        LongTensors [V]: the visual columns among L, and which of the encoder's rows goes in each.
    asked
        LongTensor [n], the columns of the set's own tokens.
    questions
        Q; the question is the last Q tokens.
    frames
        How many frames of the grid the set has.
    """

    ids: Tensor
    visual: Tensor
    rows: Tensor
    asked: Tensor
    questions: int
    frames: int


@dataclass(frozen=True, eq=False)
class PromptReader:
    """A `tokenprune.reading.QueryReader` of one item in one prompt.

    Attributes
    ----------
    family, modality
        Whose language model reads what.
    prompt
        The item's part in the prompt.
    """

    family: Family
    modality: str
    prompt: _ItemPrompt

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
        shapes = [(len(prompt.ids), prompt.frames) for prompt in prompts]
        for shape in sorted(set(shapes)):
            # Prompts of one length go through the layers together; no padding, so no mask.
            mine = [index for index, own in enumerate(shapes) if own == shape]
            seen = self._run([prompts[index] for index in mine], layers, values, hidden)
            found.update(zip(mine, seen, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _run(
        self, prompts: Sequence[_SetPrompt], layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        model, media = self.family.model, self.prompt.media
        ids = torch.stack([prompt.ids for prompt in prompts])
        embeddings = model.get_input_embeddings()(ids)
        is_visual = torch.zeros_like(ids, dtype=torch.bool)
        for index, prompt in enumerate(prompts):
            is_visual[index, prompt.visual] = True
        rows = torch.cat([prompt.rows for prompt in prompts])
        embeddings = embeddings.clone()
        embeddings[is_visual] = media.rows[rows.to(media.rows.device)].to(embeddings)
        extra: dict[str, Any] = {}
        if media.deepstack:
            extra["visual_pos_masks"] = is_visual
            extra["deepstack_visual_embeds"] = [layer[rows] for layer in media.deepstack]
        return read_layers(
            self.family.language_model(),
            embeddings,
            self._positions(ids, is_visual, prompts[0].frames),
            layers,
            asked=[prompt.asked for prompt in prompts],
            questions=prompts[0].questions,
            values=values,
            hidden=hidden,
            **extra,
        )

    def _positions(self, ids: Tensor, is_visual: Tensor, frames: int) -> Tensor:
        """Return fresh positions of a set, as if it was a whole video."""
        plain = torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        if not self.family.mrope:
            return plain
        _, height, width = self.prompt.item.tokens.grid
        side = self.family.merge_side()
        grid = torch.tensor([[frames, height * side, width * side]], device=ids.device)
        kind = 1 if self.modality == "image" else 2
        positions, _ = self.family.inner.get_rope_index(
            ids,
            mm_token_type_ids=is_visual.int() * kind,
            **{f"{self.modality}_grid_thw": grid.expand(len(ids), -1).clone()},
        )
        # The first of four rows numbers the tokens, for the engine's masks.
        return torch.cat([plain[None].to(positions), positions])
