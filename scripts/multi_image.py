#!/usr/bin/env python
"""Fine-tune the bundled model on prompts of two to eight images; see what sparse masks cost it.

    scripts/multi_image.py train --work WORK --out WEIGHTS   # needs what training the model needs
    scripts/multi_image.py evaluate --weights WEIGHTS --work WORK

The bundled model has seen one image in a prompt, or the frames of one video. Here every prompt is
"image 1 : <image> image 2 : <image> ... in image 2 : what is the red item?", and now and then
"which image is the red boot in?". Training goes on from the bundled weights, with the encoder
frozen, one sequence of questions behind each prompt as in ``train_demo_model.py``.

`evaluate` calibrates the heads on prompts of validation scenes at several values of alpha, and
answers questions about the committed test scenes, put together to prompts of two, four and eight
images, with each of the masks. The weights are not shipped: this script is how to make them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from train_demo_model import (
    Branch,
    Layout,
    collate,
    encode,
    learning_rate,
    logits_of,
    scene_records,
    write_weights,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokenprune_hf
from tokenprune.masks import HeadCategories, PromptLayout, heads_mask
from tokenprune.masks.coverage import thresholds
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import IMAGE_TOKENS, bundled_model_path
from tokenprune_eval.calibrate_heads import Prompt, find_sinks, measure_heads
from tokenprune_eval.results.statistics import (
    Accuracy,
    accuracy_of,
    difference_interval,
    mcnemar_p,
)

TYPES = ("kind", "color", "place", "exists")
IMAGES = (2, 3, 4, 6, 8)


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("--work", type=Path, required=True, help="where features are kept")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--scenes", type=int, default=3000)
    one.add_argument("--steps", type=int, default=2500)
    one.add_argument("--images", type=int, default=48, help="images of one step")
    one.add_argument("--learning-rate", type=float, default=6e-4)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=train)
    one = commands.add_parser("evaluate")
    one.add_argument("--work", type=Path, required=True, help="where pictures are put")
    one.add_argument("--weights", type=Path, required=True, help="what train wrote")
    one.add_argument("--questions", type=int, default=500, help="for each number of images")
    one.add_argument("--prompts", type=int, default=48, help="of calibration, of 2 to 8 images")
    one.add_argument("--alpha", type=float, nargs="+", default=[0.99, 0.95, 0.9, 0.8, 0.6, 0.4])
    one.add_argument("--block", type=int, default=16)
    one.set_defaults(run=evaluate)
    options = parser.parse_args()
    options.run(options)


# --- prompts ------------------------------------------------------------------------------------


def prefix(layout: Layout, images: int) -> tuple[int, ...]:
    """Return the token ids of a prompt up to its last image."""
    picture = "<img>" + "<IMG_CONTEXT>" * IMAGE_TOKENS + "</img>\n"
    parts = "".join(f"image {number + 1} :{picture}" for number in range(images))
    return layout.ids(f"<|im_start|>user\n{parts}")


def message(images: Sequence[Any], question: str) -> list[dict[str, Any]]:
    """Return the same prompt as a chat message, question included."""
    content: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        content.append({"type": "text", "text": f"image {number} :"})
        content.append(image)
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def branches(
    layout: Layout, group: Sequence[scenes.Scene], rng: np.random.Generator
) -> list[Branch]:
    """Return questions about each image of a prompt, and on which image something is in.

    Two images are described as well: every item of a picture is named there, which teaches what
    "image 2" means far sooner than answers of one word do.
    """
    described = [int(number) for number in rng.permutation(len(group))[:2]]
    result = [
        layout.branch(f"describe image {number + 1} .", scenes.caption(group[number]))
        for number in described
    ]
    for number, scene in enumerate(group, start=1):
        types = [str(one) for one in rng.permutation(TYPES)[: max(1, 12 // len(group))]]
        for asked in scenes.ask(scene, types, rng):
            question = f"in image {number} : {asked.question}"
            result.append(layout.branch(question, asked.answer))
    seen = [(item.color, item.kind) for scene in group for item in scene.items]
    for number, scene in enumerate(group, start=1):
        alone = [i for i in scene.items if seen.count((i.color, i.kind)) == 1]
        if alone:
            item = alone[int(rng.integers(len(alone)))]
            question = f"which image is the {item.color} {item.kind} in?"
            result.append(layout.branch(question, str(number)))
    return result


def check_prompts(layout: Layout) -> None:
    """Compare with what the processor makes of a chat message; they must be the same."""
    picture = {"type": "image", "image": Image.new("RGB", (300, 200))}
    made: Any = layout.processor.apply_chat_template(
        message([picture] * 3, "in image 2 : what is the red item?"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    asked = layout.branch("in image 2 : what is the red item?", "7").prompt
    given = made["input_ids"][0].tolist()
    if given != [*prefix(layout, 3), *asked]:
        raise SystemExit(f"chat template and training layout differ:\n{given}")


# --- training -----------------------------------------------------------------------------------


def features_of(
    split: scenes.Split, count: int, work: Path, model: Any, layout: Layout
) -> tuple[list[scenes.Scene], npt.NDArray[np.float16]]:
    """Return what is in each scene, and its features [count, 256, 384]."""
    work.mkdir(parents=True, exist_ok=True)
    records = scene_records(split, count, work / f"scenes-{split}-{count}.jsonl")
    pictures = (Image.fromarray(scenes.render_scene(split, n).pixels) for n in range(count))
    target = work / f"scenes-{split}-{count}.npy"
    return records, encode(pictures, count, target, layout.processor, model.model.vision_tower)


def validate(
    model: Any, layout: Layout, records: Sequence[scenes.Scene], features: npt.NDArray[np.float16]
) -> str:
    """Return the accuracy of the first answer token for prompts of 2, 4 and 8 images."""
    rng = np.random.default_rng(5)
    found = []
    for images in (2, 4, 8):
        right: list[bool] = []
        for _ in range(40):
            chosen = rng.choice(len(records), images, replace=False)
            asked = branches(layout, [records[int(i)] for i in chosen], rng)[2:]
            batch = collate(prefix(layout, images), [asked], 0)
            with torch.inference_mode():
                part = torch.from_numpy(features[chosen][None]).float()
                logits = logits_of(model, batch, part, layout.image_id)
            wanted = batch.labels[batch.labels != -100][0::2]
            right += (logits.argmax(-1)[0::2] == wanted).tolist()
        found.append(f"{images} images {np.mean(right):.3f}")
    return ", ".join(found)


def train(options: argparse.Namespace) -> None:
    """Go on from the bundled weights."""
    torch.manual_seed(options.seed)
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    layout = Layout(processor)
    check_prompts(layout)
    records, features = features_of("train", options.scenes, options.work, model, layout)
    held_out = features_of("validation", 300, options.work, model, layout)
    rng = np.random.default_rng(options.seed)
    parameters = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98))
    started, losses = time.monotonic(), []
    print(f"before: {validate(model, layout, *held_out)}", flush=True)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate, 50)
        images = int(rng.choice(IMAGES))
        rows, parts = [], []
        for _ in range(max(1, options.images // images)):
            chosen = rng.choice(len(records), images, replace=False)
            rows.append(branches(layout, [records[int(i)] for i in chosen], rng))
            parts.append(features[chosen])
        batch = collate(prefix(layout, images), rows, 0)
        with torch.autocast("cpu", torch.bfloat16):
            visual = torch.from_numpy(np.stack(parts)).float()
            logits = logits_of(model, batch, visual, layout.image_id)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[batch.labels != -100])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            seconds = time.monotonic() - started
            recent = np.mean(losses[-25:])
            print(f"{step + 1}/{options.steps} {seconds:.0f} s loss {recent:.4f}", flush=True)
        if (step + 1) % 150 == 0 or step + 1 == options.steps:
            print(f"validation: {validate(model, layout, *held_out)}", flush=True)
            write_weights(model, layout.processor, options.out)
    (options.out / "training.json").write_text(
        json.dumps({**{k: str(v) for k, v in vars(options).items() if k != "run"}}, indent=1)
    )


# --- density against accuracy -------------------------------------------------------------------


class Labelled:
    """The processor, with "image 1 :" and so on in front of the images of a message."""

    chat_template = True

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def apply_chat_template(self, messages: Sequence[Any], **arguments: Any) -> Any:
        """Return the prompt's text."""
        *images, text = messages[0]["content"]
        return self.processor.apply_chat_template(message(images, text["text"]), **arguments)

    def __call__(self, **arguments: Any) -> Any:
        """Return what the processor does."""
        return self.processor(**arguments)


def calibration_prompts(count: int, folder: Path) -> list[Prompt]:
    """Render validation scenes, and put them together to prompts of two to eight images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    prompts = []
    for _ in range(count):
        images = int(rng.choice(IMAGES))
        numbers = [int(n) for n in rng.choice(300, images, replace=False)]
        files = [folder / f"validation-{number}.png" for number in numbers]
        drawn = [scenes.render_scene("validation", number) for number in numbers]
        for file, scene in zip(files, drawn, strict=True):
            Image.fromarray(scene.pixels).save(file)
        asked = int(rng.integers(images))
        (question,) = scenes.ask(drawn[asked], [str(rng.choice(TYPES))], rng)
        prompts.append(Prompt(tuple(files), f"in image {asked + 1} : {question.question}"))
    return prompts


@dataclass(frozen=True)
class Asked:
    """A question about one of several test scenes: its prompt's images, its text and answer."""

    images: tuple[Path, ...]
    text: str
    answer: str


def test_prompts(count: int, images: int) -> list[Asked]:
    """Put committed test scenes together, each with a committed question about one of them."""
    rng = np.random.default_rng([12, images])
    questions = [one for one in scenes.load_scenes() if one.type in TYPES]
    files = sorted({one.image for one in questions})
    result = []
    for number in rng.choice(len(questions), count, replace=False):
        question = questions[int(number)]
        place = int(rng.integers(images))
        others = [one for one in files if one != question.image]
        group = [others[int(i)] for i in rng.choice(len(others), images - 1, replace=False)]
        group.insert(place, question.image)
        text = f"in image {place + 1} : {question.question}"
        result.append(Asked(tuple(group), text, question.answer))
    return result


def answers(
    model: Any, processor: Any, asked: Sequence[Asked], encoded: dict[Path, torch.Tensor]
) -> list[bool]:
    """Say which questions are answered right, in batches, through `generate`."""
    right: list[bool] = []
    blank = Image.new("RGB", (224, 224))
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        texts = [
            processor.apply_chat_template(
                message([{"type": "image"}] * len(one.images), one.text), add_generation_prompt=True
            )
            for one in part
        ]
        inputs = processor(
            text=texts,
            images=[[blank] * len(one.images) for one in part],
            return_tensors="pt",
            padding=True,
        )
        del inputs["pixel_values"]
        make: Any = BaseModelOutputWithPooling  # typed for another tensor class
        visual = make(pooler_output=torch.stack([encoded[i] for one in part for i in one.images]))
        with torch.inference_mode():
            output = model.generate(
                **inputs, mm_encoder_outputs={"image": visual}, max_new_tokens=2, do_sample=False
            )
        said = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += [text.strip() == one.answer for text, one in zip(said, part, strict=True)]
    return right


def evaluate(options: argparse.Namespace) -> None:
    """Print what each mask computes, and how many questions are answered right under it."""
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, blocks of {options.block}")
    model, processor = tokenprune_hf.load(str(bundled_model_path(weights=options.weights)))
    labelled = Labelled(processor)
    prompts = calibration_prompts(options.prompts, options.work / "pictures")
    sinks = find_sinks(model, labelled, prompts)
    measured = measure_heads(model, labelled, prompts, sinks, block=options.block)
    print(f"sinks at the places {sinks.places} of an image")
    layers = measured.model.layers
    masks = {
        f"alpha {alpha:g}": measured.choose(thresholds(layers, alpha)) for alpha in options.alpha
    }
    for category in ("intra+sink", "intra", "sink"):
        every = ((category,) * measured.model.heads,) * layers
        masks[f"all {category}"] = replace(masks[f"alpha {options.alpha[0]:g}"], categories=every)
    for images in (2, 4, 8):
        asked = test_prompts(options.questions, images)
        encoded = encode_images(model, processor, {i for one in asked for i in one.images})
        plain = answers(model, processor, asked, encoded)
        accuracy = accuracy_of(plain)
        print(f"\n{images} images, {len(asked)} questions, plain: {in_percent(accuracy)}")
        print(
            f"{'mask':16} {'heads: sink intra intra+sink dense':36} density  pairs  right, %",
            end="",
        )
        print("             difference to plain          p")
        for name, heads in masks.items():
            with tokenprune_hf.sparse(model, heads) as running:
                right = answers(model, processor, asked, encoded)
                density, layouts = running.density, running.layouts
            pairs = np.mean([share(heads, layout) for layout in layouts[:4]])
            gained = sum(new and not old for new, old in zip(right, plain, strict=True))
            lost = sum(old and not new for new, old in zip(right, plain, strict=True))
            low, high = difference_interval(gained, lost, len(asked))
            counts = " ".join(f"{count:3d}" for count in heads.counts().values())
            share_right = in_percent(accuracy_of(right))
            print(
                f"{name:16} {counts:36} {density:7.2f} {pairs:6.2f}  {share_right:20} "
                f"{100 * (gained - lost) / len(asked):+6.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                f"   {mcnemar_p(gained, lost):.3f}",
                flush=True,
            )


def share(heads: HeadCategories, layout: PromptLayout) -> float:
    """Return which share of the causal pairs of tokens is allowed: what blocks cannot show."""
    found = []
    for categories in set(heads.categories):
        matrix = heads_mask(layout, categories).matrix()
        mean = float(matrix.sum()) / (len(matrix) * layout.length * (layout.length + 1) / 2)
        found += [mean] * heads.categories.count(categories)
    return sum(found) / len(found)


def in_percent(accuracy: Accuracy | None) -> str:
    """Return a share with its interval, as text."""
    if accuracy is None:
        return "none"
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"


def encode_images(model: Any, processor: Any, files: Iterable[Path]) -> dict[Path, torch.Tensor]:
    """Encode every image once: [64, D] each."""
    found: dict[Path, torch.Tensor] = {}
    files = sorted(files)
    for start in range(0, len(files), 32):
        part = files[start : start + 32]
        pictures = [Image.open(file) for file in part]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        found.update(zip(part, rows, strict=True))
    return found


if __name__ == "__main__":
    main()
