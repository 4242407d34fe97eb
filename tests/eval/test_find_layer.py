"""`find_layer` against attention maps, and `tokenprune find-layer` from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("av", reason="find-layer needs the extra `train`")
pytest.importorskip("matplotlib", reason="find-layer needs the extra `train`")
pytest.importorskip("scipy", reason="find-layer needs the extra `train`")

import av
import transformers

from tests.hf.models import IMAGE, VIDEO
from tests.hf.test_flexselect import attention_by_hand, encoder_rows
from tokenprune.cli import main
from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError, InputFileError, UnsupportedModelError
from tokenprune_eval.find_layer import (
    LayerRecall,
    Needle,
    Run,
    drawn_needles,
    find_layer,
    read_needles,
)
from tokenprune_eval.find_layer import measure as module
from tokenprune_hf.loading import ask, load

Frames = NDArray[np.uint8]

tf: Any = transformers  # not typed the way it is called

FAMILIES = ["llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def noise(*shape: int, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def noisy_needles(height: int = 48, width: int = 64) -> list[Needle]:
    return [
        Needle(Image.fromarray(noise(height, width, seed=5)), "w5 w6 w7", "first"),
        Needle(Image.fromarray(noise(height, width, seed=6)), "w8", "second"),
    ]


def write_video(file: Path, frames: Frames) -> Path:
    with av.open(str(file), "w") as container:
        stream = cast(Any, container.add_stream("libx264", rate=5))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


# Against a calculation by hand ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_recall_is_that_of_the_attention_maps(
    checkpoints: dict[str, Path], name: str, reduction: Any
) -> None:
    """Frames replaced, tokens ranked and counted in loops, with the engine's eager attention."""
    model, processor = load(str(checkpoints[name]))
    video, needles = noise(7, 48, 64), noisy_needles()
    result = find_layer(model, processor, [video], needles, reduction=reduction, repeats=2, seed=3)
    assert result.layers == (0, 1)
    assert [(run.video, run.needle) for run in result.runs] == [(0, 0), (0, 0), (0, 1), (0, 1)]
    for run in result.runs:
        assert_by_hand(model, processor, name, video, needles[run.needle], run, reduction, 1)


def assert_by_hand(
    model: Any,
    processor: Any,
    name: str,
    video: Frames,
    needle: Needle,
    run: Run,
    reduction: str,
    sets: int,
) -> None:
    in_pairs = name.startswith("qwen")
    step = run.frames[0] // 2 if in_pairs else run.frames[0]
    steps = 4 if in_pairs else 7
    assert run.frames == ((2 * step, 2 * step + 1) if in_pairs else (step,))
    assert 0 < step < steps - 1
    changed = video.copy()
    for frame in run.frames:
        changed[frame] = np.asarray(needle.image)
    inputs = dict(ask(processor, needle.question, video=changed))
    with torch.no_grad():
        rows, _ = encoder_rows(model, inputs, "image" if name == "internvl" else "video")
        ids = inputs["input_ids"][0]
        place = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0].tolist()
        tokens = len(place) // steps  # without the one newline of LLaVA-OneVision
        assert (run.tokens, run.grid[0]) == (tokens, steps)
        own = [token for token in range(steps * tokens) if (token // tokens) % sets == step % sets]
        assert run.ranked == len(own)
        dropped = {place[token] for token in range(steps * tokens)} - {place[one] for one in own}
        columns = [column for column in range(len(ids)) if column not in dropped]
        row_of = {column: rows[row] for row, column in enumerate(place)}
        maps = attention_by_hand(model, name, inputs, columns, row_of)
    questions = len(ids) - 1 - place[-1]
    asked = [columns.index(place[token]) for token in own]
    for layer, found in enumerate(run.found):
        part = maps[layer][:, -questions:][..., asked]
        scores = part.amax((0, 1)) if reduction == "max" else part.mean((0, 1))
        best = sorted(range(len(own)), key=lambda at: (-float(scores[at]), at))[:tokens]
        assert found == sum(own[at] // tokens == step for at in best)


def test_a_long_video_is_ranked_in_the_set_of_the_needle(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRAMES_PER_SET", 4)
    model, processor = load(str(checkpoints["llava_onevision"]))
    video, needles = noise(7, 48, 64), noisy_needles()
    result = find_layer(model, processor, [video], needles, repeats=3)
    for run in result.runs:
        assert_by_hand(
            model, processor, "llava_onevision", video, needles[run.needle], run, "max", 2
        )
    assert {run.frames[0] % 2 for run in result.runs} == {0, 1}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_layer_that_looks_for_the_needle_finds_all_of_it(
    checkpoints: dict[str, Path], sign: float
) -> None:
    """Layer 0 is given a key that tells white from black, and a query that asks for white."""
    model, processor = load(str(checkpoints["llava_onevision"]))
    black = np.zeros((12, 48, 64, 3), np.uint8)
    needle = Needle(Image.new("RGB", (30, 20), "white"), "w5", "white")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "vision_tower" in parameter_name and "position_embedding" in parameter_name:
                parameter.zero_()  # all tokens of a plain frame are alike now
        inputs = dict(ask(processor, "w5", video=np.concatenate([black[:1], 255 - black[:1]])))
        rows, _ = encoder_rows(model, inputs, "video")
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True))
        attention = model.model.language_model.layers[0].self_attn
        size, slowest = attention.head_dim, attention.head_dim // 2 - 1  # hardly rotated
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.q_proj.bias[slowest::size] = 4.0 * sign
        attention.k_proj.weight[slowest::size] = 4.0 * (rows[9] - rows[0])
    result = find_layer(model, processor, [black], [needle], repeats=4)
    assert result.recall[0] == (1.0 if sign > 0 else 0.0)
    assert result.best == 0 or sign < 0
    assert result.found or sign < 0
    assert result.chance == pytest.approx(1 / 12)


# Depths, needles and numbers --------------------------------------------------------------------


def places(frames: int, per_step: int) -> list[int]:
    return list(module._places(np.zeros((frames, 2, 2, 3), np.uint8), 0, per_step))


def test_depths_are_the_published_ones() -> None:
    assert places(32, 1) == list(range(5, 27))
    assert places(11, 1) == [5]
    assert places(10, 1) == list(range(1, 9))
    assert places(3, 1) == [1]
    # Pairs: frames 5 to 26 lie in steps 2 to 13.
    assert places(32, 2) == list(range(2, 14))
    assert places(11, 2) == [2]
    assert places(10, 2) == [1, 2, 3]
    assert places(5, 2) == [1]
    for frames, per_step in ((2, 1), (4, 2), (0, 1)):
        with pytest.raises(ConfigError, match=f"video of {frames} frames is too short"):
            places(frames, per_step)


def test_depths_follow_from_the_seed_alone(checkpoints: dict[str, Path]) -> None:
    model, processor = load(str(checkpoints["llava_onevision"]))
    videos, needles = [noise(14, 32, 32), noise(12, 32, 48, seed=1)], noisy_needles()
    seen: list[int] = []
    torch.manual_seed(1)
    np.random.seed(1)
    first = find_layer(
        model, processor, videos, needles, repeats=3, on_run=lambda r: seen.append(len(r.runs))
    )
    assert seen == list(range(1, 13))
    assert first.planned == 12
    torch.manual_seed(2)
    np.random.seed(2)
    state = torch.get_rng_state()
    again = find_layer(model, processor, videos, needles, repeats=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.runs == first.runs
    other = find_layer(model, processor, videos, needles, repeats=3, seed=1)
    assert [run.frames for run in other.runs] != [run.frames for run in first.runs]
    # Depths of one needle differ while there are others left: 5 to 8 here, and 5 to 6.
    depths = [run.frames for run in first.runs]
    assert all(len(set(depths[at : at + 3])) == 3 for at in (0, 3))
    assert all(set(depths[at : at + 3]) == {(5,), (6,)} for at in (6, 9))


def test_means_ties_and_intervals() -> None:
    def result(*found: tuple[int, ...]) -> LayerRecall:
        runs = tuple(Run(0, 0, (5,), (12, 2, 5), 10, 120, one) for one in found)
        return LayerRecall((0, 2, 3), runs, len(runs), "max", 0)

    # The same recalls in another order are a tie, to the last bit.
    three = result((1, 7, 3), (3, 3, 7), (7, 1, 1))
    assert len(set(three.recall)) == 1
    assert three.best == 0
    assert result((1, 2, 9)).best == 3
    assert result((1, 2, 9)).intervals() == (None, None, None)
    low, high = cast(tuple[float, float], three.intervals()[0])
    # t of two degrees of freedom is 4.3027.
    deviation = math.sqrt(sum((one - 11 / 30) ** 2 for one in (0.1, 0.3, 0.7)) / 2)
    assert low == 0.0
    assert high == pytest.approx(min(1.0, 11 / 30 + 4.3027 * deviation / 3**0.5))
    assert not three.found
    narrow = result((5, 0, 0), (6, 0, 0), (7, 0, 0)).intervals()[0]
    assert narrow == pytest.approx((0.6 - 4.3027 * 0.1 / 3**0.5, 0.6 + 4.3027 * 0.1 / 3**0.5), 1e-4)
    same = cast(tuple[float, float], result((9, 1, 1), (9, 1, 1)).intervals()[0])
    assert same == pytest.approx((0.9, 0.9))
    assert result((9, 1, 1), (9, 1, 1)).found


def test_a_needle_is_whole_in_the_frame() -> None:
    needle = Image.new("RGB", (40, 40), (10, 200, 10))
    needle.paste((200, 10, 10), (10, 10, 30, 30))
    video = noise(6, 40, 80)
    before = video.copy()
    hidden = cast(Frames, module._hide(video, [2, 3], needle))
    assert np.array_equal(video, before)
    assert np.array_equal(np.delete(hidden, [2, 3], axis=0), np.delete(before, [2, 3], axis=0))
    for frame in hidden[2:4]:
        assert np.array_equal(frame[:, 20:60], np.asarray(needle))
        assert (frame[:, :20] == (10, 200, 10)).all()
        assert (frame[:, 60:] == (10, 200, 10)).all()


def test_drawn_needles_show_what_is_asked() -> None:
    needles = drawn_needles()
    assert len({needle.question for needle in needles}) == len(needles) == 6
    for needle in needles:
        pixels = np.asarray(needle.image)
        shown = (pixels != pixels[0, 0]).any(axis=-1)
        assert 0.1 < shown.mean() < 0.6
        assert len(np.unique(pixels[shown], axis=0)) == 1


def test_wrong_arguments_are_refused(checkpoints: dict[str, Path]) -> None:
    model, processor = load(str(checkpoints["llava_onevision"]))
    video, needles = noise(7, 32, 32), noisy_needles()
    for arguments, said in (
        ({"reduction": "sum"}, "Allowed: max, mean"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_layer(model, processor, [video], needles, **cast(Any, arguments))
    with pytest.raises(ConfigError, match="nothing to measure"):
        find_layer(model, processor, [], needles)
    with pytest.raises(ConfigError, match="video 1: frames are uint8"):
        find_layer(model, processor, [video, video.astype(np.float32)], needles)
    with pytest.raises(ConfigError, match="video 1: a video of 2 frames"):
        find_layer(model, processor, [video, video[:2]], needles)
    processor.video_processor = None
    with pytest.raises(UnsupportedModelError, match="takes no videos"):
        find_layer(model, processor, [video], needles)


def test_needles_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "needles.jsonl"
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    file.write_text('{"image": "red.png", "question": "what color?"}\n\n')
    (needle,) = read_needles(file)
    assert (needle.image.size, needle.question, needle.name) == ((8, 6), "what color?", "red.png")
    for text, said in (
        ("", "there is no needle in it"),
        ("{", "line 1: not JSON"),
        ('{"image": "red.png", "question": "x"}\n["red.png", "x"]', "line 2: this is no needle"),
        ('{"image": "red.png", "question": 3}', "line 1: this is no needle"),
        ('{"image": "red.png"}', "line 1: this is no needle"),
        ('{"image": "blue.png", "question": "x"}', "blue.png: there is no such file"),
    ):
        file.write_text(text)
        with pytest.raises(InputFileError, match=said):
            read_needles(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputFileError, match="not UTF-8"):
        read_needles(file)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_needles(tmp_path)


# The command ------------------------------------------------------------------------------------


def needle_file(folder: Path, question: str) -> Path:
    drawn_needles()[0].image.save(folder / "circle.png")
    file = folder / "needles.jsonl"
    file.write_text(json.dumps({"image": "circle.png", "question": question}) + "\n")
    return file


def test_command_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="the bundled model needs the extra `demo`")
    video = write_video(tmp_path / "video.mp4", noise(12, 48, 64))
    needles = needle_file(tmp_path, "what color is the circle?")
    out = tmp_path / "new" / "out"
    arguments = ["--video", str(video), "--needles", str(needles), "--frames", "6"]
    arguments += ["--repeats", "2", "--keep", "0.25", "--reduction", "mean", "--out", str(out)]
    assert main(["find-layer", "bundled", *arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "layer_recall.json").read_text())
    assert report["model"] == "bundled"
    assert report["model_type"] == "internvl"
    assert (report["runs_done"], report["runs_planned"], report["seed"]) == (2, 2, 0)
    assert [one["layer"] for one in report["layers"]] == [0, 1, 2, 3]
    assert report["chance"] == pytest.approx(1 / 6)
    assert report["videos"][0] | {"seconds": 0, "backend": ""} == {
        "file": str(video),
        "frames": 6,
        "of_frames": 12,
        "height": 48,
        "width": 64,
        "seconds": 0,
        "backend": "",
    }
    assert report["needles"] == [{"name": "circle.png", "question": "what color is the circle?"}]
    for run in report["runs"]:
        assert (run["grid"], run["k"], run["ranked"]) == ([6, 8, 8], 64, 384)
        assert 1 <= run["replaced"][0] <= 4
    means = np.mean([run["recall"] for run in report["runs"]], axis=0)
    assert means.tolist() == pytest.approx([one["recall"] for one in report["layers"]])
    assert report["layer"] == int(means.argmax())
    for one in report["layers"]:
        assert 0 <= one["interval"][0] <= one["recall"] <= one["interval"][1] <= 1

    config = PruningConfig.from_json((out / "pruning.json").read_text())
    assert (config.method, config.keep) == ("flexselect", 0.25)
    assert config.options == {"layer": report["layer"], "reduction": "mean"}

    assert "bundled model: Recall@K of needles, K = 64" in printed
    best = next(line.split() for line in printed.splitlines() if line.endswith("best"))
    assert best[:2] == [str(report["layer"]), f"{100 * means.max():.1f}"]
    assert str(out / "pruning.json") in printed

    with Image.open(out / "layer_recall.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 400
    drawn = (np.abs(pixels - (0x20, 0x63, 0x9B)).sum(axis=-1) < 12).any(axis=0).nonzero()[0]
    assert drawn.min() < 0.3 * pixels.shape[1] < 0.8 * pixels.shape[1] < drawn.max()


def test_what_is_measured_is_kept_when_interrupted(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
) -> None:
    video = write_video(tmp_path / "video.mp4", noise(12, 48, 64))
    plain, calls = module._read, []

    def read(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "_read", read)
    out = tmp_path / "out"
    model = str(checkpoints["qwen2_vl"])
    assert main(["find-layer", model, "--video", str(video), "--out", str(out)]) == 130
    assert f"2 of 6 runs are kept in {out / 'layer_recall.json'}" in capsys.readouterr().err
    report = json.loads((out / "layer_recall.json").read_text())
    assert (report["runs_done"], report["runs_planned"]) == (2, 6)
    assert [file.name for file in out.iterdir()] == ["layer_recall.json"]


def test_bad_input_is_one_line_on_stderr(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", noise(12, 48, 64))
    write_video(tmp_path / "short.mp4", noise(4, 48, 64))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "file").write_text("")
    model = str(checkpoints["qwen2_vl"])
    for arguments, said in (
        (["--video", "missing.mp4"], "no video can be used, for example missing.mp4: "),
        (["--video", "missing.mp4", "--video", "text.mp4"], "there is no such file"),
        (
            ["--video", "short.mp4"],
            "no run can be used, for example short.mp4: a video of 4 frames",
        ),
        (["--video", "video.mp4", "--needles", "none.jsonl"], "none.jsonl: the needles cannot"),
        (["--video", "video.mp4", "--frames", "2"], "--frames 2 is too small"),
        (["--video", "video.mp4", "--max-side", "0"], "--max-side 0 is too small"),
        (["--video", "video.mp4", "--repeats", "0"], "--repeats 0 is too small"),
        (["--video", "video.mp4", "--seed", "-1"], "--seed -1 is too small"),
        (["--video", "video.mp4", "--keep", "many"], "--keep many is no number"),
        (["--video", "video.mp4", "--out", "file"], "file is a file"),
    ):
        assert main(["find-layer", model, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("tokenprune find-layer: ")
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert not list(tmp_path.glob("**/layer_recall.*"))
    assert main(["find-layer", "nowhere/model", "--video", "video.mp4"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


# What cannot be measured is left out ------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_and_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
) -> None:
    """A video that cannot be read, one that is too short, and one run that the model refuses."""
    good = [write_video(tmp_path / f"{n}.mp4", noise(12, 48, 64, seed=n)) for n in range(2)]
    short = write_video(tmp_path / "short.mp4", noise(4, 48, 64))
    (tmp_path / "text.mp4").write_text("no video")
    plain, calls = module._read, 0

    def refuse_the_fourth(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("odd frames.\nAnd more of it.")
        return plain(*arguments)

    def found(*videos: Path) -> Any:
        out = tmp_path / "out"
        arguments = [str(checkpoints["qwen2_vl"]), "--video", *map(str, videos)]
        assert main(["find-layer", *arguments, "--out", str(out)]) == 0
        return json.loads((out / "layer_recall.json").read_text()), capsys.readouterr().out

    undisturbed, _ = found(*good)
    monkeypatch.setattr(module, "_read", refuse_the_fourth)
    report, printed = found(good[0], tmp_path / "text.mp4", short, good[1])
    left_out = report["left_out"]
    assert list(left_out)[:2] == [str(tmp_path / "text.mp4"), str(short)]
    (run,) = list(left_out)[2:]
    assert run.startswith(f"{good[0]}, ")
    assert left_out[run] == "ValueError: odd frames."
    for name, reason in left_out.items():
        assert f"{name} is left out: {reason}" in printed
    assert report["runs_done"] == len(report["runs"]) == 11
    # The others are what they are without the odd ones; the videos' numbers are of what was read.
    others = [one for number, one in enumerate(undisturbed["runs"]) if number != 3]
    recalls = [one["recall"] for one in report["runs"]]
    assert recalls[:5] == [one["recall"] for one in others[:5]]


def test_nothing_left_is_an_error(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]
) -> None:
    from tokenprune_eval.shared.left_out import LeftOut, NothingLeftError

    model, processor = load(str(checkpoints["qwen2_vl"]))

    def refuse(*_: Any) -> Any:
        raise RuntimeError("never")

    monkeypatch.setattr(module, "_read", refuse)
    said: list[str] = []
    with pytest.raises(NothingLeftError, match=r"no run can be used, for example video 0, first"):
        find_layer(
            model, processor, [noise(12, 48, 64)], noisy_needles(), left_out=LeftOut(said.append)
        )
    assert len(said) == 2
    with pytest.raises(RuntimeError, match="never"):
        find_layer(model, processor, [noise(12, 48, 64)], noisy_needles())

    def unsupported(*_: Any) -> Any:
        raise UnsupportedModelError("not this model.")

    monkeypatch.setattr(module, "_read", unsupported)
    with pytest.raises(UnsupportedModelError):
        find_layer(model, processor, [noise(12, 48, 64)], noisy_needles(), left_out=LeftOut(print))
