"""Models under sparse masks, against the plain model with the mask written out pair by pair."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import tokenprune_hf
from tests.hf.models import IMAGE, TINY, prompt
from tokenprune.errors import InputFileError, PromptError, TokenPruneError, UnsupportedModelError
from tokenprune.masks import HeadCategories, Thresholds
from tokenprune.masks.patterns import LOCAL, Category
from tokenprune.masks.pooled import PooledBlocks
from tokenprune_hf.engine import cache_argument
from tokenprune_hf.layout import decoder_of, identity_of, image_spans_of

# Layers of Gemma 3n have keys of earlier ones, and those of Kimi-K2.5 keep latent states.
FAMILIES = [
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "llava", "gemma3"),
    *("idefics3", "mistral3", "cohere2_vision", "glm4v", "paddleocr_vl", "gemma3n", "kimi_k25"),
]
MIXED: tuple[tuple[Category, ...], ...] = (
    ("sink", "intra", "intra+sink", "dense"),
    ("intra", "intra", "sink", "intra+sink"),
)
SINKS = (0, 5, -1)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def heads_of(model: Any, categories: Sequence[Sequence[Category]]) -> HeadCategories:
    layers = len(decoder_of(model).layers)
    return HeadCategories(
        model=identity_of(model),
        categories=tuple(tuple(one) for one in categories),
        sinks=SINKS,
        thresholds=Thresholds((0.9,) * layers, 0.5, 0.5, 0.5),
        density=1.0,
        block=4,
        prompts=1,
    )


def setting(name: str, samples: Sequence[str] = ("titit", "it")) -> tuple[Any, dict[str, Any]]:
    tiny = TINY[name]
    return tiny.model(), prompt(tiny, list(samples))


def words(input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Say of each token which image it belongs to, -1 for text, -2 for padding: by its id."""
    result = []
    for ids, real in zip(input_ids.tolist(), mask.tolist(), strict=True):
        number, row, before = -1, [], False
        for token, kept in zip(ids, real, strict=True):
            number += token == IMAGE and not before
            before = token == IMAGE
            row.append(-2 if not kept else number if before else -1)
        result.append(row)
    return result


def by_words(
    owner: Sequence[int],
    category: Category,
    both_ways: bool,
    window: int | None,
    places_of_sinks: Sequence[int] = SINKS,
) -> Tensor:
    """Write a head's mask out pair by pair, from the table in `tokenprune.masks.patterns`."""
    length = len(owner)
    sinks = set()
    for image in set(owner) - {-1, -2}:
        places = [place for place in range(length) if owner[place] == image]
        sinks |= {places[sink] for sink in places_of_sinks if -len(places) <= sink < len(places)}
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            if owner[key] == -2 or owner[query] == -2:
                continue
            same = owner[query] == owner[key] and owner[query] >= 0
            if key > query and not (both_ways and same):
                continue
            if window is not None and query - key >= window:
                continue
            seen = category == "dense" or owner[query] < 0 or owner[key] < 0
            seen |= category in ("intra", "intra+sink") and same
            seen |= category in ("sink", "intra+sink") and key in sinks
            seen |= category == "sink" and query - key < LOCAL
            allowed[query, key] = seen
    return allowed


@contextmanager
def masked_by_hand(
    model: Any, inputs: dict[str, Any], categories: Sequence[Sequence[Category]]
) -> Iterator[None]:
    """Let the decoder read prompts with whole maps under masks of `by_words`, and then go on."""
    owners = words(inputs["input_ids"], inputs["attention_mask"])
    both_ways = "token_type_ids" in inputs and model.config.model_type == "gemma3"

    def allowed(layer: int, window: int | None) -> Tensor:
        return torch.stack(
            [
                torch.stack([by_words(owner, one, both_ways, window) for one in categories[layer]])
                for owner in owners
            ]
        )

    with attention_by_hand(model, allowed):
        yield


@contextmanager
def attention_by_hand(
    model: Any, allowed: Callable[[int, int | None], Tensor], logs: Tensor | None = None
) -> Iterator[None]:
    """Let the decoder read prompts with whole maps, and then go on as it does by itself.

    Parameters
    ----------
    model
        The whole model.
    allowed
        Of the number of a layer and its window, which pairs it lets through: bool [B, H, L, L].
    logs
        [L], what is added to the logits of each key.
    """
    decoder = decoder_of(model)
    number_of = {layer.self_attn: number for number, layer in enumerate(decoder.layers)}
    made = functools.cache(allowed)
    plain = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if query.shape[2] != key.shape[2]:
            return plain(module, query, key, value, attention_mask, **kwargs)
        window = getattr(module, "sliding_window", None)
        pairs = made(number_of[module], window)
        times = query.shape[1] // key.shape[1]
        wide = [one.repeat_interleave(times, dim=1) for one in (key, value)]
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        logits = query @ wide[0].transpose(-1, -2) * scale
        logits = (logits if logs is None else logits + logs).masked_fill(~pairs, -torch.inf)
        return (logits.softmax(dim=-1).nan_to_num() @ wide[1]).transpose(1, 2), None

    AttentionInterface.register("by-hand", attention)
    AttentionMaskInterface.register("by-hand", sdpa_mask)
    config = decoder.layers[0].self_attn.config
    before = config._attn_implementation
    config._attn_implementation = "by-hand"
    try:
        yield
    finally:
        config._attn_implementation = before


def assert_same(found: Tensor, expected: Tensor, inputs: dict[str, Any]) -> None:
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_dense_is_the_plain_model(name: str) -> None:
    model, inputs = setting(name)
    with torch.no_grad():
        plain = model(**inputs).logits
        answer = model.generate(**inputs, **GREEDY)
        dense: list[list[Category]] = [["dense"] * 4] * len(decoder_of(model).layers)
        with tokenprune_hf.sparse(model, heads_of(model, dense)) as sparse:
            assert_same(model(**inputs).logits, plain, inputs)
            assert sparse.density == 1.0
            assert torch.equal(model.generate(**inputs, **GREEDY), answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_those_of_the_table(name: str) -> None:
    model, inputs = setting(name)
    mixed = list(itertools.islice(itertools.cycle(MIXED), len(decoder_of(model).layers)))
    with torch.no_grad():
        plain = model(**inputs).logits
        with masked_by_hand(model, inputs, mixed):
            expected = model(**inputs).logits
            answer = model.generate(**inputs, **GREEDY)
        with tokenprune_hf.sparse(model, heads_of(model, mixed)) as sparse:
            assert_same(model(**inputs).logits, expected, inputs)
            assert 0 < sparse.density < 1
            assert [len(layout.images) for layout in sparse.layouts] == [
                len(one) for one in image_spans_of(model, inputs["input_ids"], inputs)
            ]
            assert torch.equal(model.generate(**inputs, **GREEDY), answer)
            beams = model.generate(**inputs, **GREEDY, num_beams=2)
        repeated = {
            name: value.repeat_interleave(2, dim=0)
            for name, value in inputs.items()
            if name in ("input_ids", "attention_mask", "token_type_ids")
        }
        with masked_by_hand(model, repeated, mixed):
            assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=2), beams)
    real = inputs["attention_mask"].bool()
    assert not torch.allclose(expected[real], plain[real], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("samples", [("it", "i"), ("tit", "ttt"), ("titit", "it", "t")])
def test_one_image_no_image_and_both(samples: tuple[str, ...]) -> None:
    model, inputs = setting("llava", samples)
    with torch.no_grad():
        with masked_by_hand(model, inputs, MIXED):
            expected = model(**inputs).logits
        with tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
            assert_same(model(**inputs).logits, expected, inputs)
    assert [len(one.images) for one in sparse.layouts] == [one.count("i") for one in samples]


def test_a_prompt_of_words_is_plain() -> None:
    model, inputs = setting("llava", ["tt", "t"])
    with torch.no_grad():
        plain = model(**inputs).logits
        with tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
            assert torch.equal(model(**inputs).logits, plain)
    assert sparse.layouts == []
    assert sparse.density == 1.0


def test_padding_on_the_right_and_single_prompts() -> None:
    model, inputs = setting("llava")
    pad = int((inputs["attention_mask"][1] == 0).sum())
    right = {**inputs}
    for name in ("input_ids", "attention_mask"):
        moved = inputs[name].clone()
        moved[1] = moved[1].roll(-pad)
        right[name] = moved
    with torch.no_grad(), tokenprune_hf.sparse(model, heads_of(model, MIXED)):
        left = model(**inputs).logits
        found = model(**right).logits
        alone = model(
            input_ids=inputs["input_ids"][1:, pad:], pixel_values=inputs["pixel_values"][2:]
        ).logits
    torch.testing.assert_close(found[0], left[0])
    torch.testing.assert_close(found[1, :-pad], left[1, pad:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0], left[1, pad:], rtol=1e-4, atol=1e-5)


def test_what_comes_after_the_prompt_attends_to_everything() -> None:
    """A second question on the cache: dense, over the keys that sparse attention left behind."""
    model, inputs = setting("llava")
    more = torch.tensor([[31, 32, 33], [34, 35, 36]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    found = []
    for within in (
        tokenprune_hf.sparse(model, heads_of(model, MIXED)),
        None,
    ):
        cache = DynamicCache(config=model.config.get_text_config())
        context = within or masked_by_hand(model, inputs, MIXED)
        with torch.no_grad(), context:
            model(**inputs, **cache_argument(model, cache))
            call = {"input_ids": more, "attention_mask": mask, **cache_argument(model, cache)}
            found.append(model(**call).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_images_that_touch() -> None:
    """They are told apart by their sizes, and refused where these are not known or do not fit."""
    for name in ("qwen2_vl", "llava"):
        model, inputs = setting(name, ["iit", "ti"])
        inner = inputs["input_ids"] == IMAGE
        # Without the delimiters that stand around an image.
        ids = torch.cat([inputs["input_ids"][:1, :1], inputs["input_ids"][:1][inner[:1]][None]], 1)
        arguments = {key: value for key, value in inputs.items() if "grid" in key}
        count = int(inner[0].sum())
        if name == "llava":
            arguments["pixel_values"] = inputs["pixel_values"][:2]
            sizes = [36, 36]
        else:
            arguments["image_grid_thw"] = inputs["image_grid_thw"][:2]
            sizes = (inputs["image_grid_thw"][:2].prod(dim=1) // 4).tolist()
        assert count == sum(sizes)
        (spans,) = image_spans_of(model, ids, arguments)
        assert [(one.start, one.stop) for one in spans] == [
            (1, 1 + sizes[0]),
            (1 + sizes[0], 1 + count),
        ]
        with pytest.raises(PromptError, match="neither truncated"):
            image_spans_of(model, ids[:, :-1], arguments)
    with pytest.raises(PromptError, match="not known where one ends"):
        image_spans_of(model, ids, {})


def test_bfloat16() -> None:
    model, inputs = setting("qwen2_5_vl")
    heads = heads_of(model, MIXED)
    model = model.to(torch.bfloat16)
    with torch.no_grad(), tokenprune_hf.sparse(model, heads):
        assert model(**inputs).logits.isfinite().all()


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = setting("llava")
    config = decoder_of(model).layers[0].self_attn.config
    vision = model.config.vision_config
    before = config._attn_implementation, vision._attn_implementation
    with torch.no_grad():
        plain = model(**inputs).logits
        with tokenprune_hf.sparse(model, heads_of(model, MIXED)):
            assert config._attn_implementation != before[0]
            assert vision._attn_implementation == before[1]
        with pytest.raises(TypeError), tokenprune_hf.sparse(model, heads_of(model, MIXED)):
            len(1)  # type: ignore[arg-type]
        assert (config._attn_implementation, vision._attn_implementation) == before
        assert torch.equal(model(**inputs).logits, plain)
        with tokenprune_hf.sparse(model, heads_of(model, MIXED)), pytest.raises(PromptError):
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
        assert torch.equal(model(**inputs).logits, plain)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_what_cannot_be(tmp_path: Path) -> None:
    model, inputs = setting("llava")
    heads = heads_of(model, MIXED)
    with tokenprune_hf.sparse(model, heads):
        for begin in (
            lambda: tokenprune_hf.sparse(model, heads),
            lambda: tokenprune_hf.prune(model, "random", 3),
        ):
            with pytest.raises(TokenPruneError, match=r"under Sparse already\. Leave that block"):
                begin()
        with pytest.raises(PromptError, match=r"attention_mask is .* no static cache"):
            model(**{**inputs, "attention_mask": inputs["attention_mask"][:, None, None] > 0})
        holes = inputs["attention_mask"].clone()
        holes[0, 5] = 0
        with pytest.raises(PromptError, match="of prompt 1 hides tokens between others"):
            model(**{**inputs, "attention_mask": holes})
    with (
        tokenprune_hf.prune(model, "random", 3),
        pytest.raises(TokenPruneError, match="under Pruning already"),
    ):
        tokenprune_hf.sparse(model, heads)
    with pytest.raises(UnsupportedModelError, match=r"not those of this .* its weights are others"):
        tokenprune_hf.sparse(TINY["llava"].model(seed=1), heads)
    other = replace(heads, model=replace(heads.model, key_heads=4))
    with pytest.raises(UnsupportedModelError, match="key_heads is 4, not 2"):
        tokenprune_hf.sparse(model, other)
    with pytest.raises(InputFileError, match="cannot be read as JSON"):
        tokenprune_hf.sparse(model, tmp_path / "none.json")
    config = decoder_of(model).layers[0].self_attn.config
    config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="'flex_attention' cannot be stood in for"):
        tokenprune_hf.sparse(model, heads)
    config._attn_implementation = "sdpa"
    heads.save(tmp_path / "heads.json")
    with tokenprune_hf.sparse(model, tmp_path / "heads.json") as sparse:
        assert sparse.masks == heads


def chosen_by_hand(query: Tensor, key: Tensor, owner: Sequence[int], keep: float) -> Tensor:
    """Return [H, L, L] of blocks of 4, chosen by averages; text sees all and is seen by all."""
    heads, length, size = query.shape
    blocks = [range(start, min(start + 4, length)) for start in range(0, length, 4)]
    allowed = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        of_key = head * len(key) // heads
        for row, queries in enumerate(blocks):
            mean = query[head, queries.start : queries.stop].mean(dim=0)
            scores = [
                float(mean @ key[of_key, one.start : one.stop].mean(dim=0)) / size**0.5
                for one in blocks[: row + 1]
            ]
            count = max(1, int(keep * (row + 1) + 0.5))
            best = sorted(range(row + 1), key=lambda number: -scores[number])[:count]
            for number in {*best, row}:
                for place in queries:
                    allowed[head, place, list(blocks[number])] = True
    for query_place in range(length):
        for key_place in range(length):
            if owner[query_place] < 0 or owner[key_place] < 0:
                allowed[:, query_place, key_place] = True
    return allowed & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_blocks_chosen_from_the_data(name: str) -> None:
    model, inputs = setting(name, ["titit"])
    decoder = decoder_of(model)
    (owner,) = words(inputs["input_ids"], inputs["attention_mask"])

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        allowed = chosen_by_hand(query[0], key[0], owner, 0.25)
        times = query.shape[1] // key.shape[1]
        wide = [one.repeat_interleave(times, dim=1) for one in (key, value)]
        logits = (query @ wide[0].transpose(-1, -2) * kwargs["scaling"]).masked_fill(
            ~allowed, -torch.inf
        )
        return (logits.softmax(dim=-1) @ wide[1]).transpose(1, 2), None

    AttentionInterface.register("blocks-by-hand", attention)
    AttentionMaskInterface.register("blocks-by-hand", sdpa_mask)
    config = decoder.layers[0].self_attn.config
    with torch.no_grad():
        plain = model(**inputs).logits
        config._attn_implementation = "blocks-by-hand"
        expected = model(**inputs).logits
        config._attn_implementation = "sdpa"
        with tokenprune_hf.sparse(
            model, PooledBlocks(keep=0.25, block=4, together=False)
        ) as sparse:
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
            assert 0 < sparse.density < 1
        with tokenprune_hf.sparse(model, PooledBlocks(keep=1.0, block=4)):
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-2)
