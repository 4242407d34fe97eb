"""What pruning should do, calculated without the adapter: layouts, full attention maps, splicing.

Nothing here is fast or general. Layouts are written out in loops, attention is the whole softmax
map, prompts are run one by one without padding and without a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.hf.models import APART, END, IMAGE, PAD, START, STATEFUL, VIDEO


@contextmanager
def full_attention_maps(tower: Any) -> Iterator[list[Tensor]]:
    """Collect every attention map [B, H, P, P] that a vision tower computes, in order of calls."""
    maps: list[Tensor] = []

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        weights = query.float() @ key.float().transpose(-1, -2) * scale
        if attention_mask is not None:  # pictures padded to one length
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.zeros_like(weights).masked_fill(~attention_mask, -torch.inf)
            weights = weights + attention_mask
        weights = weights.softmax(dim=-1)
        maps.append(weights)
        return (weights @ value.float()).to(value).transpose(1, 2), None

    if hasattr(tower, "timm_model"):  # which calls torch's own attention

        def plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, **_: Any) -> Tensor:
            return spy(None, query, key, value, attn_mask)[0].transpose(1, 2)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.scaled_dot_product_attention", plain)
            yield maps
        return
    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "spy"
    try:
        yield maps
    finally:
        tower.config._attn_implementation = before


def item_rows(
    name: str, inputs: dict[str, Any], modality: str, sizes: list[int]
) -> list[list[int]]:
    """Return, item by item, which rows of the encoder's output it holds, in raster order."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    if name.startswith("llava_next") and modality == "image":
        return [
            rows
            for start, (height, width) in zip(
                starts[:-1], inputs["image_sizes"].tolist(), strict=True
            )
            for rows in _next_image(start, height, width)
        ]
    if name == "llava_onevision" and modality == "image":
        result = []
        for start, (height, width) in zip(starts[:-1], inputs["image_sizes"].tolist(), strict=True):
            rows, columns = (8, 8) if (height, width) == (72, 72) else (height // 4, width // 4)
            result.append(list(range(start, start + 36)))
            result.append(
                [start + 36 + y * (columns + 1) + x for y in range(rows) for x in range(columns)]
            )
        return result
    if name == "llava_onevision":
        return [list(range(start, start + 36)) for start in starts[:-1]]
    if name == "video_llava" and modality == "video":
        return [
            [start + 37 * frame + 1 + token for frame in range(4) for token in range(36)]
            for start in starts[:-1:4]
        ]
    if name == "perception_lm" and modality == "video":
        return [list(range(start, start + 64)) for start in starts[:-1:4]]
    if name == "gemma4" and modality == "video":  # every frame of a video is an item
        return [
            list(range(start + frame * size // frames, start + (frame + 1) * size // frames))
            for start, size, frames in zip(
                starts[:-1], sizes, inputs["num_frames_per_video"].tolist(), strict=True
            )
            for frame in range(frames)
        ]
    if name == "molmo2":  # the whole image and its map of crops, or frames of 3 x 3
        parts = [16, 28] if modality == "image" else [9] * (sum(sizes) // 9)
        every = torch.tensor([0, *parts * (len(sizes) if modality == "image" else 1)])
        edges = every.cumsum(0).tolist()
        return [list(range(start, end)) for start, end in itertools.pairwise(edges)]
    if name in ("idefics3", "smolvlm"):  # tiles of 16 tokens, whatever the encoder put together
        return [list(range(start, start + 16)) for start in range(0, sum(sizes), 16)]
    return [
        list(range(start, start + size)) for start, size in zip(starts[:-1], sizes, strict=True)
    ]


def _next_image(start: int, height: int, width: int) -> list[list[int]]:
    """Rows of each crop of one LLaVA-NeXT image of 24-pixel crops and 4-pixel patches."""
    rows, columns = {(48, 36): (12, 12), (24, 48): (6, 12), (40, 48): (12, 12)}[height, width]
    top, left = {(48, 36): (0, 1), (24, 48): (0, 0), (40, 48): (1, 0)}[height, width]
    crops: list[list[int]] = [list(range(start, start + 36))]
    crops += [[] for _ in range((rows // 6) * (columns // 6))]
    place = start + 36
    for y in range(top, rows - top):
        for x in range(left, columns - left):
            crops[1 + (y // 6) * (columns // 6) + x // 6].append(place)
            place += 1
        place += 1  # the newline
    return crops


def encode(
    model: Any, inputs: dict[str, Any], modality: str
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Return all rows [R, D] of a modality, their number per encoder output, and deep features."""
    names = {
        "image": (
            *("pixel_values", "pixel_values_images"),
            *("image_sizes", "image_grid_thw", "target_sizes"),
            *("image_position_ids", "spatial_shapes", "pixel_attention_mask"),
            *("image_token_pooling", "image_grids", "image_grid_hw"),
        ),
        "video": (
            *("pixel_values_videos", "video_grid_thw", "target_sizes_videos"),
            *("video_position_ids", "num_frames_per_video"),
            *("video_token_pooling", "video_grids"),
        ),
    }[modality]
    arguments = {key: inputs[key] for key in names if key in inputs}
    if not any(key.startswith("pixel") for key in arguments):
        return torch.empty(0), [], []
    inner = getattr(model, "model", model)  # Llama 4 has none inside
    function = getattr(inner, f"get_{modality}_features", None)
    if function is None:  # PerceptionLM has one method for both
        arguments = {"pixel_values": arguments["pixel_values_videos"]}
        function = inner.get_image_features
    output = function(**arguments, return_dict=True)
    pooled = output.get("pooler_output")
    if pooled is None:  # Llama 4 projects in its forward
        pooled = model.multi_modal_projector(output.last_hidden_state)
    parts = [part.flatten(0, -2) for part in pooled]  # some keep frames apart
    deep = [torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", None) or []]
    return torch.cat(parts), [len(part) for part in parts], deep


def greedy(
    model: Any,
    name: str,
    inputs: dict[str, Any],
    kept: dict[str, list[list[int]]],
    positions: str,
    steps: int,
) -> list[list[int]]:
    """Splice the kept rows into each prompt by hand and decode greedily, token by token.

    Parameters
    ----------
    model
        The plain model.
    name
        Its model_type.
    inputs
        The batch, as its processor would return it.
    kept
        Per modality, for each item in prompt order, the kept indices within the item.
    positions
        ``"original"`` or ``"compact"``.
    steps
        How many tokens to decode.

    Returns
    -------
    list of list of int
        The new tokens of each prompt.
    """
    token_of = {"image": IMAGE, "video": VIDEO}
    stays, rows, deep = {}, {}, {}
    for modality in ("image", "video"):
        rows[modality], sizes, deep[modality] = encode(model, inputs, modality)
        gone: set[int] = set()
        if sizes:
            items = item_rows(name, inputs, modality, sizes)
            for item, chosen in zip(items, kept[modality], strict=True):
                gone |= set(item) - {item[index] for index in chosen}
        stays[modality] = [row not in gone for row in range(sum(sizes))]
    full_positions = _engine_positions(model, inputs)
    inner = getattr(model, "model", model)
    language_model = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    if name == "llama4":
        language_model = language_model.model
    used = {"image": 0, "video": 0}
    answers = []
    prompts = inputs["input_ids"]
    if name == "glm5_next":  # a call may have both
        prompts = prompts.masked_fill(inputs["mm_token_type_ids"] == 2, VIDEO)
    elif name in APART and inputs.get("pixel_values_videos") is not None:
        prompts = prompts.masked_fill(prompts == IMAGE, VIDEO)
    for sample, ids in enumerate(prompts.tolist()):
        embeds, where, visual, blocks = [], [], [], []
        ids_read: list[int] = []
        deep_rows: list[list[Tensor]] = []
        block = 0
        real = [column for column, one in enumerate(inputs["attention_mask"][sample]) if one]
        own_positions = full_positions[..., sample, real]
        own_ids = [ids[column] for column in real]
        for column, token in enumerate(own_ids):
            kind = next((key for key, value in token_of.items() if value == token), None)
            if kind is None:
                block += 1
                embeds.append(_word(model, token))
            else:
                row = used[kind]
                used[kind] += 1
                if not stays[kind][row]:
                    continue
                added = _word(model, IMAGE) if name == "molmo2" else 0
                embeds.append(rows[kind][row] + added)
                deep_rows.append([layer[row] for layer in deep[kind]])
            ids_read.append(PAD if kind else token)
            visual.append(kind is not None)
            seen = kind is not None or (name == "molmo2" and token in (START, END))
            blocks.append((0 if name == "molmo2" else block) if seen else -1)
            where.append(column)
        moved = own_positions.ndim == 2 and name != "minicpmv4_7"
        if moved and len(where) < len(real):
            own_positions = published_positions(own_ids, own_positions)
        compact = torch.arange(len(embeds)).expand(*full_positions.shape[:-2], -1)
        place = compact if positions == "compact" else own_positions[..., where]
        following = len(embeds) if positions == "compact" else int(place.max()) + 1
        hidden = torch.stack(embeds)
        answer: list[int] = []
        for _ in range(steps):
            extra: dict[str, Any] = {}
            if deep_rows and deep_rows[0]:
                extra["visual_pos_masks"] = torch.tensor([visual])
                extra["deepstack_visual_embeds"] = [
                    torch.stack(layer) for layer in zip(*deep_rows, strict=True)
                ]
            # Layers that keep a state read no more of a mask than which tokens are padding.
            stateful = name in STATEFUL
            ones = torch.ones(1, len(hidden), dtype=torch.long)
            extra["attention_mask"] = ones if stateful else _mask(name, blocks)
            if name == "gemma3n":  # likewise, for all that is no text
                read = torch.tensor(ids_read)[None]
                read = read.masked_fill(read >= language_model.config.vocab_size_per_layer_input, 0)
                extra["per_layer_inputs"] = language_model.get_per_layer_inputs(read)
            if name == "gemma4":
                # Layers have embeddings of their own for text, and that of padding for the rest.
                read = torch.tensor(ids_read)[None]
                words = model.get_input_embeddings()(read)
                extra["per_layer_inputs"] = language_model.get_per_layer_inputs(read, words)
            output = language_model(
                inputs_embeds=hidden[None],
                position_ids=place[..., None, :] if place.ndim > 1 else place[None],
                use_cache=False,
                **extra,
            )
            if hasattr(output, "logits"):  # Nemotron VL's has its head
                logits = output.logits[0, -1]
            else:
                logits = model.get_output_embeddings()(output.last_hidden_state[0, -1])
            logits[model.generation_config.suppress_tokens] = -torch.inf
            answer.append(int(logits.argmax()))
            if name == "ovis2":  # only a call with pixels looks marks up in another table
                embedded = model.get_input_embeddings()(torch.tensor([answer[-1]]))
            else:
                embedded = _word(model, answer[-1])[None]
            hidden = torch.cat([hidden, embedded])
            place = torch.cat([place, torch.full((*place.shape[:-1], 1), following)], dim=-1)
            following += 1
            visual.append(False)
            ids_read.append(answer[-1])
            blocks.append(-1)
        answers.append(answer)
    return answers


def _word(model: Any, token: int) -> Tensor:
    """Return the embedding of a token of text; Ovis2's marks are the last words of its table."""
    marks = list(getattr(model.config, "visual_indicator_token_ids", ()))
    if token in marks:
        mark: Tensor = model.model.visual_embeddings_table.weight[marks.index(token) - len(marks)]
        return mark
    if model.config.model_type == "gemma3n" and token >= model.model.embed_vision.vocab_offset:
        # Special tokens of images and sound have tables of their own.
        sound = token >= model.model.embed_audio.vocab_offset
        table = model.model.embed_audio if sound else model.model.embed_vision
        special: Tensor = table(input_ids=torch.tensor(token))
        return special
    embedded: Tensor = model.get_input_embeddings()(torch.tensor(token))
    return embedded


def published_positions(ids: list[int], positions: Tensor) -> Tensor:
    """Return [3, L] in which all that follows an item is behind it: max over all axes, plus one.

    Parameters
    ----------
    ids
        A prompt without padding.
    positions
        Some engine's, [3, L], of which only the steps inside an item are taken.
    """
    parts: list[Tensor] = []
    highest = -1
    for token, run in itertools.groupby(range(len(ids)), key=lambda column: ids[column]):
        own = list(run)
        steps = torch.arange(len(own)).expand(3, -1)
        if token in (IMAGE, VIDEO):
            steps = positions[:, own] - positions[:, own[:1]]
        parts.append(steps + highest + 1)
        highest = int(parts[-1].max())
    return torch.cat(parts, dim=1)


def _engine_positions(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the engine's positions of the unpruned prompt: [B, L], or [3, B, L] with M-RoPE."""
    mask = inputs["attention_mask"]
    if not hasattr(getattr(model, "model", model), "get_rope_index"):
        counted: Tensor = mask.cumsum(-1) - 1
        return counted
    names = (
        *("image_grid_thw", "video_grid_thw", "mm_token_type_ids"),
        *("target_sizes", "target_sizes_videos"),
    )
    known = {key: inputs[key] for key in names if key in inputs}
    positions: Tensor = model.model.get_rope_index(
        inputs["input_ids"], attention_mask=mask, **known
    )[0]
    return positions


def _mask(name: str, blocks: list[int]) -> Any:
    """Return a 4-D mask: causal, and both ways in blocks of some models, such as their images."""
    length = len(blocks)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    causal = allowed.clone()
    if name in ("gemma3", "gemma4", "molmo2"):
        block = torch.tensor(blocks)
        allowed |= (block[:, None] == block) & (block >= 0)
    four, one_way = (
        torch.zeros(length, length).masked_fill(~one, torch.finfo(torch.float32).min)[None, None]
        for one in (allowed, causal)
    )
    if name == "gemma4":  # layers that see everything do not see images both ways
        return {"full_attention": one_way, "sliding_attention": four}
    if name == "gemma3":
        # The sliding window of the tiny model is longer than any prompt here.
        return {"full_attention": four, "sliding_attention": four}
    return four
