"""Trimmed cross-attention of Llama-3.2-Vision against whole maps and the plain model."""

from __future__ import annotations

import copy
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

import tokenprune_hf
from tests.hf.mllamas import CROSS, PER_TILE, TILES, chosen, longer, only, prompt, tf, tiny
from tests.hf.models import TINY, checkpoint_gradients
from tests.hf.test_lifecycle import state
from tokenprune import PruningConfig
from tokenprune.budget import tokens_kept
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    OptionError,
    PromptError,
    TokenPruneError,
    TokensError,
    UnsupportedModelError,
)
from tokenprune_hf.attached import attached
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.mllama.trimmed import TrimmedAttention

# transformers itself calls the layers of its vision encoder by a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`hidden_state` is deprecated.*MllamaVisionEncoderLayer:FutureWarning"
)

BOTH = pytest.mark.parametrize(
    ("queries", "first_layer"),
    [("sum", "full"), ("max", "full"), ("sum", "trimmed"), ("max", "trimmed")],
)


def generate(model: Any, inputs: dict[str, Any], new: int = 6, **kwargs: Any) -> Tensor:
    output = model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **kwargs})
    new_tokens: Tensor = output[:, inputs["input_ids"].shape[1] :]
    return new_tokens


def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs, **kwargs).logits
    return result


def kept_of(trimming: TrimmedAttention) -> list[list[int]]:
    return [one.kept.tolist() for one in trimming.selections]


def row_of(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One prompt of a batch, without its padding."""
    one = {name: value[row : row + 1] for name, value in inputs.items()}
    valid = one["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        one[name] = one[name][:, valid]
    return one


def cross_bytes(cache: Any) -> int:
    parts = [part for number in CROSS for part in cache.layers[number].__dict__.values()]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def test_the_tiny_model_sees_its_images() -> None:
    model = tiny()
    assert not torch.allclose(
        logits(model, prompt(["t2t"])),
        logits(model, {**prompt(["t2t"]), "pixel_values": prompt(["t2t"])["pixel_values"] * 0}),
        atol=0.1,
    )


# The numbers --------------------------------------------------------------------------------------


@BOTH
def test_keeping_all_changes_nothing(queries: Any, first_layer: Any) -> None:
    model, inputs = tiny(), prompt(["t2tt", "t1t"])
    whole, said = logits(model, inputs), generate(model, inputs)
    with TrimmedAttention(model, 1.0, queries, first_layer) as trimming:
        assert torch.equal(logits(model, inputs), whole)
        assert torch.equal(generate(model, inputs), said)
    assert kept_of(trimming) == [list(range(TILES * PER_TILE))] * 2
    assert trimming.cache_share == 1.0


@BOTH
@pytest.mark.parametrize("keep", [0.1, 2, 0.3])
@pytest.mark.parametrize("sample", ["t2t", "t1t3tt", "12t", "3t"])
def test_straight_line(queries: Any, first_layer: Any, keep: float, sample: str) -> None:
    model, inputs = tiny(), prompt([sample])
    kept, scores = chosen(model, inputs, keep, queries)
    assert len(kept[0]) < inputs["aspect_ratio_mask"].sum() * PER_TILE  # something is dropped
    with only(model, kept, first_layer):
        whole, said = logits(model, inputs), generate(model, inputs)
    plain = logits(model, inputs)
    with TrimmedAttention(model, keep, queries, first_layer) as trimming:
        trimmed = logits(model, inputs)
        assert kept_of(trimming) == kept
        torch.testing.assert_close(trimmed, whole, atol=2e-5, rtol=1e-4)
        assert torch.equal(generate(model, inputs), said)
        assert torch.equal(generate(model, inputs, use_cache=False), said)
        assert kept_of(trimming) == kept
    assert not torch.allclose(trimmed, plain, atol=1e-2)
    (one,) = trimming.selections
    images = inputs["pixel_values"].shape[1]
    assert (one.total, one.grid) == (images * TILES * PER_TILE, (images, TILES, PER_TILE))
    assert one.scores is not None
    torch.testing.assert_close(one.scores, torch.tensor(scores[0]), atol=1e-5, rtol=1e-4)


def test_eager_attention_chooses_the_same() -> None:
    inputs = prompt(["t2t", "t1t"])
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny(attention=attention)
        with TrimmedAttention(model, 0.2) as trimming:
            results.append((logits(model, inputs), kept_of(trimming)))
        assert model.model.language_model.config._attn_implementation == attention
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-4)
    assert results[0][1] == results[1][1]


def test_bfloat16_under_autocast() -> None:
    model, inputs = tiny().bfloat16(), prompt(["t2t", "t1t"])
    with TrimmedAttention(model, 0.2) as trimming, torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, inputs).shape == (2, 6)
    for one in trimming.selections:
        assert one.scores is not None
        assert one.scores.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_single_prompts(queries: Any, first_layer: Any, side: str) -> None:
    model, inputs = tiny(), prompt(["t3tttt", "t1t", "t2tt"], side=side)
    valid = inputs["attention_mask"].bool()
    with TrimmedAttention(model, 0.15, queries, first_layer) as trimming:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = logits(model, inputs, position_ids=positions)
        unions = kept_of(trimming)
        said = generate(model, inputs) if side == "left" else None
        assert len({len(one) for one in unions}) == 3
        for row in range(3):
            alone = row_of(inputs, row)
            torch.testing.assert_close(
                together[row, valid[row]], logits(model, alone)[0], atol=2e-5, rtol=1e-4
            )
            assert kept_of(trimming) == [unions[row]]
            if said is not None:
                assert torch.equal(said[row : row + 1], generate(model, alone))


@pytest.mark.parametrize("first_layer", ["full", "trimmed"])
@pytest.mark.parametrize("samples", [["t3t", "t1t"], ["t3t"]])
def test_without_a_cross_attention_mask(first_layer: Any, samples: list[str]) -> None:
    """All text sees all tokens: the reference knows no causal mask between text and images."""
    model, inputs = tiny(), prompt(samples)
    del inputs["cross_attention_mask"]
    kept, _ = chosen(model, inputs, 0.15, "sum")
    assert len({len(one) for one in kept}) == len(samples)
    with only(model, kept, first_layer):
        whole, said = logits(model, inputs), generate(model, inputs)
    with TrimmedAttention(model, 0.15, first_layer=first_layer) as trimming:
        torch.testing.assert_close(logits(model, inputs), whole, atol=2e-5, rtol=1e-4)
        assert kept_of(trimming) == kept
        assert torch.equal(generate(model, inputs), said)


def test_padding_tiles_never_count() -> None:
    model, inputs = tiny(), prompt(["12t", "3t"])  # the second prompt has no second image
    first = [*range(PER_TILE), *range(TILES * PER_TILE, (TILES + 2) * PER_TILE)]
    second = list(range(3 * PER_TILE))
    for given in (inputs, {**inputs, "cross_attention_mask": None}):
        with TrimmedAttention(model, 10**6) as trimming:
            logits(model, given)
        assert kept_of(trimming) == [first, second]
        for one, own in zip(trimming.selections, (first, second), strict=True):
            assert one.scores is not None
            assert set(one.scores.nonzero()[:, 0].tolist()) <= set(own)
    with TrimmedAttention(model, 0.05) as trimming:
        logits(model, inputs)
    # at least one head's share of 30, at most what four heads can choose
    assert tokens_kept(0.05, 30) <= len(trimming.selections[0]) <= 4 * tokens_kept(0.05, 30)


def test_padding_is_no_query() -> None:
    model, inputs = tiny(), prompt(["t2t", "t2ttttt"], side="right")
    with TrimmedAttention(model, 0.1) as trimming:
        logits(model, inputs)
        before = trimming.selections[0]
        padding = inputs["attention_mask"][0] == 0
        inputs["input_ids"][0, padding] = 55
        logits(model, inputs)
        after = trimming.selections[0]
    assert before.scores is not None
    assert after.scores is not None
    assert torch.equal(before.kept, after.kept)
    torch.testing.assert_close(before.scores, after.scores)


def test_a_prompt_without_images_in_a_batch_is_left_alone() -> None:
    model, inputs = tiny(), prompt(["t2t", "ttt"])
    plain, said = logits(model, inputs), generate(model, inputs)
    with TrimmedAttention(model, 0.1) as trimming:
        torch.testing.assert_close(logits(model, inputs)[1], plain[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(model, inputs)[1], said[1])
    assert len(trimming.selections[0]) < TILES * PER_TILE
    assert len(trimming.selections[1]) == TILES * PER_TILE


@pytest.mark.parametrize("first_layer", ["full", "trimmed"])
def test_rows_whose_tokens_were_all_dropped(first_layer: Any) -> None:
    found = 0
    for seed in range(6):
        model, inputs = tiny(seed), prompt(["1t2tt"], seed=seed)
        kept, _ = chosen(model, inputs, 1, "sum")
        mask = inputs["cross_attention_mask"].repeat_interleave(PER_TILE, dim=-1).flatten(2)
        gone = mask[0].any(-1) & ~mask[0][:, kept[0]].any(-1)
        found += int(gone.sum())
        with only(model, kept, first_layer):
            whole = logits(model, inputs)
        with TrimmedAttention(model, 1, first_layer=first_layer):
            torch.testing.assert_close(logits(model, inputs), whole, atol=2e-5, rtol=1e-4)
    assert found  # there were such rows


# Cache and generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("first_layer", ["full", "trimmed"])
@pytest.mark.parametrize("samples", [["t2t"], ["t3t", "t1t"]])
def test_the_cache_shrinks_by_what_is_said(first_layer: Any, samples: list[str]) -> None:
    model, inputs = tiny(), prompt(samples)
    whole = cross_bytes(cache_of(model(**inputs)))
    with TrimmedAttention(model, 0.1, first_layer=first_layer) as trimming:
        left = cross_bytes(cache_of(model(**inputs)))
    longest = max(map(len, trimming.selections))
    first = longest if first_layer == "trimmed" else TILES * PER_TILE
    assert trimming.cache_share == (first + 2 * longest) / (3 * TILES * PER_TILE)
    assert trimming.cache_share == left / whole
    assert left < whole


@pytest.mark.parametrize("first_layer", ["full", "trimmed"])
@pytest.mark.parametrize("steps", [1, 2])
def test_decoding_equals_a_full_forward(first_layer: Any, steps: int) -> None:
    model, inputs = tiny(), prompt(["t2t", "t31t"], side="right")
    inputs = {name: value[1:] for name, value in inputs.items()}
    new = torch.tensor([[11, 12, 13, 14]])
    kept, _ = chosen(model, inputs, 0.1, "sum")
    with only(model, kept, first_layer):
        whole = logits(model, longer(inputs, new))[:, -5:]
    with TrimmedAttention(model, 0.1, first_layer=first_layer) as trimming, torch.no_grad():
        output = model(**inputs)
        assert kept_of(trimming) == kept
        parts = [output.logits[:, -1:]]
        for start in range(0, 4, steps):
            part = new[:, start : start + steps]
            step = longer(inputs, new[:, : start + steps])
            parts.append(
                model(
                    input_ids=part,
                    attention_mask=step["attention_mask"],
                    cross_attention_mask=step["cross_attention_mask"],
                    **cache_argument(model, cache_of(output)),
                ).logits
            )
        assert kept_of(trimming) == kept
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("first_layer", ["full", "trimmed"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "use_cache": False},
    ],
)
def test_beams_and_returned_sequences(first_layer: Any, how: dict[str, Any]) -> None:
    model, inputs = tiny(), prompt(["t3ttt", "t1t"])
    kept, _ = chosen(model, inputs, 0.12, "sum")
    assert len(kept[0]) != len(kept[1])
    torch.manual_seed(3)
    with only(model, kept, first_layer):
        said = generate(model, inputs, 8, **how)
    torch.manual_seed(3)
    with TrimmedAttention(model, 0.12, first_layer=first_layer) as trimming:
        assert torch.equal(generate(model, inputs, 8, **how), said)
        assert kept_of(trimming) == kept  # one for each prompt, not for each beam


def test_the_next_turn_goes_on_from_the_cache() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    kept, _ = chosen(model, inputs, 0.1, "sum")
    words = torch.tensor([[21, 22, 23]])
    with TrimmedAttention(model, 0.1) as trimming:
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        answer = first.sequences[:, inputs["input_ids"].shape[1] :]
        turn = longer(inputs, torch.cat([answer, words], dim=1))
        text = {name: turn[name] for name in ("input_ids", "attention_mask")}
        mask = turn["cross_attention_mask"]
        said = model.generate(
            **text,
            cross_attention_mask=mask,
            **cache_argument(model, cache_of(first)),
            max_new_tokens=5,
        )
        assert kept_of(trimming) == kept
    with only(model, kept, "full"):
        assert torch.equal(said, model.generate(**turn, max_new_tokens=5))


def test_images_behind_text_that_is_cached_already() -> None:
    model, inputs = tiny(), prompt(["tt2t"])
    start, rest = {"input_ids": inputs["input_ids"][:, :4]}, dict(inputs)
    rest["input_ids"] = inputs["input_ids"][:, 4:]

    def cached() -> dict[str, Any]:
        with torch.no_grad():
            return {**rest, **cache_argument(model, cache_of(model(**start)))}

    kept, _ = chosen(model, cached(), 0.1, "sum")
    with only(model, kept, "full"):
        whole = logits(model, cached())
    with TrimmedAttention(model, 0.1) as trimming:
        given = cached()
        assert trimming.selections == []
        torch.testing.assert_close(logits(model, given), whole, atol=2e-5, rtol=1e-4)
        assert kept_of(trimming) == kept


def test_text_alone_passes() -> None:
    model, inputs = tiny(), prompt(["tt", "t"])
    whole, said = logits(model, inputs), generate(model, inputs)
    with TrimmedAttention(model, 0.1) as trimming:
        logits(model, prompt(["t2t"]))
        assert trimming.cache_share < 1
        assert torch.equal(logits(model, inputs), whole)
        assert (trimming.selections, trimming.cache_share) == ([], 1.0)
        logits(model, prompt(["t2t"]))
        assert torch.equal(generate(model, inputs), said)
        assert (trimming.selections, trimming.cache_share) == ([], 1.0)


def test_states_of_ones_own() -> None:
    model, inputs = tiny(), prompt(["t2t", "t1t"])
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[CROSS[0]]
    hook = layer.register_forward_pre_hook(
        lambda _layer, _args, kwargs: seen.append(kwargs["cross_attention_states"]),
        with_kwargs=True,
    )
    logits(model, inputs)
    hook.remove()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    with TrimmedAttention(model, 0.2) as trimming:
        wanted = logits(model, inputs), kept_of(trimming)
        given = logits(model, {**text, "cross_attention_states": seen[0]})
        assert torch.equal(given, wanted[0])
        assert kept_of(trimming) == wanted[1]
        with pytest.raises(PromptError, match="no whole number of images"):
            logits(model, {**text, "cross_attention_states": seen[0][:, :7]})


def test_gradients_reach_the_kept_tokens() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    with TrimmedAttention(model, 0.2):
        model(**inputs, labels=inputs["input_ids"].clamp(max=95)).loss.backward()
        assert bool(model.model.multi_modal_projector.weight.grad.any())
        model.train()
        checkpoint_gradients(model)
        with pytest.raises(UnsupportedModelError, match="gradient checkpointing off"):
            model(**inputs)


# Lifecycle ----------------------------------------------------------------------------------------


def test_the_model_is_what_it_was() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    said = generate(model, inputs)
    before = state(model)
    with TrimmedAttention(model, 0.1) as trimming:
        assert attached(model) is trimming
        assert state(model) != before
        generate(model, inputs)
    assert state(model) == before
    assert attached(model) is None
    assert torch.equal(generate(model, inputs), said)
    with (  # noqa: PT012 (the exception has to come after a trimmed call)
        pytest.raises(ZeroDivisionError),
        TrimmedAttention(model, 0.1),
    ):
        generate(model, inputs)
        raise ZeroDivisionError
    assert state(model) == before
    trimming.remove()
    assert state(model) == before


def test_an_exception_inside_a_call_leaves_nothing_behind() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    generate(model, inputs)
    before = state(model)
    with TrimmedAttention(model, 0.1) as trimming:
        inside = state(model)
        with pytest.raises(RuntimeError):
            logits(model, {**inputs, "pixel_values": torch.zeros(1, 1, TILES, 3, 8, 8)})
        assert state(model) == inside
        # an inner module on its own is the plain model
        text = prompt(["tt"])["input_ids"]
        model.model.language_model(input_ids=text, cross_attention_states=torch.randn(3, 10, 32))
        assert trimming.selections == []
        generate(model, inputs)
        assert len(trimming.selections) == 1
    assert state(model) == before


def test_a_generate_of_somebody_elses_is_put_back() -> None:
    model = tiny()
    model.generate = other = lambda **kwargs: kwargs
    with TrimmedAttention(model, 0.1):
        assert model.generate is not other
    assert model.generate is other


def test_twice_is_refused() -> None:
    model = tiny()
    with (
        TrimmedAttention(model, 0.1),
        pytest.raises(TokenPruneError, match="under TrimmedAttention already"),
    ):
        TrimmedAttention(model, 0.2)
    with TrimmedAttention(model, 0.2):
        pass


# Through `tokenprune_hf` --------------------------------------------------------------------------

METHOD: Final = "trimmed-attention"
"""The name under which `prune` and `apply` took it before it had a function."""

BY_NAME = pytest.warns(DeprecationWarning, match=r"Call tokenprune_hf\.trim_cross_attention")


def test_trim_cross_attention() -> None:
    model, inputs = tiny(), prompt(["t2t", "t1t"])
    before = state(model)
    with TrimmedAttention(model, 0.2, "max", "trimmed"):
        whole = logits(model, inputs)
    with tokenprune_hf.trim_cross_attention(
        model, keep=0.2, queries="max", first_layer="trimmed"
    ) as trimming:
        assert type(trimming) is tokenprune_hf.TrimmedAttention
        assert torch.equal(logits(model, inputs), whole)
        assert len(trimming.selections) == 2
    assert state(model) == before


def test_it_lasts_until_remove() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    before, plain = state(model), logits(model, inputs)
    trimming = tokenprune_hf.trim_cross_attention(model, 0.1)
    assert (trimming.queries, trimming.first_layer) == ("sum", "full")
    assert not torch.equal(logits(model, inputs), plain)
    with pytest.raises(
        TokenPruneError, match=r"under TrimmedAttention already.*tokenprune_hf\.remove\(model\)"
    ):
        tokenprune_hf.trim_cross_attention(model, 0.2)
    tokenprune_hf.remove(model)
    assert state(model) == before
    assert torch.equal(logits(model, inputs), plain)
    tokenprune_hf.remove(model)
    with tokenprune_hf.trim_cross_attention(model, 0.2):
        pass


def test_what_trim_cross_attention_refuses() -> None:
    model: Any = tiny()
    before = state(model)
    with pytest.raises(BudgetError, match="for videos of other models"):
        tokenprune_hf.trim_cross_attention(model, "llava-video-7b")
    with pytest.raises(BudgetError, match="not a fraction"):
        tokenprune_hf.trim_cross_attention(model, 1.5)
    queries: Any = "maximum"
    with pytest.raises(OptionError, match=r"option queries='maximum'.*Did you mean 'max'"):
        tokenprune_hf.trim_cross_attention(model, 0.1, queries=queries)
    first_layer: Any = "some"
    with pytest.raises(OptionError, match=r"option first_layer='some'.*Allowed: full, trimmed"):
        tokenprune_hf.trim_cross_attention(model, 0.1, first_layer=first_layer)
    assert state(model) == before


@pytest.mark.parametrize("by_name", [tokenprune_hf.prune, tokenprune_hf.apply])
def test_by_name_it_warns_and_does_the_same(by_name: Any) -> None:
    model, inputs = tiny(), prompt(["t2t", "t1t"])
    with tokenprune_hf.trim_cross_attention(model, 0.2, queries="max", first_layer="trimmed"):
        whole = logits(model, inputs)
    with BY_NAME as warned:
        trimming = by_name(model, METHOD, 0.2, queries="max", first_layer="trimmed")
    assert [warning.filename for warning in warned] == [__file__]
    assert type(trimming) is TrimmedAttention
    assert torch.equal(logits(model, inputs), whole)
    trimming.remove()


def test_by_name_it_refuses_what_has_no_meaning_here() -> None:
    model: Any = tiny()
    before = state(model)
    with pytest.raises(ConfigError, match="positions='compact' has no meaning"):
        tokenprune_hf.prune(model, METHOD, 0.1, positions="compact")
    with pytest.raises(ConfigError, match="apply='mask' has no meaning"):
        tokenprune_hf.prune(model, METHOD, 0.1, apply="mask")
    with pytest.raises(BudgetError, match="keep is missing"):
        tokenprune_hf.prune(model, METHOD)
    with BY_NAME, pytest.raises(BudgetError, match="for videos of other models"):
        tokenprune_hf.prune(model, METHOD, "llava-video-7b")
    with pytest.raises(OptionError, match="Did you mean 'queries'"):
        tokenprune_hf.prune(model, METHOD, 0.1, query="max")
    assert state(model) == before


def test_the_former_module_warns() -> None:
    from tokenprune_hf import trimmed

    with pytest.warns(DeprecationWarning, match=r"is tokenprune_hf\.mllama\.trimmed now"):
        assert trimmed.TrimmedAttention is TrimmedAttention


def test_a_method_and_a_model_that_do_not_fit() -> None:
    model = tiny()
    before = state(model)
    config = PruningConfig("uniform", 0.1)
    for method in ("cls-attention", "trimed-attention", config, config.selector()):
        with pytest.raises(
            UnsupportedModelError, match=r"Call tokenprune_hf\.trim_cross_attention\(model, keep\)"
        ):
            tokenprune_hf.prune(model, method, None if method is config else 0.1)
    assert state(model) == before
    llava = TINY["llava"].model()
    before = state(llava)
    with pytest.raises(UnsupportedModelError, match="model_type 'mllama'"):
        tokenprune_hf.trim_cross_attention(llava, 0.1)
    assert state(llava) == before


# Bad input ----------------------------------------------------------------------------------------


def test_wrong_settings_are_refused_before_the_model_is_touched() -> None:
    model = tiny()
    before = state(model)
    for keep in (0, -1, 0.0, 1.5, True, float("nan")):
        with pytest.raises(BudgetError):
            TrimmedAttention(model, keep)
    with pytest.raises(OptionError, match="Did you mean 'sum'"):
        TrimmedAttention(model, 0.1, queries="summ")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Did you mean 'trimmed'"):
        TrimmedAttention(model, 0.1, first_layer="trimed")  # type: ignore[arg-type]
    assert state(model) == before


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'llava'"):
        TrimmedAttention(TINY["llava"].model(), 0.1)
    with pytest.raises(UnsupportedModelError, match="Pass the whole model"):
        TrimmedAttention(tiny().model, 0.1)
    with pytest.raises(UnsupportedModelError, match="Pass the whole model"):
        TrimmedAttention(nn.Linear(2, 2), 0.1)
    with pytest.raises(UnsupportedModelError, match="mllama_text_model"):
        TrimmedAttention(tf.MllamaForCausalLM(tiny().config), 0.1)


@torch.no_grad()
def test_caches_that_cannot_be_trimmed() -> None:
    model, inputs = tiny(), prompt(["t2t"])
    text = {"input_ids": torch.tensor([[5]])}
    plain = cache_of(model(**inputs))
    with TrimmedAttention(model, 0.1):
        with pytest.raises(PromptError, match="does not shrink"):
            generate(model, inputs, cache_implementation="static")
        cache = cache_of(model(**inputs))
        with pytest.raises(PromptError, match="already holds some"):
            model(**inputs, **cache_argument(model, cache))
        with pytest.raises(PromptError, match="outside the block"):
            model(**text, **cache_argument(model, plain))
        model(**text, **cache_argument(model, cache))
        with pytest.raises(PromptError, match="same rows"):
            model(input_ids=torch.tensor([[5], [6]]), **cache_argument(model, cache))
        cache.crop(-1)
        with pytest.raises(PromptError, match="not cropped"):
            model(**text, **cache_argument(model, cache))
        cache.reset()
        model(**inputs, **cache_argument(model, cache))  # an emptied one is as good as new


def test_arguments_that_cannot_be_trimmed() -> None:
    model, inputs = tiny(), prompt(["t2t", "t1t"])
    with TrimmedAttention(model, 0.1):
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
            with pytest.raises(PromptError, match=name):
                generate(model, inputs, **{name: 3})
            config = copy.deepcopy(model.generation_config)
            setattr(config, name, 3)
            with pytest.raises(PromptError, match=name):
                model.generate(**inputs, generation_config=config)
            own, model.generation_config = model.generation_config, config
            with pytest.raises(PromptError, match=name):
                generate(model, inputs)
            model.generation_config = own
        length = inputs["input_ids"].shape[1]
        with pytest.raises(PromptError, match="one value per token"):
            model(**{**inputs, "attention_mask": torch.ones(2, 1, length, length)})
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model(pixel_values=inputs["pixel_values"])
        with pytest.raises(PromptError, match="those of 1 prompts"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        with pytest.raises(PromptError, match="cross_attention_mask is that of"):
            model(**{**inputs, "cross_attention_mask": inputs["cross_attention_mask"][..., :2]})
        states = torch.randn(2 * TILES, PER_TILE, 32)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with pytest.raises(PromptError, match="aspect_ratio_mask"):
            model(
                **text,
                cross_attention_states=states,
                aspect_ratio_mask=inputs["aspect_ratio_mask"].expand(2, 2, TILES),
            )
        with torch.no_grad():
            model.model.language_model.layers[CROSS[0]].cross_attn.k_norm.weight[0] = float("nan")
        with pytest.raises(TokensError, match="not finite"):
            model(**inputs)
