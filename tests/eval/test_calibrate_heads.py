"""Heads against the engine's own attention maps, and `tokenprune calibrate-heads`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

pytest.importorskip("rich", reason="calibrate-heads needs the extra `train`")

from tests.core.test_masks import by_words
from tests.hf.models import IMAGE, TINY, prompt
from tests.vllm.checkpoints import save
from tokenprune.cli import main
from tokenprune.errors import ConfigError, InputFileError, LayoutError, TokensError
from tokenprune.masks import HeadCategories, ImageSpan, PromptLayout
from tokenprune.masks.coverage import coverage, thresholds
from tokenprune.masks.patterns import CATEGORIES
from tokenprune.masks.sinks import Sinks
from tokenprune.media.images import load_image
from tokenprune_eval.calibrate_heads import (
    Prompt,
    ask_about,
    calibrate_heads,
    find_sinks,
    measure_heads,
    read_prompts,
)
from tokenprune_eval.calibrate_heads import measure as module
from tokenprune_hf.layout import decoder_of, identity_of, own_mask
from tokenprune_hf.loading import load

tf: Any = transformers  # not typed the way it is called

FAMILIES = ["qwen2_vl", "internvl", "llava_onevision"]

NOTHING = Sinks((0, -1), {}, 0, {}, 0, (), 0, 0, 64, 20.0)
"""As if the first and the last token of each image were sinks."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of noise, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("none")
    (folder / ".hidden.png").write_text("none")
    return folder


def spans_by_hand(ids: list[int]) -> tuple[ImageSpan, ...]:
    starts = [at for at, one in enumerate(ids) if one == IMAGE and (at == 0 or ids[at - 1] != one)]
    ends = [next(at for at in range(start, len(ids)) if ids[at] != IMAGE) for start in starts]
    return tuple(ImageSpan(*one) for one in zip(starts, ends, strict=True))


def eager_maps(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the engine's attention [layers, H, L, L]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, use_cache=False, output_attentions=True)
    model.set_attn_implementation(before)
    return torch.cat(output.attentions)


def held_by_hand(maps: Tensor, layout: PromptLayout, forward: bool = False) -> Tensor:
    """Return [layers, H, 4] from whole maps and the sentences that define the masks.

    With `forward`, an image's tokens see what is behind them in it, as in Gemma 3; every mask but
    a sink's from outside its window lets that through.
    """
    held = torch.zeros(*maps.shape[:2], len(CATEGORIES))
    contested = [at for span in layout.images[1:] for at in range(span.start, span.stop)]
    for number, category in enumerate(CATEGORIES):
        for query in contested:
            keys = [
                key
                for key in range(layout.length)
                if by_words(category, query, key, layout) or (forward and key > query)
            ]
            held[..., number] += maps[:, :, query, keys].sum(dim=-1) / len(contested)
    return held


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_measured_is_in_the_attention_maps(
    checkpoints: dict[str, Path], pictures: Path, name: str
) -> None:
    model, processor = load(str(checkpoints[name]))
    model.set_attn_implementation("sdpa")
    if name == "llava_onevision":  # has no delimiters, and this tokenizer drops line breaks
        processor.chat_template = processor.chat_template.replace("<image>", "<image>w3")
    prompts = [Prompt(tuple(pictures / f"{one}.png" for one in (4, 1, 6)), "w5 w6")]
    measured = measure_heads(model, processor, prompts, NOTHING, block=16)
    inputs = dict(ask_about(processor, "w5 w6", [load_image(one) for one in prompts[0].images]))
    spans = spans_by_hand(inputs["input_ids"][0].tolist())
    sinks = sorted({one.start for one in spans} | {one.stop - 1 for one in spans})
    layout = PromptLayout(inputs["input_ids"].shape[1], spans, tuple(sinks))
    assert len(spans) == 3
    expected = held_by_hand(eager_maps(model, inputs), layout)
    torch.testing.assert_close(measured.prompts[0].held, expected, rtol=1e-3, atol=1e-4)
    assert float(expected[..., :3].min()) < 0.9
    assert model.config._attn_implementation == "sdpa"
    assert all(not layer._forward_pre_hooks for layer in decoder_of(model).layers)


def test_gemma_sees_forward_in_images_and_through_windows() -> None:
    def build() -> Any:
        config = TINY["gemma3"].build()
        config.text_config.layer_types = ["sliding_attention", "full_attention"]
        return config

    model = replace(TINY["gemma3"], build=build).model()
    inputs = prompt(TINY["gemma3"], ["tititit"], words=12)
    layout = PromptLayout(
        inputs["input_ids"].shape[1], spans_by_hand(inputs["input_ids"][0].tolist())
    )
    assert layout.length > 64 + 16
    decoder = decoder_of(model)
    modules = [layer.self_attn for layer in decoder.layers]
    held: list[Tensor] = []

    class Observer:
        def see_states(self, number: int, states: Tensor) -> None:
            assert states.shape[0] == layout.length

        def see_attention(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
            own = own_mask(model, modules[number], layout)
            held.append(coverage(query, key, layout, scale=scale, model=own))

    module._run(model, inputs, Observer())
    maps = eager_maps(model, inputs)
    assert float(maps[0, :, layout.images[1].start, layout.images[1].stop - 1].min()) > 0
    for number, one in enumerate(modules):
        own = own_mask(model, one, layout).matrix()[0]
        # Text before the first image sees nothing else in either.
        assert torch.equal(maps[number].sum(dim=0) > 0, own)
    torch.testing.assert_close(
        torch.stack(held), held_by_hand(maps, layout, forward=True), rtol=1e-3, atol=1e-4
    )


def test_a_sink_that_the_model_has_is_found(
    checkpoints: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer is given a key that knows the first token of each image, and wants it."""
    model, processor = load(str(checkpoints["qwen2_vl"]))
    prompts = read_prompts([pictures], images=3, prompts=2, question="w5")
    assert find_sinks(model, processor, prompts).places == ()
    decoder = decoder_of(model)
    attention = decoder.layers[1].self_attn
    spans: list[tuple[ImageSpan, ...]] = []
    plain = module._prepare

    def prepare(*arguments: Any) -> Any:
        inputs, layout = plain(*arguments)
        spans.append(layout.images)
        return inputs, layout

    monkeypatch.setattr(module, "_prepare", prepare)

    def enlarge(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        places = [span.start for span in spans[-1]]
        slowest = slice(attention.head_dim // 2 - 1, None, attention.head_dim)  # hardly rotated
        changed[:, places, slowest] = 300.0
        return changed

    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.fill_(1.0)
    hook = attention.k_proj.register_forward_hook(enlarge)
    try:
        sinks = find_sinks(model, processor, prompts)
        measured = measure_heads(model, processor, prompts, sinks)
    finally:
        hook.remove()
    assert sinks.attended == {0: 1.0}
    assert (sinks.attended_in, sinks.images, sinks.places) == (4, 6, (0,))
    assert not sinks.can_be_massive  # 64 wide
    heads = measured.choose(thresholds(2))
    assert heads.categories[1] == ("sink", "sink")
    assert heads.sinks == (0,)


def test_massive_activations_that_the_model_has_are_found(pictures: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 4}
    folder = save("qwen2_vl", tmp_path, text_config=wide, vision_config={"hidden_size": 512})
    model, processor = load(str(folder))
    prompts = read_prompts([pictures], images=3, prompts=1, question="w5")
    inputs = ask_about(processor, "w5", [load_image(one) for one in prompts[0].images])
    spans = spans_by_hand(inputs["input_ids"][0].tolist())

    def enlarge(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        for number, place in enumerate((0, spans[1].stop - 2, spans[2].stop - 2, spans[0].start)):
            changed[:, place, 77] = 1e4 * (-1) ** number
        return changed

    hook = decoder_of(model).layers[0].register_forward_hook(enlarge)
    try:
        sinks = find_sinks(model, processor, prompts)
    finally:
        hook.remove()
    assert (sinks.width, sinks.can_be_massive) == (512, True)
    assert sinks.dimensions == (77,)
    assert sinks.massive == {-2: pytest.approx(2 / 3)}
    assert (sinks.tokens, sinks.covered) == (3, 2)


def test_a_model_is_known_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load(str(checkpoints["qwen2_vl"]))
    known = identity_of(model)
    assert known.differences(identity_of(model.to(torch.bfloat16))) == []
    other, _ = load(str(save("qwen2_vl", tmp_path / "other", seed=1)))
    assert known.differences(identity_of(other)) == ["its weights are others"]
    third, _ = load(str(checkpoints["internvl"]))
    assert known.differences(identity_of(third))


def test_what_cannot_be_calibrated_is_refused(checkpoints: dict[str, Path], pictures: Path) -> None:
    model, processor = load(str(checkpoints["qwen2_vl"]))
    two = Prompt((pictures / "0.png", pictures / "1.png"), "w5")
    with pytest.raises(LayoutError, match="prompt 2 has 1 image"):
        calibrate_heads(model, processor, [two, replace(two, images=two.images[:1])])
    with pytest.raises(ConfigError, match="nothing to measure"):
        calibrate_heads(model, processor, [])
    with pytest.raises(ConfigError, match="block=0"):
        calibrate_heads(model, processor, [two], block=0)
    with torch.no_grad():
        decoder_of(model).layers[1].self_attn.q_proj.bias.fill_(torch.nan)
    before = model.config._attn_implementation
    with pytest.raises(TokensError, match="NaN or infinite"):
        calibrate_heads(model, processor, [two])
    assert model.config._attn_implementation == before
    assert all(not layer._forward_pre_hooks for layer in decoder_of(model).layers)


# Prompts ----------------------------------------------------------------------------------------


def test_pictures_are_drawn_without_replacement(pictures: Path) -> None:
    prompts = read_prompts([pictures], images=3, prompts=5, seed=4)
    drawn = [file.name for one in prompts for file in one.images]
    assert len(prompts) == 2
    assert len(set(drawn)) == 6 == sum(name.endswith(".png") for name in drawn)
    assert ".hidden.png" not in drawn
    assert prompts == read_prompts([pictures], images=3, prompts=5, seed=4)
    assert prompts != read_prompts([pictures], images=3, prompts=5, seed=5)
    assert len(read_prompts([pictures], images=3, prompts=1)) == 1
    with pytest.raises(InputFileError, match="7 pictures in it, and a prompt needs 8"):
        read_prompts([pictures], images=8)
    with pytest.raises(ConfigError, match="images=1 is too small"):
        read_prompts([pictures], images=1)


def test_images_that_touch_are_put_apart() -> None:
    assert module._apart("a<i><i><i>b<i>", "<i>") == "a<i>\n<i>\n<i>b<i>"
    assert module._apart("<s><i></s><s><i></s>", "<i>") == "<s><i></s><s><i></s>"


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    good = {"images": ["a.png", "in/b.png"], "question": "w5"}
    file.write_text(json.dumps(good) + "\n\n")
    found = read_prompts([file])
    assert found == [Prompt((tmp_path / "a.png", tmp_path / "in" / "b.png"), "w5")]
    for line, said in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a line is"),
        (json.dumps({**good, "images": ["a.png"]}), "two or more images"),
        (json.dumps({**good, "images": ["a.png", 3]}), "line 2: a line is"),
        (json.dumps({**good, "question": " "}), "line 2: a line is"),
    ):
        file.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(InputFileError, match=said):
            read_prompts([file])
    file.write_text("\n")
    with pytest.raises(InputFileError, match="no prompt in it"):
        read_prompts([file])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputFileError, match="not UTF-8"):
        read_prompts([file])
    with pytest.raises(InputFileError, match="cannot be read"):
        read_prompts([tmp_path / "none.jsonl"])


# The command ------------------------------------------------------------------------------------


def test_command(
    checkpoints: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "heads.json"
    arguments = ["--data", str(pictures), "--out", str(out), "--images", "3", "--prompts", "2"]
    arguments += ["--alpha", "0.6", "0.5", "--block", "16", "--question", "w5", "--sink", "0.5"]
    assert main(["calibrate-heads", str(checkpoints["qwen2_vl"]), *arguments]) == 0
    printed = capsys.readouterr().out
    heads = HeadCategories.load(out)
    model, processor = load(str(checkpoints["qwen2_vl"]))
    limits = thresholds(2, (0.6, 0.5), sink=0.5)
    prompts = read_prompts([pictures], 3, 2, question="w5")
    assert heads == calibrate_heads(model, processor, prompts, limits, block=16)
    assert heads.model.differences(identity_of(model)) == []
    assert (heads.prompts, heads.block, heads.thresholds.alpha) == (2, 16, (0.6, 0.5))
    assert 0 < heads.density <= 1
    assert f"density: {100 * heads.density:.1f} % of the causal blocks of 16" in printed
    held = measure_heads(model, processor, prompts, find_sinks(model, processor, prompts)).prompts
    median = float(np.median(np.stack([one.held[..., 1].numpy() for one in held]).mean(axis=0)))
    assert f", intra {100 * median:.1f} %," in printed
    assert "hidden states of 64 numbers cannot be 20 times" in printed
    chosen = next(line.split() for line in printed.splitlines() if line.endswith("chosen"))
    assert chosen[:3] == ["0.6", "to", "0.5"]
    assert [int(one) for one in chosen[4:8]] == list(heads.counts().values())
    assert f"tokenprune_hf.sparse(model, '{out}')" in printed
    assert [one.name for one in out.parent.iterdir()] == ["heads.json"]


def test_what_is_measured_is_kept_when_interrupted(
    checkpoints: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, calls = module._prepare, []

    def prepare(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:  # three to look for sinks, two of three to measure
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "_prepare", prepare)
    out = tmp_path / "heads.json"
    model = str(checkpoints["qwen2_vl"])
    arguments = ["--data", str(pictures), "--out", str(out), "--images", "2"]
    assert main(["calibrate-heads", model, *arguments]) == 130
    assert f"the heads by 2 of 3 prompts are in {out}" in capsys.readouterr().err
    assert HeadCategories.load(out).prompts == 2


def test_bad_input_is_one_line_on_stderr(
    checkpoints: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("0.png", "1.png"):
        (broken / name).write_bytes((pictures / name).read_bytes()[:400])
    data, model, out = str(pictures), str(checkpoints["qwen2_vl"]), str(tmp_path / "heads.json")
    for arguments, said in (
        (["--data", str(broken), "--images", "2"], "is damaged or incomplete"),
        (["--data", str(tmp_path / "none")], "the data cannot be read"),
        (["--data", data, "--images", "1"], "--images 1 is too small"),
        (["--data", data, "--images", "9"], "7 pictures in it, and a prompt needs 9"),
        (["--data", data, "--prompts", "0"], "--prompts 0 is too small"),
        (["--data", data, "--block", "0"], "--block 0 is too small"),
        (["--data", data, "--alpha", "1.5"], "alpha=1.5 is no share"),
        (["--data", data, "--alpha", "1", "1", "1"], "has 3 numbers"),
        (["--data", data, "--dense", "2"], "dense=2.0 is no share"),
        (["--data", data, "--out", str(tmp_path)], "is a folder"),
    ):
        assert main(["calibrate-heads", model, "--out", out, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("tokenprune calibrate-heads: ")
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert not Path(out).exists()
    assert main(["calibrate-heads", "nowhere/model", "--data", data, "--out", out]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_prompts_that_cannot_be_used_are_left_out_and_said(
    checkpoints: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture that cannot be read, a prompt refused when sinks are sought, one when measured."""
    (tmp_path / "torn.png").write_bytes((pictures / "0.png").read_bytes()[:400])
    rows = [(0, 1), (2, 3), (4, 5), (5, 6)]
    lines = [[str(pictures / f"{one}.png") for one in row] for row in rows]
    lines.append([str(pictures / "0.png"), "torn.png"])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"images": one, "question": "w5"}) + "\n" for one in lines))
    plain, seen = module._prepare, []

    def prepare(model: Any, processor: Any, asked: Prompt) -> Any:
        seen.append(asked)
        if len(seen) == 2:  # of four, while sinks are sought
            raise IndexError("odd picture")
        if len(seen) == 5:  # the first of three that are measured
            raise TokensError("the attention is not finite.")
        return plain(model, processor, asked)

    monkeypatch.setattr(module, "_prepare", prepare)
    out = tmp_path / "heads.json"
    model = str(checkpoints["qwen2_vl"])
    assert main(["calibrate-heads", model, "--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'torn.png'} is left out: " in printed
    assert f"{seen[1].name} is left out: IndexError: odd picture." in printed
    assert f"{seen[4].name} is left out: the attention is not finite." in printed
    assert HeadCategories.load(out).prompts == 2
    assert len(seen) == 4 + 3
    assert seen[1] not in seen[4:]
