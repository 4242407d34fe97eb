"""MDI and AEI equal what full attention maps of eager attention give, pruned and unpruned."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tokenprune_hf
from tests.hf.models import EOS, IMAGE, PAD, TINY, VIDEO, prompt
from tests.hf.test_lifecycle import state
from tokenprune.errors import ConfigError, PromptError, TokenPruneError, UnsupportedModelError
from tokenprune_eval.dominance import Dominance, TextTokens, depth_layers, measure_dominance
from tokenprune_hf.engine import cache_argument, cache_of

Sums = list[list[tuple[float, float, int, int, int]]]
"""[layer][row]: A_T, A_O, |T|, |O|, generated tokens."""


def tiny_model(name: str) -> Any:
    """Return a tiny model that never says padding, which would end an answer."""
    model = TINY[name].model()
    model.generation_config.suppress_tokens += [PAD]
    return model


def short_rows(
    inputs: dict[str, Any], name: str, kept: list[list[int]] | None
) -> tuple[list[list[int]], int]:
    """Return each row's tokens without padding and dropped placeholders, and their padded length.

    `kept` names, image by image, which placeholders stay; None for all.
    """
    images = iter(kept or [])
    rows = []
    for ids, mask in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        row, place = [], 0
        staying: list[int] = []
        for column, (token, real) in enumerate(zip(ids, mask, strict=True)):
            if not real:
                continue
            if token == IMAGE and kept is not None:
                if ids[column - 1] != IMAGE:
                    staying, place = next(images), 0
                place += 1
                if place - 1 not in staying:
                    continue
            row.append(token)
        rows.append(row)
    return rows, max(map(len, rows))


def by_hand(
    model: Any,
    inputs: dict[str, Any],
    rows: list[list[int]],
    length: int,
    text: TextTokens,
    **k: Any,
) -> Sums:
    """Sum up the maps that eager attention puts out."""
    model.set_attn_implementation("eager")
    output = model.generate(
        **inputs, **k, output_attentions=True, return_dict_in_generate=True, do_sample=False
    )
    result: Sums = []
    for layer in range(len(output.attentions[0])):
        result.append([])
        for index, row in enumerate(rows):
            first = length - len(row)
            visual = [first + at for at, token in enumerate(row) if token in (IMAGE, VIDEO)]
            words = [first + at for at in range(len(row)) if first + at not in visual]
            if text == "question":
                words = [at for at in words if at > max(visual)]
            to_text = to_visual = 0.0
            for step in output.attentions[1:]:
                heads = step[layer][index, :, 0].double()
                assert heads[:, :first].sum() == 0
                to_text += float(heads[:, words].sum(dim=-1).mean())
                to_visual += float(heads[:, visual].sum(dim=-1).mean())
            steps = len(output.attentions) - 1
            result[-1].append((to_text, to_visual, len(words), len(visual), steps))
    model.set_attn_implementation("sdpa")
    return result


def measured(dominance: Dominance) -> Sums:
    prompts = dominance.result.prompts
    return [
        [
            (
                prompt.layers[layer].text_attention,
                prompt.layers[layer].visual_attention,
                prompt.layers[layer].text_tokens,
                prompt.layers[layer].visual_tokens,
                prompt.layers[layer].queries,
            )
            for prompt in prompts
        ]
        for layer in prompts[0].layers
    ]


def assert_close(left: Sums, right: Sums) -> None:
    torch.testing.assert_close(
        torch.tensor(left, dtype=torch.float64),
        torch.tensor(right, dtype=torch.float64),
        rtol=1e-4,
        atol=1e-6,
    )


UNREAD = (
    "gemma3",
    "gemma4",
    "molmo2",
    "kimi_k25",
    "aya_vision",
    "cohere2_vision",
    "llama4",
    "gemma3n",
    "glm5_next",
    "nemotron_h_omni",
    "minicpmv4_7",
)
"""Those that see images both ways, or whose layers are not read: with queries and keys behind a
bottleneck (MLA), sliding windows, chunks, AltUp, a state, or positions on a canvas."""


@pytest.mark.parametrize("text", ["all", "question"])
@pytest.mark.parametrize("name", [name for name in TINY if name not in UNREAD])
def test_equals_the_full_attention_maps(name: str, text: TextTokens) -> None:
    model, inputs = tiny_model(name), prompt(TINY[name], ["tit", "titt"])
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    with measure_dominance(model, text=text) as dominance:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    rows, length = short_rows(inputs, name, None)
    assert inputs["attention_mask"].min() == 0
    assert_close(measured(dominance), by_hand(model, inputs, rows, length, text, max_new_tokens=5))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("outer", ["pruning", "measurement"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_equals_the_full_attention_maps_of_a_pruned_prompt(
    name: str, outer: str, positions: Any
) -> None:
    model, inputs = tiny_model(name), prompt(TINY[name], ["tit", "titt"])

    def pruned() -> tokenprune_hf.Pruning:
        return tokenprune_hf.prune(model, "zeroth-order", 5, positions)

    dominance = measure_dominance(model)
    if outer == "pruning":
        with pruned() as pruning, dominance:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
    else:
        with dominance, pruned() as pruning:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
    kept = [selection.kept.tolist() for selection in pruning.selections]
    assert [len(one) for one in kept] == [5, 5]
    rows, length = short_rows(inputs, name, kept)
    with pruned():
        expected = by_hand(model, inputs, rows, length, "all", max_new_tokens=4)
    assert {row[3] for layer in expected for row in layer} == {5}
    assert_close(measured(dominance), expected)


def test_a_video_pruned_by_a_method_that_runs_the_decoder_itself() -> None:
    model, inputs = tiny_model("qwen2_5_vl"), prompt(TINY["qwen2_5_vl"], ["tvt"])
    with tokenprune_hf.prune(model, "flexselect", 6, layer=1), measure_dominance(model) as one:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    tokens = int((inputs["input_ids"] == VIDEO).sum())
    layer = one.result.prompts[0].layers[1]
    words = inputs["input_ids"].numel() - tokens
    assert (layer.visual_tokens, layer.text_tokens, layer.queries) == (6, words, 2)
    assert 0 < layer.text_attention + layer.visual_attention < 2


def test_forward_calls_are_measured_like_generate() -> None:
    model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit", "titt"])
    with measure_dominance(model) as generated:
        sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    length = inputs["input_ids"].shape[1]
    for method in (None, "uniform"):
        pruned = None if method is None else tokenprune_hf.apply(model, method, 36)
        with measure_dominance(model) as called, torch.no_grad():
            mask = inputs["attention_mask"]
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            cache = cache_of(model(**inputs, position_ids=places))
            for column in range(length, length + 3):
                mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
                places = mask.cumsum(dim=1)[:, -1:] - 1
                model(
                    input_ids=sequences[:, column : column + 1],
                    attention_mask=mask,
                    position_ids=places,
                    **cache_argument(model, cache),
                )
        if pruned is not None:
            pruned.remove()
        assert_close(measured(called), measured(generated))


def test_a_row_counts_until_its_answer_ends() -> None:
    model, inputs = tiny_model("internvl"), prompt(TINY["internvl"], ["tit", "titt"])
    answers = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:].tolist()
    # A token that ends the first answer early and the second later or never.
    ends, place = next(
        (token, at)
        for at, token in enumerate(answers[0])
        if at >= 2 and token not in answers[0][:at] and token not in answers[1][: at + 2]
    )
    model.generation_config.eos_token_id = [EOS, ends]
    with measure_dominance(model) as together:
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with measure_dominance(model) as alone:
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            single = {key: inputs[key][row : row + 1] for key in ("input_ids", "attention_mask")}
            single = {key: value[:, real] for key, value in single.items()}
            single["pixel_values"] = inputs["pixel_values"][row : row + 1]
            model.generate(**single, max_new_tokens=8, do_sample=False)
    assert together.result.prompts[0].queries == place
    assert together.result.prompts[1].queries > place
    assert_close(measured(together), measured(alone))


def test_uniform_attention_gives_ones() -> None:
    model, inputs = tiny_model("qwen2_5_vl"), prompt(TINY["qwen2_5_vl"], ["tit", "titt"])
    for layer in model.model.language_model.layers:
        nn.init.zeros_(layer.self_attn.q_proj.weight)
        nn.init.zeros_(layer.self_attn.q_proj.bias)
    with measure_dominance(model, text="question") as dominance:
        model.generate(**inputs, max_new_tokens=5)
    indices = dominance.result.mean("late")
    assert [indices.mdi, indices.aei_text, indices.aei_visual] == pytest.approx([1, 1, 1])


def test_the_indices_follow_from_the_sums() -> None:
    model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit", "titt"])
    with measure_dominance(model) as dominance:
        model.generate(**inputs, max_new_tokens=5)
    result = dominance.result
    for one in result.prompts:
        for layer in one.layers.values():
            text, visual = layer.text_attention, layer.visual_attention
            per_token = (text / layer.text_tokens) / (visual / layer.visual_tokens)
            assert layer.indices.mdi == pytest.approx(per_token)
            of_text = layer.text_tokens / (layer.text_tokens + layer.visual_tokens)
            # Shares of the attention, put together again, are the whole.
            whole = layer.indices.aei_text * of_text + layer.indices.aei_visual * (1 - of_text)
            assert whole == pytest.approx(1)
            assert layer.indices.aei_text == pytest.approx(text / (text + visual) / of_text)
    each = [one.layers[1].indices.mdi for one in result.prompts]
    assert result.layers[1].mdi == pytest.approx(sum(each) / 2)
    both = [result.layers[layer].mdi for layer in (0, 1)]
    for part in ("early", "middle", "late"):
        assert result.mean(part).mdi == pytest.approx(sum(both) / 2)
    assert result.mean("late").mdi == pytest.approx(
        sum(one.mean("late").mdi for one in result.prompts) / 2
    )


def test_layers_of_a_decoder() -> None:
    assert depth_layers(32) == {"early": (0, 1), "middle": (15, 16), "late": (30, 31)}
    assert depth_layers(5) == {"early": (0, 1), "middle": (1, 2), "late": (3, 4)}
    assert depth_layers(1) == {"early": (0,), "middle": (0,), "late": (0,)}


def test_the_layers_asked_for() -> None:
    model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit"])
    with measure_dominance(model) as full:
        model.generate(**inputs, max_new_tokens=3)
    with measure_dominance(model, layers=[1]) as one:
        model.generate(**inputs, max_new_tokens=3)
    assert list(one.result.layers) == [1]
    assert one.result.layers[1] == full.result.layers[1]
    with pytest.raises(ConfigError, match=r"\[0\] were not measured"):
        one.result.mean("late")
    with pytest.raises(ConfigError, match="Did you mean 'late'"):
        full.result.mean("lat")  # type: ignore[arg-type]


def test_answers_of_one_token() -> None:
    model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit"])
    with measure_dominance(model) as dominance:
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(PromptError, match="at least 2 tokens"):
        _ = dominance.result
    with dominance:
        model.generate(**inputs, max_new_tokens=3)
    result = dominance.result
    assert [one.queries for one in result.prompts] == [0, 2]
    assert math.isnan(result.prompts[0].layers[0].indices.mdi)
    assert result.measured == 1
    assert result.layers[0] == result.prompts[1].layers[0].indices


class TestTheModel:
    """Nothing stays on it, and what it says is the same."""

    names: ClassVar[list[str]] = ["llava", "internvl", "qwen2_5_vl", "idefics3"]

    @pytest.mark.parametrize("name", names)
    def test_is_what_it_was(self, name: str) -> None:
        model, inputs = tiny_model(name), prompt(TINY[name], ["tit"])
        said: Tensor = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        before, deltas = state(model), getattr(model.model, "rope_deltas", None)
        with measure_dominance(model) as dominance:
            assert state(model) != before
            with pytest.raises(TokenPruneError, match="running already"), dominance:
                pass
            again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(said, again)
        if deltas is not None:
            assert torch.equal(model.model.rope_deltas, deltas)
            model.model.rope_deltas = deltas  # the model itself writes it anew in each call
        assert state(model) == before
        with pytest.raises(ZeroDivisionError), measure_dominance(model):
            raise ZeroDivisionError
        assert state(model) == before

    def test_an_exception_inside_a_call(self) -> None:
        model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit"])
        model.generate(**inputs, max_new_tokens=2)
        before = state(model)
        decoder = model.model.language_model

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        with measure_dominance(model) as dominance:
            failing = decoder.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model.generate(**inputs, max_new_tokens=3)
            failing.remove()
            # No longer a step of the failed call, which would have to have a cache.
            decoder(input_ids=inputs["input_ids"][:, :1], use_cache=False)
            model.generate(**inputs, max_new_tokens=3)
        assert state(model) == before
        assert [one.queries for one in dominance.result.prompts] == [0, 2]


def test_wrong_arguments() -> None:
    model = tiny_model("llava")
    before = state(model)
    with pytest.raises(ConfigError, match="Did you mean 'question'"):
        measure_dominance(model, text="questions")  # type: ignore[arg-type]
    for layers in ([2], [-1], [], [True]):
        with pytest.raises(ConfigError, match="0 to 1"):
            measure_dominance(model, layers=layers)
    with pytest.raises(UnsupportedModelError, match="no vision-language model"):
        measure_dominance(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="see each other in both"):
        measure_dominance(TINY["gemma3"].model())
    model.model.language_model.layers[1].self_attn.sliding_window = 8
    with pytest.raises(UnsupportedModelError, match="last 8 tokens"):
        measure_dominance(model)
    assert measure_dominance(model, layers=[0])
    del model.model.language_model.layers[1].self_attn.sliding_window
    assert state(model) == before


def test_calls_that_cannot_be_measured() -> None:
    model, inputs = tiny_model("llava"), prompt(TINY["llava"], ["tit"])
    ids = inputs["input_ids"]
    with torch.no_grad():
        filled = cache_of(model(**inputs))
    with measure_dominance(model), torch.no_grad():
        with pytest.raises(PromptError, match="outside the block"):
            model(input_ids=ids[:, :1], **cache_argument(model, filled))
        with pytest.raises(PromptError, match="no visual token"):
            model.generate(input_ids=ids[:, :2], max_new_tokens=3)
        with pytest.raises(PromptError, match="inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(PromptError, match="use_cache=False"):
            model(**inputs, use_cache=False)
        cache = cache_of(model(**inputs))
        with pytest.raises(PromptError, match="next turn"):
            model(input_ids=ids[:, :2], **cache_argument(model, cache))
        with pytest.raises(PromptError, match="static cache"):
            model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
    with measure_dominance(model, text="question"), torch.no_grad():
        behind = int((ids == IMAGE).nonzero()[-1, 1]) + 1
        short = {**inputs, "input_ids": ids[:, :behind]}
        short["attention_mask"] = inputs["attention_mask"][:, :behind]
        with pytest.raises(PromptError, match="hold no text"):
            model(**short)


def test_tokens_that_leave_inside_the_language_model_are_refused() -> None:
    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    refused = pytest.raises(PromptError, match="'fastv' tokens leave inside the language model")
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", 4, layer=1):
        with measure_dominance(model), refused:
            model(**inputs)
        model(**inputs)  # measured no more
