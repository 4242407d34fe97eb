"""Methods inside the language model, against masks by hand, and in every kind of call."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
import tokenprune_hf
from tests.hf.insides import DEPTH, decoder, deeper, leave_out, longer, peak_clusters, visual_runs
from tests.hf.models import TINY, Tiny, checkpoint_gradients, prompt
from tokenprune.budget import tokens_kept
from tokenprune.errors import (
    ConfigError,
    OptionError,
    PromptError,
    TokensError,
    UnsupportedModelError,
)
from tokenprune.inside.base import InsideMethod
from tokenprune.inside.fastv import FastV
from tokenprune.inside.pyramid_drop import PyramidDrop
from tokenprune.inside.sparsevlm import SparseVLM
from tokenprune.launches import counting, on_device
from tokenprune_hf.engine import cache_argument, cache_of

METHODS: list[InsideMethod] = [
    FastV(),
    FastV(layer=5),
    PyramidDrop(),
    PyramidDrop(layers="1,3,4,7"),
    SparseVLM(),
    SparseVLM(layers="2,3,4", recycle=False),
]
KEEP = 5

Inputs = dict[str, Any]


def name_of(method: Any) -> str:
    return repr(method)


def expected(
    model: Any,
    inputs: Inputs,
    method: InsideMethod,
    keep: int = KEEP,
    runs: list[list[int]] | None = None,
) -> Any:
    clusters = peak_clusters if isinstance(method, SparseVLM) and method.recycle else None
    return leave_out(model, inputs, method, keep, clusters, runs)


def remaining(
    inputs: Inputs, left: list[list[int]], runs: list[list[int]] | None = None
) -> list[int]:
    """Return the columns of one prompt that are left behind the last stage."""
    runs = visual_runs(inputs) if runs is None else runs
    gone = {column for run in runs for column in run} - {
        run[token] for run, own in zip(runs, left, strict=True) for token in own
    }
    return [column for column in range(inputs["input_ids"].shape[1]) if column not in gone]


def greedy(model: Any, inputs: Inputs, new: int = 4, **more: Any) -> Tensor:
    output: Tensor = model.generate(**inputs, max_new_tokens=new, do_sample=False, **more)
    return output


def check(name: str, method: InsideMethod, sample: str = "titit") -> None:
    tiny = deeper(name)
    check_model(tiny.model(), prompt(tiny, [sample]), method, 3)


def check_model(model: Any, inputs: Inputs, method: InsideMethod, new: int) -> None:
    """Compare logits of what is left, `new` generated tokens and caches with masks by hand."""
    by_hand, left = expected(model, inputs, method)
    output, answer = by_hand.run(inputs), by_hand.answer(inputs, new)
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP) as pruning:
        found = model(**inputs)
        assert [one.kept.tolist() for one in pruning.selections] == left
        said = greedy(model, inputs, new)
    columns, length = remaining(inputs, left), inputs["input_ids"].shape[1]
    torch.testing.assert_close(
        found.logits[0, columns], output.logits[0, columns], rtol=1e-3, atol=1e-3
    )
    assert said[0, length:].tolist() == answer
    lengths = [
        # One with a window forgets keys, and counts all it was given.
        layer.get_seq_length() if layer.is_sliding else layer.keys.shape[-2]
        for layer in cache_of(found).layers
    ]
    assert lengths[-1] == len(columns) < lengths[0] == length


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_llava_equals_masks_by_hand(method: InsideMethod) -> None:
    check("llava", method)


@pytest.mark.parametrize("method", METHODS[::2], ids=name_of)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "mistral3"])
def test_families_equal_masks_by_hand(name: str, method: InsideMethod) -> None:
    check(name, method, sample="tit" if name in ("idefics3", "mistral3") else "titit")


_REFUSED = {
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "glm5_next", "nemotron_h_omni", "lfm2_vl"), "keep a state of all"
    ),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), "keep a state of all"),
    "llama4": "of the kinds chunked_attention",
    "gemma3n": "attend with the keys of earlier ones",
}


@pytest.mark.parametrize("name", [name for name in _REFUSED if name in TINY])
def test_models_whose_tokens_cannot_leave_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=_REFUSED[name]):
        tokenprune_hf.prune(TINY[name].model(), "fastv", KEEP)


@pytest.mark.parametrize(
    "name", [name for name, tiny in TINY.items() if tiny.image and name not in _REFUSED]
)
def test_every_other_family_equals_masks_by_hand(name: str) -> None:
    """Crops, newlines that stay, tiles, features that are added behind the first layers."""
    tiny: Tiny = deeper(name)
    method: InsideMethod = SparseVLM("2,3,5")
    if name == "gemma4":  # whose layers differ from each other, and are not made more
        tiny, method = TINY[name], FastV(layer=1)
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    media = tokenprune_hf.encode(model, **inputs).modalities["image"]
    placeholders = [column for run in visual_runs(inputs) for column in run]
    runs = [[placeholders[row] for row in item.rows.tolist()] for item in media.items]
    by_hand, left = expected(model, inputs, method, 3, runs)
    output = by_hand.run(inputs)
    with torch.no_grad(), tokenprune_hf.prune(model, method, 3) as pruning:
        found = model(**inputs).logits
        assert [one.kept.tolist() for one in pruning.selections] == left
    columns = remaining(inputs, left, runs)
    torch.testing.assert_close(found[0, columns], output.logits[0, columns], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [FastV(layer=3), PyramidDrop(), SparseVLM()], ids=name_of)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [64, 40])
def test_sliding_windows_and_images_seen_both_ways(
    method: InsideMethod, attention: str, window: int
) -> None:
    tiny = deeper("gemma3", sliding_window=window)
    model, inputs = tiny.model(), prompt(tiny, ["titit"], words=5)
    kinds = model.config.get_text_config().layer_types
    length = inputs["input_ids"].shape[1]
    assert 40 < length < 64
    ranking = [kinds[stage.ranked_at] for stage in method.stages(DEPTH)]
    model.set_attn_implementation(attention)
    if length > window and "sliding_attention" in ranking:
        refused = pytest.raises(PromptError, match=rf"sees {window} tokens only .* option layer")
        with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP), refused:
            model(**inputs)
        return
    check_model(model, inputs, method, 6)


def test_a_window_that_slides_over_what_is_left() -> None:
    """The window counts tokens of the prompt, and not those that are left of it."""
    tiny = deeper("gemma3", sliding_window=40)
    tiny_kinds = ["sliding_attention", "full_attention"] * (DEPTH // 2)
    model = deeper("gemma3", sliding_window=40, layer_types=tiny_kinds).model()
    inputs = prompt(tiny, ["titit"], words=5)
    method = FastV(layer=4)
    assert inputs["input_ids"].shape[1] > 40
    check_model(model, inputs, method, 6)


@pytest.mark.parametrize("method", [FastV(layer=3), PyramidDrop(), SparseVLM("2,4,6")], ids=name_of)
def test_deepstack_behind_the_layers_that_add_it(method: InsideMethod) -> None:
    check("qwen3_vl", method)


def test_deepstack_is_not_left_half_added() -> None:
    tiny = deeper("qwen3_vl")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP, layer=1):
        with pytest.raises(
            UnsupportedModelError, match=r"behind layer 1 .* in front of layer 2 or"
        ):
            model(**inputs)
        with pytest.raises(UnsupportedModelError, match="option layer begin"):
            greedy(model, inputs)


# Batches ------------------------------------------------------------------------------------------


def single(inputs: Inputs, rows: list[int], images: list[slice]) -> list[Inputs]:
    """Return the prompts of a padded batch, one by one."""
    result = []
    for row, own in zip(rows, images, strict=True):
        real = inputs["attention_mask"][row].bool()
        result.append(
            {
                "input_ids": inputs["input_ids"][row, real][None],
                "attention_mask": inputs["attention_mask"][row, real][None],
                "pixel_values": inputs["pixel_values"][own],
            }
        )
    return result


def to_the_right(inputs: Inputs) -> Inputs:
    """Return a batch with its padding behind the prompts."""
    result = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        rows = [
            torch.cat([row[mask.bool()], row[~mask.bool()]])
            for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)
        ]
        result[name] = torch.stack(rows)
    return result


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS[::2], ids=name_of)
def test_a_batch_equals_its_prompts(method: InsideMethod, attention: str) -> None:
    tiny = deeper("llava")
    model = tiny.model()
    model.set_attn_implementation(attention)
    inputs = prompt(tiny, ["tit", "titit", "ttitt"])
    alone = single(inputs, [0, 1, 2], [slice(0, 1), slice(1, 3), slice(3, 4)])
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP) as pruning:
        logits, said, kept = [], [], []
        for one in alone:
            logits.append(model(**one).logits[0, -1])
            kept += [selection.kept.tolist() for selection in pruning.selections]
            said.append(greedy(model, one)[0, -4:].tolist())
        together = model(**inputs).logits
        assert [selection.kept.tolist() for selection in pruning.selections] == kept
        answers = greedy(model, inputs)[:, -4:].tolist()
        right = model(**to_the_right(inputs)).logits
        assert [selection.kept.tolist() for selection in pruning.selections] == kept
    ends = inputs["attention_mask"].sum(dim=1) - 1
    torch.testing.assert_close(together[:, -1], torch.stack(logits), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        right[torch.arange(3), ends], torch.stack(logits), rtol=1e-3, atol=1e-3
    )
    assert answers == said


def test_prompts_of_one_length_that_lose_different_numbers() -> None:
    """No padding goes in, so that the model makes no mask; padding is needed all the same."""
    tiny = deeper("llava")
    model = tiny.model()
    inputs = prompt(tiny, ["titt", "titit"], words=2)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    words = torch.arange(5, 5 + lengths[1] - lengths[0])
    inputs["input_ids"][0, : len(words)] = words  # text where padding was
    inputs["attention_mask"][:] = 1
    alone = single(inputs, [0, 1], [slice(0, 1), slice(1, 3)])
    for method in METHODS[::2]:
        with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP):
            logits = torch.stack([model(**one).logits[0, -1] for one in alone])
            said = [greedy(model, one)[0, -4:].tolist() for one in alone]
            together = model(**inputs).logits[:, -1]
            answers = greedy(model, inputs)[:, -4:].tolist()
        torch.testing.assert_close(together, logits, rtol=1e-3, atol=1e-3)
        assert answers == said


def test_videos_and_images_in_one_prompt() -> None:
    tiny = deeper("qwen2_5_vl")
    model, inputs = tiny.model(), prompt(tiny, ["tvtit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "pyramid-drop", 0.25) as pruning:
        model(**inputs)
        totals = [one.total for one in pruning.selections]
        assert [len(one) for one in pruning.selections] == [
            tokens_kept(0.25, total) for total in totals
        ]
        assert totals == [len(run) for run in visual_runs(inputs)]
        assert pruning.selections[0].grid[0] > 1


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS[::2], ids=name_of)
def test_a_loop_by_hand_says_what_generate_says(method: InsideMethod, attention: str) -> None:
    tiny = deeper("llava")
    model = tiny.model()
    model.set_attn_implementation(attention)
    inputs = prompt(tiny, ["tit", "titit"])
    suppressed = model.generation_config.suppress_tokens
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP):
        said = greedy(model, inputs)[:, -4:]
        output = model(**inputs)
        mask, found = inputs["attention_mask"], []
        for _ in range(4):
            logits = output.logits[:, -1].clone()
            logits[:, suppressed] = -torch.inf
            found.append(logits.argmax(dim=-1))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = model(
                input_ids=found[-1][:, None],
                attention_mask=mask,
                **cache_argument(model, cache_of(output)),
            )
    assert torch.equal(torch.stack(found, dim=1), said)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("method", [FastV(layer=3), PyramidDrop(), SparseVLM()], ids=name_of)
def test_a_conversation_goes_on_from_its_cache(name: str, method: InsideMethod) -> None:
    # Rows of a cache are told by a layer that keeps all keys.
    kinds = ["full_attention", "sliding_attention"] * (DEPTH // 2)
    options: dict[str, Any] = {"layer_types": kinds} if name == "gemma3" else {}
    tiny = deeper(name, **options)
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    more = torch.tensor([[11, 12, 13]])
    by_hand, _ = expected(model, inputs, method)
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP):
        first: Any = greedy(model, inputs, return_dict_in_generate=True)
        cache = cache_of(first)
        second = torch.cat([first.sequences, more], dim=1)
        said = model.generate(
            input_ids=second, max_new_tokens=4, do_sample=False, **cache_argument(model, cache)
        )[:, second.shape[1] :]
        third = cache_of(model(**inputs))
        copied = copy.deepcopy(third)
        copied.batch_repeat_interleave(2)
        model(input_ids=more, **cache_argument(model, third))  # several tokens at once
        third.crop(-2)
        logits = model(input_ids=more[:, 1:], **cache_argument(model, third)).logits
        both = model(input_ids=more.expand(2, -1), **cache_argument(model, copied)).logits[:, -1]
    whole = dict(inputs)
    for token in second[0, inputs["input_ids"].shape[1] :].tolist():
        whole = longer(whole, token)
    assert said[0].tolist() == by_hand.answer(whole, 4)
    whole = dict(inputs)
    for token in more[0].tolist():
        whole = longer(whole, token)
    plain = by_hand.run(whole).logits[0, -2:]
    torch.testing.assert_close(logits[0], plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both, plain[-1].expand(2, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS[::2], ids=name_of)
def test_the_end_of_a_prompt_is_read_again(method: InsideMethod) -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit", "titit"])
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP):
        output = model(**inputs)
        cache = cache_of(output)
        cache.crop(-2)
        again = model(
            input_ids=inputs["input_ids"][:, -2:],
            attention_mask=inputs["attention_mask"],
            **cache_argument(model, cache),
        ).logits
    torch.testing.assert_close(again, output.logits[:, -2:], rtol=1e-3, atol=1e-3)


def test_a_cache_that_was_cut_by_its_length_is_refused() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP):
        cache = cache_of(model(**inputs))
        for layer in cache.layers:  # as `crop(n)` of earlier releases did
            length = inputs["input_ids"].shape[1] - 1
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        with pytest.raises(PromptError, match=r"Cut tokens off by their number \(cache.crop"):
            model(input_ids=torch.tensor([[11]]), **cache_argument(model, cache))


def test_a_cache_goes_on_where_tokens_leave_inside_alone() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    token = torch.tensor([[11]])
    with torch.no_grad():
        with tokenprune_hf.prune(model, "fastv", KEEP):
            cache = cache_of(model(**inputs))
        with pytest.raises(PromptError, match="holds a pruned prompt"):
            model(input_ids=token, **cache_argument(model, cache))
        refused = pytest.raises(PromptError, match="left inside the language model")
        with tokenprune_hf.prune(model, "uniform", KEEP), refused:
            model(input_ids=token, **cache_argument(model, cache))
        with tokenprune_hf.prune(model, "pyramid-drop", KEEP):
            model(
                input_ids=token, **cache_argument(model, cache)
            )  # what is left is known of the cache


@pytest.mark.parametrize("method", METHODS[::2], ids=name_of)
def test_beams_returned_sequences_and_no_cache(method: InsideMethod) -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit", "titit"])
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP) as pruning:
        said = greedy(model, inputs)
        kept = [one.kept.tolist() for one in pruning.selections]
        assert torch.equal(greedy(model, inputs, use_cache=False), said)
        assert [one.kept.tolist() for one in pruning.selections] == kept
        beams = model.generate(
            **inputs, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False
        )
        assert [one.kept.tolist() for one in pruning.selections] == kept
        no_cache = model.generate(
            **inputs,
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            use_cache=False,
        )
        assert torch.equal(beams, no_cache)
        looked_up = greedy(model, prompt(tiny, ["tit"]), 6, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up, greedy(model, prompt(tiny, ["tit"]), 6))


def test_caches_of_one_length_are_refused() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    from transformers import StaticCache

    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP):
        with pytest.raises(PromptError, match="StaticCache are all of one length"):
            greedy(model, inputs, cache_implementation="static")
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
        with pytest.raises(PromptError, match="StaticCache are all of one length"):
            model(**inputs, **cache_argument(model, cache))
        model(**inputs)  # the next call is not hurt


# Properties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 36, 100])
@pytest.mark.parametrize("method", ["fastv", "pyramid-drop", "sparsevlm"])
def test_keeping_everything_changes_nothing(method: str, keep: float) -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["ttitit"])
    with torch.no_grad():
        plain = model(**inputs)
        said = greedy(model, inputs)
        with tokenprune_hf.prune(model, method, keep) as pruning:
            found = model(**inputs)
            assert torch.equal(found.logits, plain.logits)
            assert torch.equal(greedy(model, inputs), said)
            assert [len(one) for one in pruning.selections] == [36, 36]


def test_the_modules_are_what_they_were_afterwards() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    modules = list(model.modules())
    with torch.no_grad():
        plain = model(**inputs).logits  # the first call, in which transformers sets itself up
        before = [dict(module.__dict__) for module in modules]
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules]

        def failing() -> None:
            with tokenprune_hf.prune(model, "sparsevlm", KEEP):
                model(**inputs)
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            failing()
        assert torch.equal(model(**inputs).logits, plain)
    assert [dict(module.__dict__) for module in modules] == before
    assert hooks == [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules
    ]


def test_threads_and_copies_choose_for_themselves() -> None:
    tiny = deeper("llava")
    model = tiny.model()
    prompts = [prompt(tiny, [sample]) for sample in ("tit", "titit", "ttit", "ttitit")]
    with torch.no_grad(), tokenprune_hf.prune(model, "pyramid-drop", KEEP) as pruning:
        alone = []
        for one in prompts:
            said = greedy(model, one)
            alone.append((said.tolist(), [s.kept.tolist() for s in pruning.selections]))
        found: dict[int, Any] = {}

        def work(index: int) -> None:
            with torch.no_grad():
                said = greedy(model, prompts[index])
            found[index] = said.tolist(), [s.kept.tolist() for s in pruning.selections]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[index] for index in range(len(prompts))] == alone
        twin = copy.deepcopy(model)
    with torch.no_grad():  # the original is plain by now, and its copy is not
        assert greedy(twin, prompts[0]).tolist() == alone[0][0]
        tokenprune_hf.remove(twin)
        assert torch.equal(greedy(twin, prompts[0]), greedy(model, prompts[0]))


def test_logits_have_the_prompts_columns() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    runs = visual_runs(inputs)
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP) as pruning:
        logits = model(**inputs).logits
        kept = {runs[0][token] for token in pruning.selections[0].kept.tolist()}
        for column in runs[0]:
            assert bool((logits[0, column] != 0).any()) == (column in kept)
        last = model(**inputs, logits_to_keep=3).logits
        torch.testing.assert_close(last, logits[:, -3:])
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
        loss = model(**inputs, labels=labels).loss
    shown = labels[0, 1:] != -100
    by_hand = torch.nn.functional.cross_entropy(logits[0, :-1][shown], labels[0, 1:][shown])
    torch.testing.assert_close(loss, by_hand)


def test_scores_are_those_of_the_last_stage() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    method = PyramidDrop()
    by_hand, left = expected(model, inputs, method)
    last = method.stages(DEPTH)[-1].layer
    del by_hand.hidden[last]
    maps = by_hand.run(inputs).attentions[last][0].mean(dim=0)[-1, visual_runs(inputs)[0]]
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP) as pruning:
        model(**inputs)
        (selection,) = pruning.selections
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores, maps, rtol=1e-3, atol=1e-5)
    assert int((selection.scores > 0).sum()) == method.counts(36, KEEP)[-2]
    assert selection.kept.tolist() == left[0]


def test_gradients_go_through_what_is_left() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with tokenprune_hf.prune(model, "sparsevlm", 20):
        model(**inputs).logits[0, -1].sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in decoder(model).layers.parameters()
    )


@pytest.mark.parametrize("method", ["fastv", "pyramid-drop", "sparsevlm"])
def test_a_device_is_waited_for_at_both_ends_of_a_call_alone(method: str) -> None:
    tiny = deeper("qwen2_5_vl")
    model, inputs = tiny.model(), prompt(tiny, ["tit", "titit"])
    there, moved = on_device(copy.deepcopy(model)), on_device(inputs)
    with torch.no_grad():
        with tokenprune_hf.prune(model, method, keep=0.25) as pruning:
            logits, said = model(**inputs).logits, greedy(model, inputs, 2)
            kept = [one.kept.tolist() for one in pruning.selections]
        with tokenprune_hf.prune(there, method, keep=0.25) as pruning:
            with counting() as counted:
                found = there(**moved).logits
            with counting():
                answer = greedy(there, moved, 2)
            assert [one.kept.cpu().tolist() for one in pruning.selections] == kept
    assert torch.equal(found.cpu(), logits)
    assert torch.equal(answer.cpu(), said)
    own = counted.where(lambda one: one.made_by("tokenprune", "tokenprune_hf"))
    assert own.waits <= 2, own.waiting()


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("positions", "compact", "stay where they were read"),
        ("apply", "mask", "read up to the layer"),
        ("proportional_attention", True, "differ from layer to layer"),
    ],
)
def test_what_does_not_go_together_is_refused(option: str, value: Any, reason: str) -> None:
    model = deeper("llava").model()
    with pytest.raises(ConfigError, match=f"{option}=.* {reason}.* Leave {option} out"):
        tokenprune_hf.prune(model, "fastv", KEEP, **{option: value})
    assert not model._forward_pre_hooks


def test_too_few_layers_are_refused() -> None:
    model = deeper("llava", depth=2).model()
    with pytest.raises(OptionError, match="in front of the layers 2, and this language model has"):
        tokenprune_hf.prune(model, "fastv", KEEP)
    with pytest.raises(OptionError, match="Give layers so that they rise from 1 to 1"):
        tokenprune_hf.prune(model, "pyramid-drop", KEEP)
    tokenprune_hf.prune(model, "fastv", KEEP, layer=1).remove()


def test_calls_that_cannot_be_pruned_are_refused() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["ti"])
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP) as pruning:
        inputs["input_ids"] = inputs["input_ids"][:, :-1]  # the mark behind the image
        inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
        with pytest.raises(PromptError, match="no text comes after it"):
            model(**inputs)
        inputs = prompt(tiny, ["tit"])
        model(**inputs)
        with pytest.raises(PromptError, match="known holds selections"):
            model(**inputs, known=pruning.selections)
    checkpoint_gradients(model)
    model.train()
    refused = pytest.raises(PromptError, match="gradient checkpointing runs layers a second time")
    with tokenprune_hf.prune(model, "fastv", KEEP), refused:
        model(**inputs)


def test_a_layer_that_is_given_something_unknown_is_refused() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    hint = torch.zeros(inputs["input_ids"].shape)
    handle = (
        decoder(model)
        .layers[3]
        .register_forward_pre_hook(
            lambda _layer, args, kwargs: (args, {**kwargs, "hint": hint}), with_kwargs=True
        )
    )
    refused = pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer is given hint")
    with torch.no_grad(), tokenprune_hf.prune(model, "fastv", KEEP), refused:
        model(**inputs)
    handle.remove()


def test_scores_that_are_no_numbers_are_refused() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    refused = pytest.raises(TokensError, match="'fastv' found attention that")
    with torch.no_grad():
        decoder(model).layers[0].mlp.down_proj.weight[:] = torch.nan
        with tokenprune_hf.prune(model, "fastv", KEEP), refused:
            model(**inputs)


def test_configs_and_objects_say_the_same() -> None:
    tiny = deeper("llava")
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    config = tokenprune.PruningConfig("fastv", 0.25, options={"layer": 4})
    again = tokenprune.PruningConfig.from_json(config.to_json())
    found = []
    with torch.no_grad():
        for method, keep in ((again, None), (FastV(layer=4), 0.25)):
            with tokenprune_hf.prune(model, method, keep) as pruning:
                found.append(model(**inputs).logits)
                assert pruning.selector == FastV(layer=4)
        running = tokenprune_hf.apply(model, "fastv", 0.25, layer=4)
        found.append(model(**inputs).logits)
        running.remove()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
