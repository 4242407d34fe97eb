"""Names and shapes that moved between releases of transformers, in every one of them."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import tokenprune_hf
from tests.hf.mllamas import tiny
from tests.hf.models import IMAGE, TINY, VIDEO_LLAVA_IMAGES, prompt
from tokenprune import releases
from tokenprune.errors import UntestedReleaseWarning
from tokenprune_hf.engine import (
    cache_argument,
    cache_of,
    encoder_arguments,
    encoder_names,
    rows_per_picture,
)


class Older(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class Newer(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any: ...


class Both(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, cache: Any = None) -> Any: ...


def test_a_cache_goes_under_the_name_that_the_module_knows() -> None:
    cache = object()
    assert cache_argument(Older(), cache) == {"past_key_values": cache}
    assert cache_argument(Newer(), cache) == {"cache": cache}
    assert cache_argument(Both(), cache) == {"cache": cache}


def test_a_cache_is_found_under_either_name() -> None:
    class Warns(OrderedDict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            assert name != "past_key_values", "an output of today warns here"
            return super().__getitem__(name)

        def __contains__(self, name: object) -> bool:
            assert name != "past_key_values", "and here"
            return super().__contains__(name)

    cache = object()
    assert cache_of({"past_key_values": cache, "use_cache": True}) is cache
    assert cache_of(Warns(cache=cache)) is cache
    assert cache_of({"cache": None, "past_key_values": cache}) is cache
    assert cache_of(Warns(logits=1)) is None
    assert cache_of({}) is None


@pytest.mark.parametrize("name", list(TINY))
def test_a_model_is_told_and_tells_its_cache(name: str) -> None:
    """The engine itself says whether the names are right: a cache under a wrong one stays empty."""
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tit"])
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        output = model(**inputs, **cache_argument(model, cache))
    assert cache_of(output) is cache
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_encoders_get_pixels_under_their_first_name() -> None:
    def function(
        pixel_values: Any = None, pixel_values_images: Any = None, size: Any = None
    ) -> Any:
        """Take the newer and the older name, as Video-LLaVA's does."""

    call = {"input_ids": 1, "pixel_values_images": 2, "size": 3}
    assert encoder_arguments(function, call) == {"pixel_values": 2, "size": 3}
    assert encoder_arguments(function, {"pixel_values": 4}) == {"pixel_values": 4}
    assert encoder_arguments(function, {"size": 3, "pixel_values": None}) is None
    assert encoder_names(function) == ["pixel_values", "pixel_values_images", "size"]


@pytest.mark.filterwarnings("ignore:`pixel_values_images` is deprecated:FutureWarning")
def test_video_llava_takes_the_older_name_of_its_images_too() -> None:
    """Processors of releases between 5.21 and 5.23 still return it."""
    model, inputs = TINY["video_llava"].model(), prompt(TINY["video_llava"], ["tit"])
    renamed = {
        "pixel_values_images" if name == VIDEO_LLAVA_IMAGES else name: value
        for name, value in inputs.items()
    }
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5) as pruning:
        expected = model.generate(**inputs, max_new_tokens=3)
        kept = [one.kept.tolist() for one in pruning.selections]
        assert torch.equal(model.generate(**renamed, max_new_tokens=3), expected)
        assert [one.kept.tolist() for one in pruning.selections] == kept


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "internvl", "gemma3"])
def test_every_picture_has_rows_of_its_own(name: str) -> None:
    """Whether the engine returns an entry for each picture or for each prompt."""
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tiit", "itt"])
    with torch.no_grad():
        encoded = tokenprune_hf.encode(model, **inputs)
    media = encoded.modalities["image"]
    assert media.sizes == [16, 16, 16]
    assert [item.rows.tolist() for item in media.items] == [
        list(range(start, start + 16)) for start in (0, 16, 32)
    ]
    assert int((inputs["input_ids"] == IMAGE).sum()) == 48
    assert rows_per_picture([48], torch.empty(3, 64, 8)) == [16, 16, 16]
    assert rows_per_picture([32, 16], torch.empty(3, 64, 8)) == [16, 16, 16]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_prompts_may_keep_unequal_numbers_of_rows(name: str) -> None:
    """SmolVLM's own forward takes rows in blocks of one size; a batch equals its prompts alone."""
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tii", "ti"])
    length = inputs["input_ids"].shape[1]
    answers = []
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 0.3) as pruning:
        both = model.generate(**inputs, video_frames=[2, 1], max_new_tokens=4)
        assert [len(one) for one in pruning.selections] == [10, 5]
        for row, tiles, told in ((0, slice(0, 2), [2]), (1, slice(2, 3), [1])):
            real = inputs["attention_mask"][row].bool()
            alone = {
                "input_ids": inputs["input_ids"][row : row + 1, real],
                "pixel_values": inputs["pixel_values"].flatten(0, 1)[None, tiles],
            }
            output = model.generate(**alone, video_frames=told, max_new_tokens=4)
            answers.append(output[0, -4:].tolist())
    assert both[:, length:].tolist() == answers


def trimmed(model: Any) -> Any:
    return tokenprune_hf.trim_cross_attention(model, 0.5)


def pruned(model: Any) -> Any:
    return tokenprune_hf.prune(model, "feature-norm", 0.5)


@pytest.mark.parametrize("begin", [pruned, trimmed])
def test_an_untested_release_is_warned_of_at_prune(
    begin: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny() if begin is trimmed else TINY["llava"].model()
    monkeypatch.setenv(releases._WARNED, "")
    # As it is now: transformers puts another module in its own place while it loads models.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "99.1.0")
    with (
        pytest.warns(UntestedReleaseWarning, match=r"transformers 99\.1\.0 .* 5\.19 to 5\.24"),
        begin(model),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(model).remove()
