"""Proportional attention: log n on the keys of kept tokens, against a mask of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.core.test_representation import counted
from tests.hf.models import IMAGE, SLIDING, STATEFUL, TINY, checkpoint_gradients, mixing, prompt
from tokenprune.errors import ConfigError, PromptError, UnsupportedModelError
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.layout import decoder_of
from tokenprune_hf.shortened import Application

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAMES = [name for name in TINY if name not in (*SLIDING, *STATEFUL)]


def setting(name: str) -> tuple[Any, dict[str, Any]]:
    tiny = TINY[name]
    samples = ["tittvt", "vt"] if tiny.video else ["titit", "it"]
    return tiny.model(), prompt(tiny, mixing(name, samples))


def words(logits: Tensor) -> Tensor:
    """The words behind the last image or video."""
    return logits[:, -3:]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_adds_the_log_of_how_many_tokens_a_key_is_for(implementation: str) -> None:
    model = TINY["llava"].model()
    model.set_attn_implementation(implementation)
    inputs = prompt(TINY["llava"], ["titit"])
    (ids,) = inputs["input_ids"]
    columns = (ids == IMAGE).nonzero()[:, 0].split(36)
    with torch.no_grad():
        rows = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        with tokenprune_hf.prune(
            model, "feature-norm", 3, apply="mask", proportional_attention=True
        ) as pruning:
            found = model(**inputs).logits
        length = len(ids)
        bias = torch.full((length, length), -1e9).triu(1)
        for own, one, selection in zip(columns, rows, pruning.selections, strict=True):
            counts = counted(one, selection.kept.tolist())
            assert selection.represented is not None
            assert selection.represented.tolist() == counts
            assert sum(counts) == 36
            bias[:, own[~selection.mask]] = -1e9
            bias[:, own[selection.kept]] += torch.tensor(counts).log()
        expected = model(**{**inputs, "attention_mask": bias[None, None]}).logits
        plain = model(**inputs).logits
    torch.testing.assert_close(words(found), words(expected), rtol=1e-4, atol=1e-4)
    with tokenprune_hf.prune(model, "feature-norm", 3), torch.no_grad():
        uncounted = model(**inputs).logits
    assert not torch.allclose(words(found), words(uncounted), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", NAMES)
def test_dropping_and_hiding_count_alike(name: str) -> None:
    """Also in steps on the cache, in beams, and for a second question."""
    model, inputs = setting(name)
    ways: tuple[Application, ...] = ("drop", "mask")
    logits, answers = [], []
    for way in ways:
        with (
            torch.no_grad(),
            tokenprune_hf.prune(
                model, "feature-norm", 3, apply=way, proportional_attention=True
            ) as pruning,
        ):
            logits.append(words(model(**inputs).logits))
            beams = model.generate(**inputs, num_beams=3, **GREEDY)
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            talk = torch.cat([first.sequences, torch.tensor([[31, 32], [33, 34]])], dim=1)
            more = torch.ones(2, talk.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
            second = model.generate(
                input_ids=talk,
                attention_mask=torch.cat([inputs["attention_mask"], more], dim=1),
                **cache_argument(model, cache_of(first)),
                **GREEDY,
            )
            answers.append((beams.tolist(), second.tolist()))
        for one in pruning.selections:
            assert one.represented is not None
            assert int(one.represented.sum()) == one.total
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_steps_on_the_cache_count_as_the_whole_prompt_does(name: str) -> None:
    model, inputs = setting(name)
    with (
        torch.no_grad(),
        tokenprune_hf.prune(model, "divprune", 4, proportional_attention=True),
    ):
        output = model.generate(
            **inputs, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        length = inputs["input_ids"].shape[1]
        more = torch.ones(2, 3, dtype=torch.long)
        longer = {
            **inputs,
            "input_ids": output.sequences[:, : length + 3],
            "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1),
        }
        for types in ("mm_token_type_ids", "token_type_ids"):
            if types in inputs:
                longer[types] = torch.cat([inputs[types], 0 * more], dim=1)
        whole = model(**longer).logits[:, -4:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_with_everything_kept_nothing_changes(name: str) -> None:
    model, inputs = setting(name)
    with torch.no_grad():
        plain = model(**inputs).logits
        with tokenprune_hf.prune(model, "information", 1.0, proportional_attention=True):
            found = model(**inputs).logits
            text = model(inputs["input_ids"][:, -3:]).logits
        assert torch.equal(text, model(inputs["input_ids"][:, -3:]).logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], plain[real], rtol=1e-5, atol=1e-5)


def test_the_model_is_what_it_was_also_after_an_exception() -> None:
    model, inputs = setting("llava")
    config = decoder_of(model).config
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-10]}
    with tokenprune_hf.prune(model, "random", 3, proportional_attention=True):
        assert config._attn_implementation != "sdpa"
        with pytest.raises(PromptError, match="placeholders"):
            model(**short)
    assert config._attn_implementation == "sdpa"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_bfloat16_is_near_float32() -> None:
    model, inputs = setting("internvl")
    with torch.no_grad():
        with tokenprune_hf.prune(model, "uniform", 2, proportional_attention=True):
            exact = words(model(**inputs).logits)
        with tokenprune_hf.prune(model, "uniform", 2):
            uncounted = words(model(**inputs).logits)
        model.bfloat16()
        with tokenprune_hf.prune(model, "uniform", 2, proportional_attention=True):
            near = words(model(**inputs).logits).float()
    assert (near - exact).abs().mean() < 0.2 * (uncounted - exact).abs().mean()


def test_what_it_cannot_do_is_refused() -> None:
    model, _ = setting("gemma3")
    with pytest.raises(UnsupportedModelError, match=r"sliding window.*without proportional"):
        tokenprune_hf.prune(model, "random", 3, proportional_attention=True)
    tokenprune_hf.prune(model, "random", 3).remove()  # nothing was left behind
    with pytest.raises(ConfigError, match=r"proportional_attention='off'.*True or False"):
        tokenprune_hf.prune(model, "random", 3, proportional_attention="off")  # type: ignore[arg-type]
    model, inputs = setting("llava")
    with tokenprune_hf.prune(model, "random", 3, proportional_attention=True):
        model.set_attn_implementation("eager")
        with pytest.raises(
            PromptError, match=r"'eager' inside .* takes proportional attention off"
        ):
            model.generate(**inputs, max_new_tokens=1)
    checkpoint_gradients(model)
    model.train()
    with (
        tokenprune_hf.prune(model, "random", 3, proportional_attention=True),
        pytest.raises(PromptError, match=r"a second time .* without proportional attention"),
    ):
        model(**inputs)
    model, _ = setting("gemma3")
    with pytest.raises(ConfigError, match=r"proportional_attention=True has no meaning"):
        tokenprune_hf.prune(model, "trimmed-attention", 3, proportional_attention=True)
