"""A tiny Llama-3.2-Vision from a config, prompts for it, and what trimming should do, by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests.hf.models import BOS, EOS, PAD, pixels

tf: Any = transformers

IMAGE = 96
"""The image token: like the real one, just behind the vocabulary."""
TILES, PER_TILE = 3, 10
CROSS = (1, 3, 5)
"""The cross-attention layers."""


def tiny(seed: int = 0, attention: str = "sdpa") -> Any:
    """Return the model in float32 and eval mode, with every gate open."""
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "max_num_tiles": TILES,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]],
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
        },
        text_config={
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": list(CROSS),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        image_token_index=IMAGE,
    )
    torch.manual_seed(seed)
    model = tf.MllamaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(0.8)  # made as zeros: without this no image would be seen
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def prompt(samples: Sequence[str], *, side: str = "left", seed: int = 7) -> dict[str, Any]:
    """Return what the processor would for prompts such as ``"t2t"``.

    Parameters
    ----------
    samples
        One string per prompt: ``1`` to ``3`` an image of so many tiles, ``t`` three words.
    side
        Where shorter prompts are padded.
    seed
        Of words and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, tiles = [], []
    for sample in samples:
        row, own = ([BOS] if sample.startswith("t") else []), []
        for kind in sample:
            if kind == "t":
                row += torch.randint(3, 90, (3,), generator=generator).tolist()
            else:
                row.append(IMAGE)
                own.append(int(kind))
        rows.append(row)
        tiles.append(own)
    length, images = max(map(len, rows)), max(map(len, tiles))
    empty = [[PAD] * (length - len(row)) for row in rows]
    left = side == "left"
    ids = [gap + row if left else row + gap for gap, row in zip(empty, rows, strict=True)]
    valid = torch.tensor(ids) != PAD
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": valid.long()}
    if not images:
        return inputs
    token_masks = [get_cross_attention_token_mask(row, IMAGE) for row in ids]
    mask = convert_sparse_cross_attention_mask_to_dense(token_masks, tiles, TILES, length)
    # The first tile of a missing image is marked too, as the image processor does.
    aspect_mask = torch.zeros(len(rows), images, TILES, dtype=torch.long)
    aspect_mask[..., 0] = 1
    aspect_ids = torch.zeros(len(rows), images, dtype=torch.long)
    values = torch.zeros(len(rows), images, TILES, 3, 12, 12)
    for index, own in enumerate(tiles):
        for image, count in enumerate(own):
            aspect_mask[index, image, :count] = 1
            aspect_ids[index, image] = count
            noise = pixels(count, 3, 12, 12, seed=seed + 31 * index + 7 * image)
            values[index, image, :count] = noise
    return {
        **inputs,
        "pixel_values": values,
        "aspect_ratio_ids": aspect_ids,
        "aspect_ratio_mask": aspect_mask,
        "cross_attention_mask": torch.as_tensor(mask),
    }


def longer(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Return a prompt [B, L] with further tokens [B, n] behind it, as `generate` would go on."""
    new = ids.shape[1]
    mask = inputs["cross_attention_mask"]
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, new, -1, -1)], dim=1),
    }


# By hand ------------------------------------------------------------------------------------------


def _weights(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The whole map [B, H, S, N]."""
    repeats = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(repeats, dim=1).transpose(-1, -2) * scale
    return (logits if mask is None else logits + mask).softmax(dim=-1)


@contextmanager
def _attention(model: Any, function: Any) -> Iterator[None]:
    """Run the decoder with attention of one's own, (module, query, key, value, mask, scale)."""

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        weights = function(module, query, key, attention_mask, float(kwargs["scaling"]))
        repeats = query.shape[1] // value.shape[1]
        return (weights @ value.repeat_interleave(repeats, dim=1)).transpose(1, 2), None

    AttentionInterface.register("mllama_spy", spy)
    AttentionMaskInterface.register("mllama_spy", eager_mask)
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "mllama_spy"
    try:
        yield
    finally:
        config._attn_implementation = before


def chosen(
    model: Any, inputs: dict[str, Any], keep: float, queries: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Return what each row keeps, and its scores, from the first layer's whole map."""
    maps: list[Tensor] = []

    def watch(module: Any, query: Tensor, key: Tensor, mask: Any, scale: float) -> Tensor:
        weights = _weights(module, query, key, mask, scale)
        if module.layer_idx == CROSS[0]:
            maps.append(weights)
        return weights

    with _attention(model, watch), torch.no_grad():
        model(**inputs)
    (whole,) = maps
    rows, heads, length, total = whole.shape
    mask = inputs.get("cross_attention_mask")
    if mask is None:
        shape = (rows, length, *inputs["aspect_ratio_mask"].shape[1:])
        mask = torch.ones(shape, dtype=torch.long)
    mask, attended = mask[:, -length:], inputs["attention_mask"][:, -length:]
    kept, scores = [], []
    for row in range(rows):
        tiles = [divmod(token // PER_TILE, TILES) for token in range(total)]
        asks = [place for place in range(length) if attended[row, place] and mask[row, place].any()]
        counted = [
            token
            for token, (image, tile) in enumerate(tiles)
            if inputs["aspect_ratio_mask"][row, image, tile]
            and inputs["aspect_ratio_ids"][row, image]
            and any(mask[row, place, image, tile] for place in asks)
        ]
        if not counted:
            kept.append(list(range(total)))
            scores.append([0.0] * total)
            continue
        count = min(keep, len(counted))
        if isinstance(keep, float):
            count = max(1, math.floor(keep * len(counted) + 0.5))
        union: set[int] = set()
        best = [0.0] * total
        for head in range(heads):
            part = whole[row, head, asks]
            values = (part.sum(dim=0) if queries == "sum" else part.amax(dim=0)).tolist()
            ranked = sorted((-values[token], token) for token in counted)
            union |= {token for _, token in ranked[: int(count)]}
            best = [max(pair) for pair in zip(best, values, strict=True)]
        kept.append(sorted(union))
        scores.append([one if token in counted else 0.0 for token, one in enumerate(best)])
    return kept, scores


@contextmanager
def only(model: Any, kept: Sequence[Sequence[int]], first_layer: str) -> Iterator[None]:
    """Run the plain model with all tokens but let later layers see these columns only.

    Parameters
    ----------
    model
        It runs with its whole cache.
    kept
        Columns of each prompt; a call with more rows repeats each.
    first_layer
        ``"trimmed"`` lets the first layer see no more either.
    """
    trimmed = CROSS if first_layer == "trimmed" else CROSS[1:]

    def limited(module: Any, query: Tensor, key: Tensor, mask: Any, scale: float) -> Tensor:
        if module.layer_idx not in trimmed:
            return _weights(module, query, key, mask, scale)
        rows, heads, length, _ = query.shape
        result = query.new_zeros(rows, heads, length, key.shape[2])
        for row in range(rows):
            columns = list(kept[row * len(kept) // rows])
            for place in range(length):
                seen = columns
                if mask is not None:
                    seen = [one for one in columns if mask[row, 0, place, one] == 0] or columns
                asking = query[row : row + 1, :, place : place + 1]
                part = _weights(module, asking, key[row : row + 1, :, seen], None, scale)
                result[row][:, place][:, seen] = part[0, :, 0]
        return result

    def no_mlp(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, row = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"]
        if mask is None:
            return args, kwargs
        row = row.clone()
        for index in range(len(mask)):
            columns = list(kept[index * len(kept) // len(mask)])
            for place in range(mask.shape[2]):
                if not (mask[index, 0, place, columns] == 0).any():
                    row[index, 0, place] = 0
        return args, {**kwargs, "full_text_row_masked_out_mask": row}

    layers = model.model.language_model.layers
    with ExitStack() as hooks:
        for number in trimmed:
            hook = layers[number].register_forward_pre_hook(no_mlp, with_kwargs=True)
            hooks.callback(hook.remove)
        hooks.enter_context(_attention(model, limited))
        yield
