"""Going on from a cache that holds a pruned prompt: right, or refused, wherever the cache has been.

What is right is what the whole conversation says when it is read at once.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenprune_hf
from tests.hf import mllamas
from tests.hf.models import IMAGE, PAD, TINY, prompt
from tokenprune.config import Positions
from tokenprune.errors import PromptError
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.mllama.trimmed import TrimmedAttention

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
# transformers 5.19 calls its own mllama so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`hidden_state` is deprecated.*MllamaVisionEncoderLayer:FutureWarning"
)
MODELS = ["llava", "qwen2_5_vl"]
WITH_A_STATE = [*MODELS, "qwen3_5"]  # whose cache transformers itself does not cut back
MORE = torch.tensor([[31, 32, 33]])


def setting(name: str, samples: list[str]) -> tuple[Any, dict[str, Any]]:
    model = TINY[name].model()
    # So that padding can be told from what was said.
    model.generation_config.suppress_tokens = [*model.generation_config.suppress_tokens, PAD]
    return model, prompt(TINY[name], samples)


def media_of(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return the image arguments of some rows of a batch with one image a row."""
    result: dict[str, Any] = {}
    for name in ("pixel_values", "image_grid_thw"):
        if name in inputs:
            parts = inputs[name]
            if name == "pixel_values" and "image_grid_thw" in inputs:
                sizes = inputs["image_grid_thw"].prod(dim=1).tolist()
                result[name] = torch.cat([parts.split(sizes)[int(row)] for row in rows])
            else:
                result[name] = parts[rows]
    return result


def whole(inputs: dict[str, Any], talk: Tensor, rows: Tensor) -> dict[str, Any]:
    """Return the arguments that read a whole conversation [C, M] at once."""
    call = {"input_ids": talk, "attention_mask": (talk != PAD).long(), **media_of(inputs, rows)}
    if "mm_token_type_ids" in inputs:
        call["mm_token_type_ids"] = (talk == IMAGE).long()
    return call


def answer(model: Any, call: dict[str, Any]) -> list[list[int]]:
    output = model.generate(**call, **GREEDY)
    return list(output[:, call["input_ids"].shape[1] :].tolist())


def go_on(model: Any, talk: Tensor, cache: Any) -> list[list[int]]:
    mask = (talk != PAD).long()
    call = {"input_ids": talk, "attention_mask": mask, **cache_argument(model, cache)}
    return answer(model, call)


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(cache: Any) -> Any:
    """What offloading does: the same cache, its tensors new ones."""
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


SAME_ROWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda cache: cache,
    "deepcopy": copy.deepcopy,
    "saved": saved,
    "moved": moved,
}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("way", SAME_ROWS)
@pytest.mark.parametrize("name", WITH_A_STATE)
def test_copies_go_on_as_the_cache_itself(name: str, way: str, positions: Positions) -> None:
    model, inputs = setting(name, ["titt", "tit"])
    rows = torch.arange(2)
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5, positions):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        talk = torch.cat([first.sequences, MORE.expand(2, -1)], dim=1)
        right = answer(model, whole(inputs, talk, rows))
        assert go_on(model, talk, SAME_ROWS[way](cache_of(first))) == right


@pytest.mark.parametrize("name", WITH_A_STATE)
def test_another_block_goes_on_and_no_block_refuses(name: str) -> None:
    model, inputs = setting(name, ["tit"])
    rows = torch.arange(1)
    with torch.no_grad():
        with tokenprune_hf.prune(model, "feature-norm", 5):
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            talk = torch.cat([first.sequences, MORE], dim=1)
            right = answer(model, whole(inputs, talk, rows))
        cache = cache_of(first)
        kind = type(cache)
        for use in (
            lambda: go_on(model, talk, cache),
            lambda: model(input_ids=MORE, **cache_argument(model, cache)),
            lambda: TINY[name].model()(
                input_ids=MORE, **cache_argument(model, copy.deepcopy(cache))
            ),
        ):
            with pytest.raises(PromptError, match="holds a pruned prompt"):
                use()
        assert isinstance(cache, DynamicCache)
        assert type(cache) is kind
        with tokenprune_hf.prune(model, "random", 9, "compact"):
            assert go_on(model, talk, cache) == right
            emptied: Any = cache
            emptied.reset()
        # An emptied cache is as good as new, also for the plain model.
        text = {"input_ids": MORE, "attention_mask": torch.ones_like(MORE)}
        plain = answer(model, text)
        assert answer(model, {**text, **cache_argument(model, cache)}) == plain


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_were_moved_repeated_or_left_out(name: str) -> None:
    model, inputs = setting(name, ["titt", "tit", "ttit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        talk = torch.cat([first.sequences, MORE.expand(3, -1)], dim=1)
        for change, order in (
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            cache, rows = copy.deepcopy(cache_of(first)), torch.tensor(order)
            change(cache)  # type: ignore[no-untyped-call]
            right = answer(model, whole(inputs, talk[rows], rows))
            assert go_on(model, talk[rows], cache) == right
            again = torch.cat([talk[rows], torch.tensor(right), MORE.expand(len(rows), -1)], 1)
            right = answer(model, whole(inputs, again, rows))
            assert go_on(model, again, cache) == right
        moved_apart = copy.deepcopy(cache_of(first))
        moved_apart.reorder_cache(torch.tensor([2, 0, 1]))
        with pytest.raises(PromptError, match="filled by another prompt"):
            go_on(model, talk, moved_apart)


@pytest.mark.parametrize("name", WITH_A_STATE)
def test_several_sequences_of_a_prompt(name: str) -> None:
    model, inputs = setting(name, ["titt", "tit"])
    rows = torch.tensor([0, 0, 1, 1])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        torch.manual_seed(0)
        options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        talk = torch.cat([first.sequences, MORE.expand(4, -1)], dim=1)
        right = answer(model, whole(inputs, talk, rows))
        assert go_on(model, talk, cache_of(first)) == right


def test_beams_are_refused() -> None:
    model, inputs = setting("llava", ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        for count in (1, 3):
            first = model.generate(
                **inputs,
                **GREEDY,
                num_beams=3,
                num_return_sequences=count,
                return_dict_in_generate=True,
            )
            talk = torch.cat([first.sequences, MORE.expand(count, -1)], dim=1)
            with pytest.raises(PromptError, match="beam search"):
                go_on(model, talk, cache_of(first))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("removed", [3, 4, 6, 9])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_was_cut_back(name: str, removed: int, positions: Positions) -> None:
    """By so much that the answer goes, its last token is left, or text of the prompt goes too."""
    model, inputs = setting(name, ["tittt", "ttit"])
    rows = torch.arange(2)
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5, positions):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        held = first.sequences.shape[1] - 1  # the last token was not read
        cache = cache_of(first)
        cache.crop(-removed)
        if removed == 9:  # five into the prompt, and four tokens stand behind the second image
            talk = torch.cat([first.sequences[:, : held - removed], MORE.expand(2, -1)], dim=1)
            with pytest.raises(PromptError, match="not all of them are text"):
                go_on(model, talk, cache)
            return
        talk = torch.cat([first.sequences[:, : held - removed], MORE.expand(2, -1)], dim=1)
        right = answer(model, whole(inputs, talk, rows))
        assert go_on(model, talk, cache) == right


@pytest.mark.parametrize("name", MODELS)
def test_forward_calls_on_a_cache_that_was_copied_and_cut_back(name: str) -> None:
    model, inputs = setting(name, ["titt", "tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        output = model(**inputs)
        step = torch.tensor([[41, 42], [43, 44]])
        right = model(
            input_ids=step, **cache_argument(model, copy.deepcopy(cache_of(output)))
        ).logits
        tried = copy.deepcopy(cache_of(output))
        model(input_ids=torch.tensor([[51, 52, 53], [54, 55, 56]]), **cache_argument(model, tried))
        tried.crop(-3)
        logits = model(input_ids=step, **cache_argument(model, tried)).logits
        torch.testing.assert_close(logits, right)
        # Into the prompt: its last word is said anew.
        tried.crop(-3)
        word = inputs["input_ids"][:, -1:]
        logits = model(
            input_ids=torch.cat([word, step], dim=1), **cache_argument(model, tried)
        ).logits
        torch.testing.assert_close(logits[:, 1:], right)
        swapped = copy.deepcopy(cache_of(output))
        swapped.reorder_cache(torch.tensor([1, 0]))
        logits = model(input_ids=step.flip(0), **cache_argument(model, swapped)).logits
        torch.testing.assert_close(logits, right.flip(0))


def test_a_shallow_copy_that_was_filled_through_the_other_is_refused() -> None:
    model, inputs = setting("llava", ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        cache = cache_of(model(**inputs))
        other = copy.copy(cache)  # its layers are the same ones
        model(input_ids=MORE, **cache_argument(model, cache))
        with pytest.raises(PromptError, match="no longer holds what was left"):
            model(input_ids=MORE, **cache_argument(model, other))


def test_a_caches_tokens_are_compared_with_those_that_are_passed() -> None:
    model, inputs = setting("llava", ["tit"])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        # By the length of the caller's prompt nothing is cut off: the short one is no longer.
        cache_of(first).crop(-0)
        with pytest.raises(PromptError, match="not those of input_ids"):
            go_on(model, torch.cat([inputs["input_ids"], MORE, MORE], 1), cache_of(first))
        with pytest.raises(PromptError, match="go on with new ones"):
            go_on(model, inputs["input_ids"], cache_of(first))
        assert first.sequences.shape[1] == length + 5
        # What was refused changed nothing.
        talk = torch.cat([first.sequences, MORE], dim=1)
        right = answer(model, whole(inputs, talk, torch.arange(1)))
        assert go_on(model, talk, cache_of(first)) == right


def test_a_cache_that_was_passed_is_known_though_a_tensor_is_returned() -> None:
    model, inputs = setting("llava", ["tit"])
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        said = model.generate(**inputs, **GREEDY, **cache_argument(model, cache))
        talk = torch.cat([said, MORE], dim=1)
        right = answer(model, whole(inputs, talk, torch.arange(1)))
        assert go_on(model, talk, cache) == right


def test_caches_of_other_kinds() -> None:
    model, inputs = setting("llava", ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        plain = model.generate(**inputs, **GREEDY)
        talk = torch.cat([plain, MORE], dim=1)
        right = answer(model, whole(inputs, talk, torch.arange(1)))
        static = model.generate(
            **inputs, **GREEDY, cache_implementation="static", return_dict_in_generate=True
        )
        assert torch.equal(static.sequences, plain)
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache_of(static).layers])
        with pytest.raises(PromptError, match="filled cache"):
            go_on(model, talk, rebuilt)
        changed = cache_of(model.generate(**inputs, **GREEDY, return_dict_in_generate=True))
        changed.layers[0].keys = changed.layers[0].keys + 1
        with pytest.raises(PromptError, match="no longer holds what was left"):
            go_on(model, talk, changed)
    assert right


def test_placeholders_behind_a_cache_of_unknown_content_are_refused() -> None:
    model, inputs = setting("llava", ["tit"])
    with torch.no_grad():
        plain = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        talk = torch.cat([plain.sequences, MORE], dim=1)
        with tokenprune_hf.prune(model, "feature-norm", 5):
            with pytest.raises(PromptError, match="it is not known whether"):
                go_on(model, talk, copy.deepcopy(cache_of(plain)))
            filled = DynamicCache()
            text = model(input_ids=torch.tensor([[5, 6]]), **cache_argument(model, filled))
            model(input_ids=MORE, **cache_argument(model, cache_of(text)))  # no image: as ever


def test_a_call_that_ends_with_an_exception_leaves_no_cache_of_unknown_content() -> None:
    model, inputs = setting("llava", ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        cache = DynamicCache(config=model.config.get_text_config())
        fails = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**inputs, **GREEDY, **cache_argument(model, cache))
        fails.remove()
        assert cache.get_seq_length() > 0
        talk = torch.cat([inputs["input_ids"], MORE], dim=1)
        with pytest.raises(PromptError, match="did not end"):
            go_on(model, talk, cache)
        with pytest.raises(PromptError, match="did not end"):
            model(input_ids=MORE, **cache_argument(model, cache))


def test_trimmed_caches() -> None:
    model, inputs = mllamas.tiny(), mllamas.prompt(["t2t", "t1t"])
    step = torch.tensor([[5], [6]])
    with torch.no_grad():
        with TrimmedAttention(model, 0.1):
            cache = cache_of(model(**inputs))
            right = model(input_ids=step, **cache_argument(model, copy.deepcopy(cache))).logits
            swapped = copy.deepcopy(cache)
            swapped.reorder_cache(torch.tensor([1, 0]))
            logits = model(input_ids=step.flip(0), **cache_argument(model, swapped)).logits
            torch.testing.assert_close(logits, right.flip(0))
            one = copy.deepcopy(cache)
            one.batch_select_indices(torch.tensor([1]))
            logits = model(input_ids=step[1:], **cache_argument(model, one)).logits
            torch.testing.assert_close(logits, right[1:])
        with pytest.raises(PromptError, match="holds a pruned prompt"):
            model(input_ids=step, **cache_argument(model, cache))
        with TrimmedAttention(model, 0.5):
            logits = model(input_ids=step, **cache_argument(model, cache)).logits
            torch.testing.assert_close(logits, right)
