"""`generate` and forward calls in all the ways callers use them, on a model of either RoPE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import tokenprune_hf
from tests.hf.by_hand import greedy
from tests.hf.models import IMAGE, TINY, prompt
from tokenprune.config import Positions
from tokenprune.errors import PromptError, TokensError
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch
from tokenprune_hf.engine import cache_argument, cache_of

MODELS = ["llava", "qwen2_5_vl"]  # ordinary RoPE, and M-RoPE
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@dataclass(frozen=True)
class FirstTokens(Selector):
    """Keeps the first tokens, so that it is known which are dropped."""

    name: ClassVar[str] = "first"
    summary: ClassVar[str] = "the first tokens"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: TokenBatch) -> Tensor:
        return -torch.arange(tokens.total).float().expand(tokens.size, -1)


def setting(name: str, samples: list[str]) -> tuple[Any, dict[str, Any], int]:
    tiny = TINY[name]
    inputs = prompt(tiny, samples)
    return tiny.model(), inputs, inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_beams_and_samples_equal_those_of_repeated_prompts(name: str) -> None:
    """Each prompt's beams see its own images: as if that prompt were alone."""
    samples = ["titit", "it"]
    model, inputs, length = setting(name, samples)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with tokenprune_hf.prune(model, "feature-norm", 5):
        together = model.generate(**inputs, **options)
        assert together.shape[0] == 4
        _, second, _ = setting(name, ["it"])
        key = "pixel_values"
        if "image_grid_thw" in inputs:
            patches = inputs["image_grid_thw"].prod(dim=1)
            second[key] = inputs[key][int(patches[:2].sum()) :]
            second["image_grid_thw"] = inputs["image_grid_thw"][2:]
        else:
            second[key] = inputs[key][2:]
        second["input_ids"] = inputs["input_ids"][1:, inputs["attention_mask"][1].bool()]
        alone = model.generate(**second, **options)
        width = second["input_ids"].shape[1]
        assert together[2:, length:].tolist() == alone[:, width:].tolist()
        torch.manual_seed(0)
        sampled = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, length + 3)
    assert torch.equal(sampled[:, :length], inputs["input_ids"].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", MODELS)
def test_going_on_from_a_cache(name: str, positions: Positions) -> None:
    """A second question on the first one's cache equals the whole conversation at once."""
    samples = ["titt", "tit"]
    model, inputs, length = setting(name, samples)
    question = torch.tensor([[31, 32, 33], [34, 35, 36]])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5, positions) as pruning:
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        kept = {"image": [one.kept.tolist() for one in pruning.selections], "video": []}
        talk = torch.cat([first.sequences, question], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, talk.shape[1] - length)], dim=1)
        second = model.generate(
            input_ids=talk,
            attention_mask=mask.long(),
            **cache_argument(model, cache_of(first)),
            **GREEDY,
        )
        assert torch.equal(second[:, : talk.shape[1]], talk)
        whole = {**inputs, "input_ids": talk, "attention_mask": mask.long()}
        whole.pop("mm_token_type_ids", None)
        if "image_grid_thw" in inputs:
            whole["mm_token_type_ids"] = (talk == IMAGE).long()
        at_once = model.generate(**whole, **GREEDY)
    expected = greedy(model, name, whole, kept, positions, steps=5)
    assert at_once[:, talk.shape[1] :].tolist() == expected
    assert second[:, talk.shape[1] :].tolist() == expected


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoding_loop_of_ones_own(name: str, positions: Positions) -> None:
    """Forward calls with a cache, with or without a mask, continue as `generate` does."""
    model, inputs, length = setting(name, ["titt", "tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5, positions):
        expected = model.generate(**inputs, **GREEDY)[:, length:]
        output = model(**inputs)
        mask = inputs["attention_mask"]
        answer: list[Tensor] = []
        for step in range(5):
            logits = output.logits[:, -1]
            logits[:, model.generation_config.suppress_tokens] = -torch.inf
            answer.append(logits.argmax(dim=-1))
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = model(
                input_ids=answer[-1][:, None],
                **cache_argument(model, cache_of(output)),
                **({"attention_mask": mask} if step % 2 else {}),
            )
    assert torch.stack(answer, dim=1).tolist() == expected.tolist()


def test_forward_without_cache_sees_the_whole_prompt() -> None:
    """Positions with gaps, no mask and no cache: transformers takes that for packed prompts."""
    model, inputs, _ = setting("llava", ["tit"])
    del inputs["attention_mask"]
    with torch.no_grad(), tokenprune_hf.prune(model, "random", 9):
        cached = model(**inputs).logits
        uncached = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(cached, uncached)


def test_logits_to_keep_labels_and_positional_arguments() -> None:
    model, inputs, length = setting("llava", ["titt", "tit"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        whole = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=2)
        torch.testing.assert_close(last.logits, whole.logits[:, -2:])
        chosen = model(**inputs, logits_to_keep=torch.tensor([length - 1]))
        torch.testing.assert_close(chosen.logits, whole.logits[:, -1:])
        with pytest.raises(PromptError, match="logits_to_keep=20"):
            model(**inputs, logits_to_keep=20)
        named = dict(inputs)
        ids, values = named.pop("input_ids"), named.pop("pixel_values")
        torch.testing.assert_close(model(ids, values, **named).logits, whole.logits)
    # The loss of the tokens that are left, by hand: next-token cross entropy over text.
    short = whole.logits.shape[1]
    text = torch.full((2, short), -100)
    for row in range(2):
        real = labels[row, inputs["attention_mask"][row].bool()]
        images = inputs["input_ids"][row, inputs["attention_mask"][row].bool()] == IMAGE
        first = int(images.nonzero()[0])
        kept = torch.cat([real[:first], torch.full((5,), -100), real[~images][first:]])
        text[row, short - len(kept) :] = kept
    expected = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()
    )
    torch.testing.assert_close(whole.loss, expected)


def test_lengths_count_the_callers_prompt() -> None:
    model, inputs, length = setting("llava", ["tit"])
    with tokenprune_hf.prune(model, "feature-norm", 3):
        assert model.generate(**inputs, max_length=length + 4).shape[1] == length + 4
        config = model.generation_config.to_dict() | {"max_length": length + 2}
        passed = type(model.generation_config).from_dict(config)
        output = model.generate(**inputs, generation_config=passed)
        assert output.shape[1] == length + 2
        assert passed.max_length == length + 2
        # Errors count it too: the short prompt would have room.
        with pytest.raises(PromptError, match=f"has {length} tokens and max_length={length} "):
            model.generate(**inputs, max_length=length)
        with pytest.raises(PromptError, match=f"min_length={length + 3} is above max_length"):
            model.generate(**inputs, max_length=length + 2, min_length=length + 3)


def test_text_prompts_mixed_prompts_and_prompts_without_words() -> None:
    model, mixed, length = setting("llava", ["tt", "tit", "i"])
    text = mixed["input_ids"][:1, mixed["attention_mask"][0].bool()]
    plain = model.generate(text, **GREEDY)
    with tokenprune_hf.prune(model, "feature-norm", 3) as pruning:
        assert torch.equal(model.generate(text, **GREEDY), plain)
        assert pruning.selections == []
        answers = model.generate(**mixed, **GREEDY)[:, length:]
        assert len(pruning.selections) == 2
    assert answers[0].tolist() == plain[0, text.shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_ends_with_a_dropped_token(name: str, use_cache: bool) -> None:
    """What follows is counted from the full prompt, though its last token is gone."""
    model, inputs, _ = setting(name, ["ti"])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = inputs[key][:, :-1]  # without the token that closes the image
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), tokenprune_hf.prune(model, FirstTokens(), 5):
        output = model.generate(**inputs, **GREEDY, use_cache=use_cache)[:, length:]
        step = model(**inputs)
        logits = step.logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        assert logits.argmax(dim=-1).tolist() == output[:, 0].tolist()
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    kept = torch.tensor([*range(length)])[inputs["input_ids"][0] != IMAGE]
    image = (inputs["input_ids"][0] == IMAGE).nonzero()[:5, 0]
    columns = torch.cat([kept, image])
    rows = model.get_image_features(
        **{k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    ).pooler_output[0][:5]
    embeds = torch.cat([model.get_input_embeddings()(inputs["input_ids"][0, kept]), rows])
    place = positions[..., columns]
    following = positions[..., -1:] + 1
    if positions.ndim == 3:  # behind the whole image, on every axis
        following[1:] = positions[1:].max() + 1
    for token in output[0]:
        place_now = place[1:] if place.ndim == 3 else place
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=place_now,
            attention_mask=torch.zeros(1, 1, len(embeds), len(embeds)).masked_fill(
                ~torch.ones(len(embeds), len(embeds), dtype=torch.bool).tril(), -1e30
            ),
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[0, -1])
        logits[model.generation_config.suppress_tokens] = -torch.inf
        assert int(logits.argmax()) == int(token)
        embeds = torch.cat([embeds, model.get_input_embeddings()(token[None])])
        place = torch.cat([place, following], dim=-1)
        following = following + 1


def test_prompt_lookup_decoding_equals_greedy() -> None:
    model, inputs, _ = setting("llava", ["tittt"])
    with tokenprune_hf.prune(model, "feature-norm", 3):
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_a_streamer_is_given_the_callers_prompt_and_every_token() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.chunks: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.chunks.append(value)

        def end(self) -> None:
            self.chunks.append(torch.empty(0, dtype=torch.long))

    model, inputs, _ = setting("llava", ["tit"])
    streamer = Collect()
    with tokenprune_hf.prune(model, "feature-norm", 3):
        output = model.generate(**inputs, **GREEDY, streamer=streamer)
    streamed = torch.cat([chunk.flatten() for chunk in streamer.chunks])
    assert streamed.tolist() == output[0].tolist()


def test_encoding_once_equals_encoding_each_time() -> None:
    model, inputs, length = setting("internvl", ["tit", "it"])
    encoded = tokenprune_hf.encode(model, **inputs)
    text = {key: value for key, value in inputs.items() if key != "pixel_values"}
    for method in ("cls-attention", "zeroth-order", "divprune", "uniform"):
        with tokenprune_hf.prune(model, method, 4):
            expected = model.generate(**inputs, **GREEDY)
            assert torch.equal(model.generate(**text, encoded=encoded, **GREEDY), expected)
            # the second image twice, the first once
            again = encoded.take([1, 1, 0])
            swapped = {key: value[[1, 1, 0]] for key, value in text.items()}
            output = model.generate(**swapped, encoded=again, **GREEDY)
            assert output[:, length:].tolist() == expected[[1, 1, 0], length:].tolist()


def test_scores_of_another_budget_are_taken_over_in_prompt_order() -> None:
    model, inputs, _ = setting("qwen2_5_vl", ["tiit", "it"])
    with tokenprune_hf.prune(model, "flexselect", 3, layer=1) as pruning:
        model.generate(**inputs, **GREEDY)
        known = pruning.selections
    with tokenprune_hf.prune(model, "flexselect", 5, layer=1) as pruning:
        expected = model.generate(**inputs, **GREEDY)
        selections = pruning.selections
        assert torch.equal(model.generate(**inputs, **GREEDY, known=known), expected)
        for one, other in zip(pruning.selections, selections, strict=True):
            assert one.kept.tolist() == other.kept.tolist()
        # Other scores, another choice: they are used and not computed again.
        upside_down = [replace(one, scores=-one.scores) for one in known if one.scores is not None]
        model.generate(**inputs, **GREEDY, known=upside_down)
        assert pruning.selections[0].kept.tolist() != selections[0].kept.tolist()
        with pytest.raises(TokensError, match="known holds selections of"):
            model.generate(**inputs, **GREEDY, known=known[:2])


def test_half_precision_keeps_scores_in_float32() -> None:
    model, inputs, length = setting("internvl", ["tit"])
    model.to(torch.bfloat16)
    with torch.inference_mode(), tokenprune_hf.prune(model, "zeroth-order", 4) as pruning:
        output = model.generate(**inputs, **GREEDY)
    assert output.shape[1] == length + 5
    assert pruning.selections[0].scores is not None
    assert pruning.selections[0].scores.dtype == torch.float32


def test_what_cannot_be_pruned_is_refused_with_a_reason() -> None:
    model, inputs, _ = setting("llava", ["tit"])
    with tokenprune_hf.prune(model, "feature-norm", 3):
        without = {key: value for key, value in inputs.items() if key != "pixel_values"}
        cut = {**inputs, "input_ids": inputs["input_ids"][:, :-10]}
        cut["attention_mask"] = inputs["attention_mask"][:, :-10]
        with pytest.raises(PromptError, match="placeholders and its images make 36 tokens"):
            model.generate(**cut)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(PromptError, match="pass input_ids"):
            model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        features = model.get_image_features(inputs["pixel_values"], return_dict=True)
        with pytest.raises(PromptError, match="mm_encoder_outputs cannot be pruned"):
            model(**without, mm_encoder_outputs={"image": features})
        with pytest.raises(PromptError, match="assistant_model"):
            model.generate(**inputs, assistant_model=model)
        filled = DynamicCache()
        model(input_ids=torch.tensor([[5, 6]]), **cache_argument(model, filled))
        with pytest.raises(PromptError, match="cache that is already filled"):
            model.generate(**inputs, **cache_argument(model, filled))
        padded = torch.nn.functional.pad(inputs["input_ids"], (2, 0))
        with pytest.raises(PromptError, match="attention_mask"):
            model.generate(input_ids=padded, pixel_values=inputs["pixel_values"])
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        other = first.sequences.clone()
        other[0, 1] += 1
        with pytest.raises(PromptError, match="filled by another prompt"):
            model.generate(input_ids=other, **cache_argument(model, cache_of(first)))
