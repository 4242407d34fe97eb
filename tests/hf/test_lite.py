"""flexselect-lite: its scores against attention maps, its folder, and how it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
import tokenprune_hf
from tests.hf.lites import lite, saved
from tests.hf.models import TINY, VIDEO, prompt
from tokenprune import VisualTokens
from tokenprune.errors import (
    ConfigError,
    InputFileError,
    OptionError,
    TokenPruneError,
    UnsupportedModelError,
)
from tokenprune_hf.lite.model import LiteModel

C, VOCABULARY = 12, 96


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_scores_are_the_last_layers_attention(reduction: Any) -> None:
    model = lite(C, VOCABULARY, "llava")
    object.__setattr__(model.config, "reduction", reduction)
    features, question = noise(2, 9, C), torch.tensor([5, 6, 7, 8])
    with torch.no_grad():
        scores = model(features, question)
        model.decoder.set_attn_implementation("eager")
        words = model.decoder.embed_tokens(question).expand(2, -1, -1)
        states = torch.cat([model.projector(features), words], dim=1)
        maps = model.decoder(inputs_embeds=states, output_attentions=True).attentions[-1]
    part = maps[:, :, -4:, :9]
    expected = part.amax((1, 2)) if reduction == "max" else part.mean((1, 2))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def test_a_video_is_scored_in_sets(tmp_path: Path) -> None:
    options = saved(tmp_path / "lite", C, VOCABULARY, "llava")
    features, question = noise(20, C), torch.tensor([5, 6, 7])
    tokens = VisualTokens((5, 2, 2), features=features, question=question)
    selection = tokenprune.select(tokens, "flexselect-lite", 6, frames_per_set=2, **options)
    model = LiteModel.load(tmp_path / "lite")
    expected = []
    for frames, budget in (([0, 3], 2), ([1, 4], 2), ([2], 2)):
        own = [4 * frame + cell for frame in frames for cell in range(4)]
        with torch.no_grad():
            scores = model(features[own][None], question)[0]
        expected += [own[place] for place in scores.topk(budget).indices.tolist()]
        assert selection.scores is not None
        torch.testing.assert_close(selection.scores[own], scores)
    assert selection.kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "video_llava"])
def test_inside_a_model(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["tvt"])
    encoded = tokenprune_hf.encode(model, needs=("features",), **inputs)
    (item,) = encoded.modalities["video"].items
    assert item.tokens.features is not None
    width = item.tokens.features.shape[1]
    options = saved(tmp_path / "lite", width, VOCABULARY, name)
    with torch.no_grad(), tokenprune_hf.prune(model, "flexselect-lite", 6, **options) as pruning:
        model(**inputs)
    ids = inputs["input_ids"][0]
    after = ids[int((ids == VIDEO).nonzero()[-1]) + 1 :]
    with torch.no_grad():
        scores = LiteModel.load(tmp_path / "lite")(item.tokens.features[None], after)[0]
    (selection,) = pruning.selections
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores, scores)
    with pytest.raises(UnsupportedModelError, match="trained for a"):
        tokenprune_hf.prune(TINY["llava_next"].model(), "flexselect-lite", 6, **options)


def test_features_and_words_of_another_model() -> None:
    model = lite(C, VOCABULARY, "llava")
    with pytest.raises(UnsupportedModelError, match=r"features of width 12 .* 13 wide"):
        model(noise(1, 4, 13), torch.tensor([3]))
    for question in ([VOCABULARY], []):
        with pytest.raises(UnsupportedModelError, match="ids below 96"):
            model(noise(1, 4, C), torch.tensor(question, dtype=torch.int64))


def test_folders_that_are_no_selectors(tmp_path: Path) -> None:
    def refuse(path: Path, error: type[TokenPruneError], said: str) -> None:
        tokens = VisualTokens((1, 1, 2), features=noise(2, C), question=torch.tensor([3]))
        with pytest.raises(error, match=said):
            tokenprune.select(tokens, "flexselect-lite", 1, path=str(path))

    refuse(tmp_path / "nowhere", InputFileError, "there is no selector at")
    with pytest.raises(OptionError, match="needs the option path"):
        tokenprune.select(VisualTokens((1, 1, 1)), "flexselect-lite", 1)
    good = tmp_path / "good"
    lite(C, VOCABULARY, "llava").save(good)
    other = Path(shutil.copytree(good, tmp_path / "other"))
    (other / "config.json").write_text('{"model_type": "llava"}')
    refuse(other, InputFileError, "does not belong to a selector")
    (other / "config.json").write_text("{")
    refuse(other, InputFileError, "is damaged")
    values = json.loads((good / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "colour": "red"}))
    refuse(other, ConfigError, "another version of tokenprune")
    (other / "config.json").write_text(json.dumps({**values, "format": 2}))
    refuse(other, ConfigError, "format 2 .*newer version.*train-selector")
    assert values.pop("format") == 1
    (other / "config.json").write_text(json.dumps(values))
    assert LiteModel.load(other).config == LiteModel.load(good).config
    cut = Path(shutil.copytree(good, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-50])
    refuse(cut, InputFileError, "weights of the selector .* cannot be read")
