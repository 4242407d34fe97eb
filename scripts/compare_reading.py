"""How ``compare_selectors.py`` puts questions to a model that sees some of the visual tokens.

What stands in front of the questions is read once for all questions that share it and the tokens
kept; the questions stand behind it in one sequence, and a mask lets each see that and itself alone,
at the positions it would have. So the answers are those of prompts read one by one. Tokens that
stay have the positions they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_sets import FRAMES, Prompt
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import tokenprune_hf
from tokenprune import VisualTokens
from tokenprune.families.registry import reference_layer
from tokenprune.representation import tokens_represented
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.questions import Box
from tokenprune_hf.engine import cache_argument
from tokenprune_hf.loading import ask

_AT_ONCE = 8192  # tokens in a batch
_NEVER = torch.finfo(torch.float32).min / 2  # bfloat16 holds it


@dataclass(frozen=True)
class Reading:
    """How the language model reads the tokens that stay.

    Attributes
    ----------
    name
        What tables call it.
    power
        The logits of a kept token's key get the log of this power of the number of tokens that it
        stands for: 0 for plain attention, 1 for proportional attention.
    merged
        Whether a kept token's embedding is the mean of those that it stands for.
    """

    name: str
    power: float = 0.0
    merged: bool = False


PLAIN = Reading("plain")
PROPORTIONAL = Reading("proportional", 1.0)
MERGED = Reading("merged", merged=True)
ROOT = Reading("root of the counts", 0.5)


@dataclass(frozen=True)
class Layout:
    """A prompt's ids up to its question.

    Attributes
    ----------
    ids
        LongTensor [P], up to the last visual token.
    places
        LongTensor [M, N], where in it the tokens of each image or video stand.
    tail
        LongTensor, the ids between the last visual token and the question.
    """

    ids: Tensor
    places: Tensor
    tail: Tensor


@dataclass(frozen=True)
class Data:
    """Some prompts of a set, encoded and read; P prompts with M images or one video, Q questions.

    Attributes
    ----------
    first
        Number of the first prompt in its set.
    layout
        Of all prompts.
    items
        P * M, prompt by prompt.
    prompt
        LongTensor [Q], which prompt each question belongs to.
    question
        LongTensor [q] each: the ids of all that comes after `layout`.
    answer
        LongTensor [Q], the first id of the right answer.
    types
        Q types of question.
    evidence
        Q lists of boxes, in pixels of an image whose side is `side`.
    side
        Pixels.
    layers
        Whose attention is held.
    attention
        Of each question, for each image or video of its prompt, [layers, H, q, N]: of the tokens
        behind the image or video to its tokens, in a prompt that has no other.
    unpruned
        BoolTensor [Q], whether the model is right with all tokens.
    """

    first: int
    layout: Layout
    items: list[VisualTokens]
    prompt: Tensor
    question: list[Tensor]
    answer: Tensor
    types: list[str]
    evidence: list[tuple[Box, ...]]
    side: int
    layers: list[int]
    attention: list[list[Tensor]]
    unpruned: Tensor

    @property
    def media(self) -> int:
        """M."""
        return len(self.layout.places)

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.layout.places.shape[1])

    @property
    def rows(self) -> Tensor:
        """Embeddings, float32 [P * M, N, D]."""
        found = [item.embeddings.float() for item in self.items if item.embeddings is not None]
        return torch.stack(found)

    def of_questions(self, of_items: Tensor) -> Tensor:
        """[P * M, ...] -> [Q, M, ...]: give every question what its prompt's items have."""
        return of_items.unflatten(0, (-1, self.media))[self.prompt]

    def asked(self, number: int, layer: int) -> list[VisualTokens]:
        """Return the M items of a question with its attention."""
        start = int(self.prompt[number]) * self.media
        return [
            replace(item, query_attention=attention[self.layers.index(layer)])
            for item, attention in zip(
                self.items[start : start + self.media], self.attention[number], strict=True
            )
        ]


class Model:
    """A bundled-type model, and how questions are put to it.

    Parameters
    ----------
    path
        Folder of the checkpoint.
    bfloat16
        Compute in bfloat16, which is faster and changes a few answers.
    """

    def __init__(self, path: Path, bfloat16: bool = False) -> None:
        make: Any = AutoModelForImageTextToText  # its auto classes are not typed
        processors: Any = AutoProcessor
        self.model = make.from_pretrained(path, attn_implementation="sdpa").eval()
        self.processor = processors.from_pretrained(path)
        self.bfloat16 = bfloat16
        text = self.model.config.get_text_config()
        self.layers, self.width = int(text.num_hidden_layers), int(text.hidden_size)
        self.layer = reference_layer(self.model.config.model_type, self.layers, self.width)
        self.tokens = int(self.processor.image_seq_length)
        size = int(self.model.config.vision_config.image_size[0])
        self.style = next(s for s in scenes.STYLES.values() if s.image_size == size)
        self.layout = cache(self._layout)

    def ids(self, text: str) -> Tensor:
        """Return LongTensor [n]."""
        return torch.tensor(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def _layout(self, images: int, frames: int = 0, only: int | None = None) -> Layout:
        """Lay out images, or the frames of one video, as the processor's chat template does.

        Parameters
        ----------
        images
            How many, where there is no video.
        frames
            Of the video, or 0.
        only
            Leave the text of the others, and none of their tokens.
        """
        full = "<img>" + "<IMG_CONTEXT>" * self.tokens + "</img>"
        empty = "<img></img>"
        if frames:
            parts = [f"Frame{number + 1}: {full}" for number in range(frames)]
        else:
            parts = [full if only in (None, number) else empty for number in range(images)]
        ids = self.ids("<|im_start|>user\n" + "\n".join(parts) + "\n")
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        last = int(places[-1]) + 1
        found = 1 if frames or only is not None else images
        if only is None:
            self._check_layout(ids, images, frames)
        return Layout(ids[:last], places.view(found, -1), ids[last:])

    def _check_layout(self, ids: Tensor, images: int, frames: int) -> None:
        """Compare with what the processor makes of a chat message; they must be the same."""
        size = self.style.image_size
        content: list[dict[str, Any]] = [{"type": "image"}] * images
        more: dict[str, Any] = {"images": [Image.new("RGB", (size, size))] * images}
        if frames:
            content = [{"type": "video"}]
            video = np.zeros((frames, size, size, 3), np.uint8)
            more = {"videos": [video], "videos_kwargs": {"do_sample_frames": False}}
        message = {"role": "user", "content": [*content, {"type": "text", "text": "yes"}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        given = self.processor(text=[text], return_tensors="pt", **more)["input_ids"][0]
        if given.tolist() != [*ids.tolist(), *self.ask("yes").tolist()]:
            raise SystemExit(
                f"the chat template lays {images} images, {frames} frames out otherwise"
            )

    def ask(self, question: str) -> Tensor:
        """Return the ids of a question and of all that comes before its answer."""
        return self.ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")

    @torch.inference_mode()
    def read(self, prompts: Sequence[Prompt], first: int, every_layer: bool) -> Data:
        """Encode and read some prompts of one kind.

        Parameters
        ----------
        prompts
            At least one.
        first
            Number of the first one in its set.
        every_layer
            Hold the attention of every layer, and not only of the reference layer.
        """
        media = [medium for prompt in prompts for medium in prompt.media]
        video = media[0].ndim == 4
        frames = FRAMES if video else 0
        items = self._encode_videos(media) if video else self._encode_images(media)
        images = len(prompts[0].media)
        asked = [(number, one) for number, own in enumerate(prompts) for one in own.asked]
        data = Data(
            first=first,
            layout=self.layout(images, frames),
            items=items,
            prompt=torch.tensor([number for number, _ in asked]),
            question=[self.ask(one.question) for _, one in asked],
            answer=torch.tensor([int(self.ids(one.answer)[0]) for _, one in asked]),
            types=[one.type for _, one in asked],
            evidence=[one.evidence for _, one in asked],
            side=int(media[0].shape[-2]),
            layers=list(range(self.layers)) if every_layer else [self.layer],
            attention=[],
            unpruned=torch.empty(0),
        )
        attention: list[list[Tensor]] = [[] for _ in asked]
        for number in range(images):
            alone = replace(
                data,
                layout=data.layout if images == 1 else self.layout(images, only=number),
                items=items[number::images],
            )
            for own, found in zip(attention, self._attention(alone), strict=True):
                own.append(found)
        every = torch.arange(data.tokens).expand(len(asked), images, -1)
        return replace(data, attention=attention, unpruned=self.right(data, every))

    def _encode_images(self, images: Sequence[np.ndarray]) -> list[VisualTokens]:
        items: list[VisualTokens] = []
        for start in range(0, len(images), 25):
            part = [Image.fromarray(pixels) for pixels in images[start : start + 25]]
            pixels = self.processor.image_processor(images=part, return_tensors="pt")
            encoded = tokenprune_hf.encode(self.model, pixel_values=pixels["pixel_values"])
            items += [item.tokens for item in encoded.modalities["image"].items]
        return items

    def _encode_videos(self, videos: Sequence[np.ndarray]) -> list[VisualTokens]:
        items: list[VisualTokens] = []
        for frames in videos:
            encoded = tokenprune_hf.encode(
                self.model, **ask(self.processor, "what is it?", video=frames)
            )
            (modality,) = encoded.modalities.values()
            items += [item.tokens for item in modality.items]
        return items

    def _attention(self, data: Data) -> list[Tensor]:
        """Return each question's attention, see `Data`, where prompts have one item."""
        found: list[Tensor] = [torch.empty(0)] * len(data.question)
        every = torch.arange(data.tokens).expand(len(data.items), 1, -1)
        asked = _grouped(data.prompt, len(data.items))
        for part in self._batches(data, every, asked):
            numbers = torch.tensor(part)
            batch = self._batch(data, numbers, every[numbers], [asked[n] for n in part], PLAIN)
            _, maps = self._run(batch, attention=True)
            chosen = torch.stack([maps[layer] for layer in data.layers])
            for row, start, end, number in batch.spans:
                own = chosen[:, row, :, start:end]
                found[number] = own[..., data.layout.places[0]].float().clone()
        return found

    @torch.inference_mode()
    def right(self, data: Data, kept: Tensor, reading: Reading = PLAIN) -> Tensor:
        """Return BoolTensor [Q]: answered right from the kept tokens, LongTensor [Q, M, K]."""
        keys = torch.cat([data.prompt[:, None], kept.flatten(1)], dim=1)
        rows, owner = torch.unique(keys, dim=0, return_inverse=True)
        places = rows[:, 1:].unflatten(1, kept.shape[1:])
        asked = _grouped(owner, len(rows))
        right = torch.zeros(len(kept), dtype=torch.bool)
        for part in self._batches(data, places, asked):
            numbers = torch.tensor(part)
            batch = self._batch(
                data, rows[numbers, 0], places[numbers], [asked[n] for n in part], reading
            )
            hidden, _ = self._run(batch)
            row, _, end, number = (torch.tensor(one) for one in zip(*batch.spans, strict=True))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                said = self.model.lm_head(hidden[row, end - 1]).argmax(-1)
            right[number] = said == data.answer[number]
        return right

    def _batches(self, data: Data, kept: Tensor, asked: Sequence[Sequence[int]]) -> list[list[int]]:
        """Split rows over batches, rows with as many tokens behind their images together."""
        lengths = [sum(len(data.question[n]) + len(data.layout.tail) for n in own) for own in asked]
        order = sorted((n for n, own in enumerate(asked) if own), key=lambda n: lengths[n])
        before = len(data.layout.ids) - data.layout.places.numel() + kept[0].numel()
        step = max(1, _AT_ONCE // (before + max(lengths)))
        return [order[start : start + step] for start in range(0, len(order), step)]

    def _batch(
        self,
        data: Data,
        prompts: Tensor,
        kept: Tensor,
        asked: Sequence[Sequence[int]],
        reading: Reading,
    ) -> Batch:
        """Lay some rows out: prompts [R], the tokens kept of each [R, M, K], questions of each."""
        layout, embed = data.layout, self.model.get_input_embeddings()
        size, width = len(prompts), self.width
        items = (prompts[:, None] * data.media + torch.arange(data.media)).flatten()
        rows = torch.stack([_embeddings(data.items[n]) for n in items.tolist()])
        flat = kept.flatten(0, 1)
        bias = None
        if reading.power:
            counts = tokens_represented(rows, flat).view(size, -1)
            bias = counts.float().log() * reading.power
        if reading.merged:
            rows = merged(rows, flat)
        visual = rows.gather(1, flat[..., None].expand(-1, -1, width)).view(size, -1, width)
        columns = torch.stack([layout.places[m][kept[:, m]] for m in range(data.media)], dim=1)
        is_text = torch.ones(len(layout.ids), dtype=torch.bool)
        is_text[layout.places.flatten()] = False
        text = is_text.nonzero()[:, 0]
        positions, order = torch.cat([text.expand(size, -1), columns.flatten(1)], dim=1).sort()
        before = torch.cat([embed(layout.ids[text]).expand(size, -1, -1), visual], dim=1)
        before = before.gather(1, order[..., None].expand(-1, -1, width))
        if bias is not None:
            bias = torch.cat([torch.zeros(size, len(text)), bias], dim=1).gather(1, order)

        branches = [[torch.cat([layout.tail, data.question[n]]) for n in own] for own in asked]
        length = max(sum(map(len, own)) for own in branches)
        ids = torch.zeros(size, length, dtype=torch.int64)
        after = torch.full((size, length), len(layout.ids))
        # Every question has its number; padding is on its own.
        owner = torch.full((size, length), -1)
        spans: list[tuple[int, int, int, int]] = []
        for row, (numbers, own) in enumerate(zip(asked, branches, strict=True)):
            end = 0
            for number, branch in zip(numbers, own, strict=True):
                start, end = end, end + len(branch)
                ids[row, start:end] = branch
                after[row, start:end] = torch.arange(len(branch)) + len(layout.ids)
                owner[row, start:end] = number
                spans.append((row, start, end, number))
        same = owner[:, :, None] == owner[:, None, :]
        seen = torch.cat(
            [
                torch.ones(size, length, before.shape[1], dtype=torch.bool),
                same & torch.ones(length, length, dtype=torch.bool).tril(),
            ],
            dim=2,
        )
        return Batch(before, positions, bias, embed(ids), after, seen, spans)

    def _run(self, batch: Batch, attention: bool = False) -> tuple[Tensor, Any]:
        """Return the hidden states of the questions [R, L, D], and attention [R, H, L, P + L]."""
        language_model, cached = self.model.model.language_model, DynamicCache()
        kind = torch.bfloat16 if self.bfloat16 else torch.float32
        size, length = batch.positions.shape
        mask = torch.ones(size, length, dtype=torch.int64)
        later = torch.zeros(batch.seen.shape)
        if batch.bias is not None:
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            mask = batch.bias[:, None, :].masked_fill(~causal, _NEVER)[:, None].to(kind)
            later[:, :, :length] += batch.bias[:, None, :]
        later = later.masked_fill(~batch.seen, _NEVER)[:, None].to(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            language_model(
                inputs_embeds=batch.before,
                position_ids=batch.positions,
                attention_mask=mask,
                **cache_argument(language_model, cached),
                use_cache=True,
            )
            if attention:
                # Only eager attention returns the maps.
                self.model.set_attn_implementation("eager")
            output = language_model(
                inputs_embeds=batch.after,
                position_ids=batch.after_positions,
                attention_mask=later,
                **cache_argument(language_model, cached),
                use_cache=True,
                output_attentions=attention,
            )
            if attention:
                self.model.set_attn_implementation("sdpa")
        return output.last_hidden_state, output.attentions


@dataclass(frozen=True)
class Batch:
    """R prompts of one length, and behind each L tokens of questions.

    Attributes
    ----------
    before
        [R, P, D], the embeddings up to the last visual token.
    positions
        LongTensor [R, P].
    bias
        [R, P], what is added to the logits of each key, or None.
    after
        [R, L, D], the embeddings of the questions, one behind the other.
    after_positions
        LongTensor [R, L].
    seen
        BoolTensor [R, L, P + L], what each token of the questions may look at.
    spans
        Row, start, end and number of each question.
    """

    before: Tensor
    positions: Tensor
    bias: Tensor | None
    after: Tensor
    after_positions: Tensor
    seen: Tensor
    spans: list[tuple[int, int, int, int]]


def _embeddings(item: VisualTokens) -> Tensor:
    if item.embeddings is None:
        raise TypeError("an item was encoded without its embeddings")
    return item.embeddings.float()


def _grouped(owner: Tensor, count: int) -> list[list[int]]:
    """Return which questions each row has."""
    found: list[list[int]] = [[] for _ in range(count)]
    for number, row in enumerate(owner.tolist()):
        found[row].append(number)
    return found


def merged(rows: Tensor, kept: Tensor) -> Tensor:
    """Put the mean of the tokens that a kept one stands for in its place; [B, N, D], [B, K]."""
    size, total, width = rows.shape
    unit = normalize(rows.double(), dim=-1)
    own = kept[..., None].expand(-1, -1, width)
    # Rounded, so that tokens that are equal are equally near.
    nearest = (unit @ unit.gather(1, own).transpose(1, 2)).float().argmax(dim=-1)
    nearest.scatter_(1, kept, torch.arange(kept.shape[1]).expand(size, -1))
    sums = torch.zeros(size, kept.shape[1], width).index_put_(
        (torch.arange(size)[:, None].expand(-1, total), nearest), rows, accumulate=True
    )
    counts = torch.zeros(size, kept.shape[1]).scatter_add_(1, nearest, torch.ones(size, total))
    return rows.scatter(1, own, sums / counts[..., None])
