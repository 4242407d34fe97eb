"""`tokenprune show`: its picture, its counts, what it says about bad input."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="show needs the extra `demo`")

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import tokenprune_hf
from tests.hf.models import END, IMAGE, PAD, START, TINY, VIDEO
from tests.vllm import checkpoints
from tokenprune.cli import main
from tokenprune.errors import ConfigError
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune_eval import show
from tokenprune_eval.bundled.scenes import load_scenes
from tokenprune_hf.loading import ask, load

tf: Any = transformers  # its processors are not typed the way they are called


def _pixels(file: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(file).convert("RGB")).astype(float)


def test_bundled_model_with_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = next(one for one in load_scenes() if one.type == "color")
    out = tmp_path / "out.png"
    methods = ["zeroth-order", "cls-attention", "uniform"]
    arguments = ["--question", question.question, "--method", *methods, "--keep", "16"]
    assert main(["show", str(question.image), *arguments, "-o", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"unpruned: {question.answer}"
    for method, line in zip(methods, printed[1:4], strict=True):
        assert line.startswith(f"{method}, 16 of 64 tokens: ")
    assert printed[4] == str(out)
    pixels = _pixels(out)
    height, width, _ = pixels.shape
    assert width > height > 400
    # A column for the image and one a method, each with something in it; colours, not just grey.
    for column in np.array_split(pixels, 4, axis=1):
        assert column.std() > 20
    assert np.ptp(pixels, axis=-1).max() > 100


def test_methods_inside_the_language_model_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = load_scenes()[0]
    arguments = ["show", str(question.image), "--method", "fastv", "sparsevlm", "--keep", "16"]
    out = ["-o", str(tmp_path / "out.png")]
    assert main([*arguments, *out]) == 2
    assert "fastv, sparsevlm chooses by the question" in capsys.readouterr().err
    asked = ["--question", question.question, "--option", "fastv.layer=3"]
    assert main([*arguments, *asked, *out]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("fastv, 16 of 64 tokens: ")
    assert printed[2].startswith("sparsevlm, 16 of 64 tokens: ")
    assert _pixels(tmp_path / "out.png").std() > 20


def test_drawn_patches_are_those_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is taken apart: of a red picture 16 of 64 cells stay red."""
    from tokenprune.selection import Selection

    kept = torch.tensor([0, 9, 18, 63])
    selection = Selection(kept, 64, (1, 8, 8), torch.arange(64).float())
    picture = np.zeros((80, 160, 3))
    picture[..., 0] = 1.0
    drawn = []
    from matplotlib.axes import Axes

    plain = Axes.imshow

    def imshow(self: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(np.asarray(values))
        return plain(self, values, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", imshow)
    shown = show.Shown("x", selection, (), "an answer with $ and \u4e2d\u6587 in it")
    content = show._draw(picture, [shown], "what costs $5 and $6?", "nothing", ".png")
    assert Image.open(io.BytesIO(content)).format == "PNG"
    cells = drawn[-1].reshape(8, 10, 8, 20, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1, 3)
    red = (cells == [1.0, 0.0, 0.0]).all(axis=-1)
    assert red.all(axis=1).nonzero()[0].tolist() == kept.tolist()
    assert not red[np.setdiff1d(np.arange(64), kept)].any()
    scores = next(values for values in drawn if values.shape == (8, 8))
    assert np.array_equal(scores, np.arange(64).reshape(8, 8))


# Other families ---------------------------------------------------------------------------------

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ token if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)


def _tokenizer() -> Any:
    """A word-level tokenizer with the ids that the tiny models know."""
    special = {"<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END, "<pad>": PAD}
    vocab = {f"w{number}": number for number in range(96) if number not in special.values()}
    tokenizer = Tokenizer(models.WordLevel({**vocab, **special}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="w3",
        additional_special_tokens=["<image>", "<video>", "<start>", "<end>"],
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "start_image_token": "<start>",
            "end_image_token": "<end>",
            "context_image_token": "<image>",
            "vision_bos_token": "<start>",
            "vision_eos_token": "<end>",
        },
    )


def _processor(family: str) -> Any:
    template = _TEMPLATE.replace("token if", "'<image>' if")
    tokenizer = _tokenizer()
    clip = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    if family == "llava":
        return tf.LlavaProcessor(
            image_processor=tf.CLIPImageProcessor(**clip),
            tokenizer=tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
        )  # without a chat template, as older checkpoints are
    if family == "llava_next":
        return tf.LlavaNextProcessor(
            image_processor=tf.LlavaNextImageProcessor(
                **clip, image_grid_pinpoints=[[48, 24], [24, 48], [48, 48]]
            ),
            tokenizer=tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
            chat_template=template,
        )
    if family == "internvl":
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

        image_processor: Any = GotOcr2ImageProcessor
        return tf.InternVLProcessor(
            image_processor=image_processor(
                size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=2, max_patches=4
            ),
            video_processor=tf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
            tokenizer=tokenizer,
            image_seq_length=16,
            chat_template=template,
        )
    return tf.Qwen2VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=96 * 48
        ),
        video_processor=tf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        tokenizer=tokenizer,
        chat_template=template.replace("'<image>'", "'<start><image><end>'").replace(
            "<start><image><end>", "<start> <image> <end>"
        ),
    )


@pytest.mark.parametrize(
    ("family", "others", "aspect"),
    [
        ("llava", 0, 1.0),
        ("llava_next", 2, 1.0),
        ("internvl", 2, 1.0),
        ("qwen2_vl", 0, 2.0),
        ("paddleocr_vl", 0, 2.0),
    ],
)
def test_other_families_show_the_whole_image(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    others: int,
    aspect: float,
) -> None:
    """A left half in red and a right half in blue are still so in what is drawn as the whole."""
    if family == "paddleocr_vl":
        checkpoints.save(family, tmp_path / "model")
    else:
        TINY[family].model().save_pretrained(tmp_path / "model")
        _processor(family).save_pretrained(tmp_path / "model")
    image = Image.new("RGB", (96, 48), (230, 20, 20))
    image.paste((20, 20, 230), (48, 0, 96, 48))
    image.save(tmp_path / "halves.png")
    capsys.readouterr()
    drawn: list[Any] = []
    plain = show._draw

    def draw(picture: Any, shown: Any, *rest: Any) -> bytes:
        drawn.append((picture, shown))
        return plain(picture, shown, *rest)

    monkeypatch.setattr(show, "_draw", draw)
    out = tmp_path / "out.png"
    arguments = ["--model", str(tmp_path / "model"), "--question", "w5 w6", "-o", str(out)]
    arguments += ["--method", "cls-attention", "--keep", "0.25"]
    assert main(["show", str(tmp_path / "halves.png"), *arguments]) == 0
    printed = capsys.readouterr()
    ((picture, (shown,)),) = drawn
    assert picture.shape[1] / picture.shape[0] == pytest.approx(aspect, abs=0.1)
    half = picture.shape[1] // 2
    left, right = picture[:, : half - 2].mean((0, 1)), picture[:, half + 2 :].mean((0, 1))
    assert left[0] > 0.8 > 0.2 > left[2]
    assert right[2] > 0.8 > 0.2 > right[0]
    assert len(shown.others) == others
    _, rows, columns = shown.whole.grid
    assert len(shown.whole) == round(0.25 * rows * columns + 1e-9)
    assert columns / rows == pytest.approx(aspect, abs=0.1)
    assert ("more crop" in printed.out) == bool(others)
    assert _pixels(out).std() > 20

    # The selection drawn is the one that selecting by hand from all items gives.
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "model")
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    inputs = ask(processor, "w5 w6", image=image)
    items = tokenprune_hf.encode(model, **inputs).modalities["image"].items
    assert len(items) == others + 1
    selections = select_many([item.tokens for item in items], build("cls-attention", {}), 0.25)
    whole = selections[-1 if family == "internvl" else 0]
    assert torch.equal(shown.whole.kept, whole.kept)


# Bad input --------------------------------------------------------------------------------------


def _bad_images(folder: Path) -> dict[str, str]:
    """Path -> what has to be said about it."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:4000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "folder").mkdir()
    return {
        str(folder / "truncated.png"): "damaged or incomplete",
        str(folder / "empty.jpg"): "the file is empty",
        str(folder / "text.png"): "no image that can be read",
        str(folder / "folder"): "a directory",
        str(folder / "missing.png"): "no such file",
    }


def test_bad_images_are_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image, said in _bad_images(tmp_path).items():
        assert main(["show", image, "-o", str(tmp_path / "out.png")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"tokenprune show: {image}: ")
        assert said in printed.err
        assert printed.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "many"], "is no number"),
        (["--keep", "0"], "keeps nothing"),
        (["--keep", "1.5"], "must lie in (0, 1]"),
        (["--keep", "nan"], "must lie in (0, 1]"),
        (["--method", "divprun"], "Did you mean 'divprune'"),
        (["--option", "estimator"], "is not NAME=VALUE"),
        (["--method", "flexselect"], "add --question"),
        (["--option", "estimater=jvp"], "Did you mean 'estimator'"),
        (["--option", "estimator=jpv"], "Did you mean 'jvp'"),
        (["-o", "picture.gif"], "cannot be written"),
        (["-o", "nowhere/picture.png"], "is no directory"),
        (["--model", "nowhere/model"], "cannot be loaded"),
    ],
)
def test_wrong_arguments_are_one_line_on_stderr(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("red.png")
    assert main(["show", "red.png", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_a_model_that_is_no_vlm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tf.LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    assert main(["show", str(tmp_path / "red.png"), "--model", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "'llama', which cannot be pruned" in printed.err
    assert printed.err.count("\n") == 1


def test_options_go_to_the_methods_that_have_them() -> None:
    first, second = show._selectors(
        ["zeroth-order", "random"], ["estimator=jvp", "seed=7", "diversity=false"]
    )
    assert first == build("zeroth-order", {"estimator": "jvp", "seed": 7, "diversity": False})
    assert second == build("random", {"seed": 7})


def test_a_method_that_the_model_cannot_serve_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    image, out = str(tmp_path / "red.png"), tmp_path / "out.png"
    asked = ["--question", "what color is it?", "--option", "layer=99", "-o", str(out)]
    assert main(["show", image, "--method", "random", "flexselect", "divprune", *asked]) == 0
    printed = capsys.readouterr()
    assert "random, " in printed.out
    assert "divprune, " in printed.out
    assert "flexselect, " not in printed.out
    assert printed.err.startswith("tokenprune show: flexselect is left out: ")
    assert "layer=99" in printed.err
    assert printed.err.count("\n") == 1
    assert out.exists()
    out.unlink()
    assert main(["show", image, "--method", "flexselect", *asked]) == 2
    printed = capsys.readouterr()
    assert "no method can be used, for example flexselect: " in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_an_encoder_without_attention_leaves_methods_that_need_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune.errors import UnsupportedModelError
    from tokenprune_hf.vision import VisionModel

    def none(self: Any, media: Any) -> Any:
        raise UnsupportedModelError("the vision tower has no q_proj to watch.")

    monkeypatch.setattr(VisionModel, "scoring_layer", none)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    out = str(tmp_path / "out.png")
    arguments = ["--method", "cls-attention", "divprune", "-o", out]
    assert main(["show", str(tmp_path / "red.png"), *arguments]) == 0
    printed = capsys.readouterr()
    assert "divprune, 16 of 64 tokens" in printed.out
    assert printed.err == (
        "tokenprune show: cls-attention is left out: the vision tower has no q_proj to watch.\n"
    )


def test_the_picture_made_smaller_stands_beside_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = load_scenes()[0]
    out = tmp_path / "out.png"
    arguments = ["--method", "uniform", "resize", "--keep", "17", "--question", scene.question]
    assert main(["show", str(scene.image), *arguments, "-o", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("resize, 16 of 64 tokens: ")
    model, processor = load("bundled")
    image = Image.open(scene.image)
    drawn = show.picture(model, processor, image, ["resize", "uniform"], 0.25)
    small, uniform = drawn.shown
    assert isinstance(small, show.Smaller)
    assert isinstance(uniform, show.Shown)
    assert (small.tokens, small.of_tokens, len(uniform.whole)) == (16, 64, 16)
    # 4 tokens of 28 pixels a side: the image at half its size.
    assert small.seen.shape == (112, 112, 3)
    halves = image.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC)
    assert np.abs(small.seen - np.asarray(halves) / 255).mean() < 0.01
    resized = tokenprune_hf.resize(model, processor, image, 17)
    inputs = ask(processor, scene.question, image=resized)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert printed[2].endswith(f": {text.strip()}")


def test_the_picture_from_python_is_the_one_of_the_command(tmp_path: Path) -> None:
    scene = load_scenes()[0]
    out = tmp_path / "command.png"
    methods = ["zeroth-order", "uniform"]
    assert (
        main(["show", str(scene.image), "--method", *methods, "--keep", "9", "-o", str(out)]) == 0
    )
    model, processor = load("bundled")
    drawn = show.picture(model, processor, Image.open(scene.image), methods, 9)
    assert str(drawn) == "zeroth-order, 9 of 64 tokens\nuniform, 9 of 64 tokens"
    assert [len(one.whole) for one in drawn.shown if isinstance(one, show.Shown)] == [9, 9]
    drawn.save(tmp_path / "python.png")
    for content in (tmp_path / "python.png", io.BytesIO(drawn._repr_png_())):
        assert np.array_equal(np.asarray(Image.open(content)), np.asarray(Image.open(out)))
    with pytest.raises(ConfigError, match=r"'\.txt' cannot be written"):
        drawn.save(tmp_path / "python.txt")
    alone = show.picture(model, processor, Image.open(scene.image), "uniform", 9)
    assert str(alone) == "uniform, 9 of 64 tokens"
    for given, message in (([], "methods is empty"), ("flexselect", r"pass question='\.\.\.'")):
        with pytest.raises(ConfigError, match=message):
            show.picture(model, processor, Image.open(scene.image), given, 9)
