"""Training a selector: the data, what it learns, and `tokenprune train-selector`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

import tokenprune_hf
from tests.hf.lites import DECODER, lite
from tests.hf.models import EOS, TINY
from tests.hf.test_lite import VOCABULARY, C, noise
from tokenprune.cli import main
from tokenprune.errors import (
    ConfigError,
    InputFileError,
    UnsupportedModelError,
)
from tokenprune_eval.train.data import Example, read_data
from tokenprune_eval.train.training import Recipe, agreement, split, train
from tokenprune_hf.lite.model import LiteModel


def examples(folder: Path, count: int) -> list[list[Example]]:
    """Make rankings that can be learnt: tokens whose first number is high are wanted."""
    from safetensors.torch import save_file

    folder.mkdir()
    found = []
    for number in range(count):
        features = noise(24, C, seed=number)
        media, ranking = folder / f"{number}.safetensors", folder / f"{number}-0.safetensors"
        save_file({"features.0": features.half()}, media)
        scores = features[:, 0].contiguous()
        save_file({"question": torch.tensor([3, 4, 5]), "scores.0": scores}, ranking)
        found.append([Example(media, ranking, 0)])
    return found


@pytest.mark.parametrize(("loss", "least"), [("spearman", 0.4), ("l1", -1.0)])
def test_it_learns_a_ranking(tmp_path: Path, loss: Any, least: float) -> None:
    files = examples(tmp_path / "data", 48)
    learnt, held_out = split(files, 0.125, seed=0)
    assert len(held_out) == 6
    assert not {one.media for one in learnt} & {one.media for one in held_out}
    torch.manual_seed(0)
    model = lite(C, VOCABULARY, "llava").requires_grad_(True)
    before = agreement(model, held_out)
    news: list[dict[str, Any]] = []
    recipe = Recipe(loss=loss, temperature=0.003, epochs=8, batch=4, learning_rate=3e-3)
    best = train(model, learnt, held_out, recipe, tmp_path / "out", news.append)
    losses = [one["loss"] for one in news if "loss" in one]
    assert len(losses) == 8 * 11
    assert sum(losses[-11:]) < sum(losses[:11])
    assert best.correlation >= max(least, before.correlation if loss == "spearman" else -1.0)
    # What was saved is the epoch that is reported, measured once more without the trainer.
    again = LiteModel.load(tmp_path / "out")
    correlations, overlaps = [], []
    for example in held_out:
        features, question, teacher = example.tensors()
        scores = again(features[None], question)[0]
        correlations.append(float(spearmanr(scores.numpy(), teacher.numpy()).statistic))
        wanted = set(teacher.topk(2).indices.tolist())  # 1/16 of 24
        overlaps.append(len(wanted & set(scores.topk(2).indices.tolist())) / 2)
    assert best.correlation == pytest.approx(sum(correlations) / 6, abs=1e-6)
    assert best.overlap[1 / 16] == pytest.approx(sum(overlaps) / 6, abs=1e-6)


def test_recipes_and_splits_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"temperature=0\.0 must be above 0"):
        Recipe(temperature=0.0)
    with pytest.raises(ConfigError, match="cannot be held out"):
        split([[]], 0.1, 0)


def test_lines_that_are_no_data(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    good = '{"image": "a.png", "question": "what ?"}'
    for line, said in (
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a line is"),
        ('{"image": "a.png"}', "line 2: a line is"),
        ('{"image": "a.png", "video": "a.png", "question": "what ?"}', "line 2: a line is"),
        ('{"video": "b.mp4", "question": "what ?"}', "line 2: there is no file"),
    ):
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(InputFileError, match=said):
            read_data(file)
    file.write_text("\n")
    with pytest.raises(InputFileError, match="holds no questions"):
        read_data(file)


def test_the_command_from_images_to_a_pruned_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenprune.media.images import load_image
    from tokenprune_eval.bundled.model import bundled_model_path
    from tokenprune_eval.bundled.scenes import load_scenes
    from tokenprune_hf.loading import ask, load

    questions = load_scenes()[:30:5]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"image": str(one.image), "question": one.question}) for one in questions
        )
    )
    if len({one.image for one in questions}) < 2:
        raise AssertionError("the data must be about two images")
    shape = ["--width", "32", "--mlp-width", "48", "--layers", "2", "--heads", "2"]
    arguments = [
        *("train-selector", "bundled", "--data", str(data), "--out", str(tmp_path / "out")),
        *(*shape, "--kv-heads", "2", "--layer", "1", "--held-out", "0.4"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "held-out files: rank correlation" in printed
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/teacher").iterdir()}
    assert main([*arguments, "--epochs", "2"]) == 0  # rankings are on disk and stay as they are
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out/teacher").iterdir()} == kept
    assert len((tmp_path / "out/training.jsonl").read_text().splitlines()) >= 4

    model, processor = load(str(bundled_model_path()))
    inputs = ask(processor, questions[0].question, image=load_image(questions[0].image))
    path = str(tmp_path / "out")
    with tokenprune_hf.prune(model, "flexselect-lite", 9, path=path) as pruning:
        model.generate(**inputs, max_new_tokens=1)
    assert len(pruning.selections[0].kept) == 9

    for changed, said in (
        (["--heads", "3"], "must be a multiple of --heads 3"),
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--frames", "65"], "--frames 65 is more than the 64"),
        (["--layer", "9"], "layer=9 is no layer"),
        (["--data", str(tmp_path / "none.jsonl")], "cannot be read"),
        (["--init-from", str(tmp_path)], "cannot be loaded"),
    ):
        assert main([*arguments, *changed]) == 2
        assert said in capsys.readouterr().err


def test_questions_that_cannot_be_ranked_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune.errors import OutputError
    from tokenprune.selectors.flexselect import FlexSelect
    from tokenprune_eval.bundled.model import bundled_model_path
    from tokenprune_eval.shared.left_out import LeftOut, NothingLeftError
    from tokenprune_eval.train import data as module
    from tokenprune_hf.loading import ask, load

    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    rows = [("a.png", "what ?"), ("torn.png", "what ?"), ("a.png", "odd ?"), ("b.png", "what ?")]
    lines = [json.dumps({"image": image, "question": text}) for image, text in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    asked = read_data(tmp_path / "data.jsonl")
    model, processor = load(str(bundled_model_path()))
    plain = ask

    def refuse(processor: Any, question: str, **media: Any) -> Any:
        if question == "odd ?":
            raise ValueError("an odd question")
        return plain(processor, question, **media)

    monkeypatch.setattr(module, "ask", refuse)

    def rank(said: list[str], folder: str, layer: int = 1) -> Any:
        done: list[None] = []
        left_out = LeftOut(said.append)
        files = module.rank(
            *(model, processor, asked, tmp_path / folder, FlexSelect(layer=layer), 4),
            lambda: done.append(None),
            left_out,
        )
        assert len(done) == len(asked)
        return files

    said: list[str] = []
    assert [len(own) for own in rank(said, "teacher")] == [1, 1]
    assert len(said) == 2
    assert said[0].startswith(f"{tmp_path / 'a.png'}, 'odd ?' is left out: ValueError: an odd")
    assert said[1].startswith(f"{tmp_path / 'torn.png'}, 'what ?' is left out: ")
    # What every further question would meet ends it.
    with pytest.raises(UnsupportedModelError, match="layer=9 is no layer"):
        rank([], "teacher", layer=9)
    (tmp_path / "file").write_text("")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    import safetensors.torch

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OutputError, match=r"No space left on device\. Make room"):
            rank([], "other")
    asked = asked[1:3]
    with pytest.raises(NothingLeftError, match="no question can be used, for example"):
        rank([], "third")


def test_starting_from_a_checkpoints_decoder(tmp_path: Path) -> None:
    import argparse

    import transformers

    from tokenprune_eval.train.command import _build

    make: Any = transformers
    torch.manual_seed(3)
    source = make.Qwen2Model(make.Qwen2Config(**DECODER, vocab_size=VOCABULARY, rope_theta=5e5))
    source.save_pretrained(tmp_path / "source")
    arguments = argparse.Namespace(
        **{"width": 896, "mlp_width": 1, "layers": 1, "heads": 1, "kv_heads": 1},
        init_from=str(tmp_path / "source"),
        reduction="max",
        layer=None,
        frames=64,
    )
    config = TINY["llava_onevision"].build()
    student = _build(arguments, config, C, Recipe(), 5)
    for name, value in source.state_dict().items():
        assert torch.equal(student.decoder.state_dict()[name], value)
    assert student.config.decoder["hidden_size"] == 32
    student.save(tmp_path / "student")
    again = LiteModel.load(tmp_path / "student")
    question = torch.tensor([EOS, 4])
    assert torch.equal(again(noise(1, 5, C), question), student(noise(1, 5, C), question))
