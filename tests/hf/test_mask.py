"""Selections applied as a mask: what dropping the same tokens gives, in prompts of full length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune_hf
from tests.hf.models import STATEFUL, TINY, mixing, prompt
from tokenprune import PruningConfig
from tokenprune.config import Positions
from tokenprune.errors import ConfigError, LayoutError
from tokenprune.masks import Causal, PromptLayout, visible_keys
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.layout import image_spans_of
from tokenprune_hf.shortened import Application

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def setting(name: str) -> tuple[Any, dict[str, Any]]:
    tiny = TINY[name]
    # The forward of Gemma 4 takes no videos in some releases of transformers.
    videos = tiny.video and name != "gemma4"
    samples = ["tittvt", "vt"] if videos else ["titit", "it"]
    return tiny.model(), prompt(tiny, mixing(name, samples))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", [name for name in TINY if name not in STATEFUL])
def test_mask_gives_the_logits_of_dropping(name: str, positions: Positions) -> None:
    model, inputs = setting(name)
    with torch.no_grad():
        plain = model(**inputs).logits
        with tokenprune_hf.prune(model, "feature-norm", 3, positions) as pruning:
            dropped = model(**inputs).logits
            selections = pruning.selections
            answers = model.generate(**inputs, **GREEDY)
        with tokenprune_hf.prune(model, "feature-norm", 3, positions, apply="mask") as pruning:
            masked = model(**inputs).logits
            assert torch.equal(model.generate(**inputs, **GREEDY), answers)
    assert [one.kept.tolist() for one in pruning.selections] == [
        one.kept.tolist() for one in selections
    ]
    assert masked.shape == plain.shape
    for sample, mask in enumerate(inputs["attention_mask"].bool()):
        # The words behind the last image or video.
        torch.testing.assert_close(masked[sample, -3:], dropped[sample, -3:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(masked[sample, -3:], plain[sample, -3:], rtol=1e-2, atol=1e-2)
        # The first token has seen nothing that could be hidden.
        first = int(mask.long().argmax())
        torch.testing.assert_close(masked[sample, first], plain[sample, first])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_going_on_from_a_masked_prompt(name: str) -> None:
    """Beams, and a second question on the cache of the first, hide the same tokens."""
    model, inputs = setting(name)
    found = []
    ways: tuple[Application, ...] = ("drop", "mask")
    for way in ways:
        with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 3, apply=way):
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
            found.append((beams.tolist(), second.tolist()))
    assert found[0] == found[1]


def test_a_selection_is_a_mask_over_the_prompts_layout() -> None:
    """The same layout that sparse masks are made from, and its matrix as a 4-D attention mask."""
    model = TINY["llava"].model()
    inputs = prompt(TINY["llava"], ["titit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 3, apply="mask") as pruning:
        expected = model(**inputs).logits
    (images,) = image_spans_of(model, inputs["input_ids"], inputs)
    layout = PromptLayout(inputs["input_ids"].shape[1], tuple(images))
    mask = Causal(layout.length) & visible_keys(layout.kept(pruning.selections))
    with torch.no_grad():
        found = model(**{**inputs, "attention_mask": mask.matrix()[None]}).logits
    text = layout.image_of < 0  # a hidden token sees itself here, and nothing sees it
    torch.testing.assert_close(found[:, text], expected[:, text], rtol=1e-4, atol=1e-4)
    with pytest.raises(LayoutError, match=r"selections of \[36\] tokens, and images of \[36, 36\]"):
        layout.kept(pruning.selections[:1])


def test_everything_kept_hides_nothing() -> None:
    model, inputs = setting("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with tokenprune_hf.prune(model, PruningConfig("random", 1.0), apply="mask"):
            masked = model(**inputs).logits
    real = inputs["attention_mask"].bool()  # what padding says has no meaning
    torch.testing.assert_close(masked[real], plain[real])


def test_another_word_is_an_error() -> None:
    model, _ = setting("llava")
    with pytest.raises(ConfigError, match=r"apply='masks' is not .* Did you mean 'mask'"):
        tokenprune_hf.prune(model, "random", 3, apply="masks")  # type: ignore[arg-type]
