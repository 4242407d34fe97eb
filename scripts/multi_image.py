#!/usr/bin/env python
"""Fine-tune the bundled model on prompts of two to eight images; see what sparse masks cost it.

    scripts/multi_image.py train --work WORK --out WEIGHTS   # needs what training the model needs
    scripts/multi_image.py evaluate --weights WEIGHTS --work WORK
    scripts/multi_image.py compare --weights WEIGHTS --work WORK    # needs vLLM

The bundled model has seen one image in a prompt, or the frames of one video. Here every prompt is
"image 1 : <image> image 2 : <image> ... in image 2 : what is the red item?", and now and then
"which image is the red boot in?". Training goes on from the bundled weights, with the encoder
frozen, one sequence of questions behind each prompt as in ``train_demo_model.py``.

`evaluate` calibrates the heads on prompts of validation scenes at several values of alpha, and
answers questions about the committed test scenes, put together to prompts of two, four and eight
images, with each of the masks. `compare` asks vLLM the same questions under the same masks, and
says of how many its answer is that of transformers. The weights are not shipped: this script is how
to make them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from bench_masks_vllm import PLAIN, give_heads
from PIL import Image
from train_demo_model import (
    Branch,
    Layout,
    added,
    collate,
    encode,
    keep_memory,
    learning_rate,
    logits_of,
    scene_records,
    write_weights,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenprune_hf
import tokenprune_vllm
from tokenprune.masks import HeadCategories, PromptLayout, heads_mask
from tokenprune.masks.coverage import thresholds
from tokenprune.masks.patterns import Category
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
ANSWER = 2  # tokens of an answer, its end included
SHARD = 250  # scenes a file of features


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("--work", type=Path, required=True, help="where features are kept")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--scenes", type=int, default=1500)
    one.add_argument("--validation", type=int, default=100, help="scenes to validate on")
    one.add_argument("--workers", type=int, default=2, help="processes that encode scenes")
    one.add_argument("--steps", type=int, default=1600)
    one.add_argument("--images", type=int, default=24, help="images of one step")
    one.add_argument("--learning-rate", type=float, default=1e-3)
    one.add_argument("--validate-every", type=int, default=400)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=train)
    for name, run, alphas in (
        ("evaluate", evaluate, [0.9, 0.8, 0.6, 0.4]),
        ("compare", compare, [0.9, 0.6]),
    ):
        one = commands.add_parser(name)
        one.add_argument("--work", type=Path, required=True, help="where pictures are put")
        one.add_argument("--weights", type=Path, required=True, help="what train wrote")
        one.add_argument("--questions", type=int, default=300, help="for each number of images")
        one.add_argument("--prompts", type=int, default=24, help="of calibration, of 2 to 8 images")
        one.add_argument("--alpha", type=float, nargs="+", default=alphas)
        one.add_argument("--block", type=int, default=16)
        one.set_defaults(run=run)
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


def processor_seconds() -> float:
    """Return the processor time of this process, and of its processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def features_of(
    split: scenes.Split, count: int, work: Path, workers: int
) -> tuple[list[scenes.Scene], npt.NDArray[np.float16]]:
    """Return what is in each scene, and its features [count, 256, 384].

    The encoder is small: two processes of one thread each finish sooner than one of two threads.
    """
    work.mkdir(parents=True, exist_ok=True)
    shards = [(n, min(SHARD, count - n)) for n in range(0, count, SHARD)]
    files = [work / f"scenes-{split}-{first}-{size}.npy" for first, size in shards]
    missing = [
        (split, *shard, file)
        for shard, file in zip(shards, files, strict=True)
        if not file.is_file()
    ]
    if missing and workers > 1:
        # New processes: one that is forked cannot use the threads that torch has started.
        with multiprocessing.get_context("spawn").Pool(workers, one_thread) as pool:
            pool.starmap(encode_scenes, missing, chunksize=1)
            pool.close()
            pool.join()  # then their processor time is known
    else:
        for one in missing:
            encode_scenes(*one)
    records = scene_records(split, count, work / f"{split}-{count}.jsonl", "standard", workers)
    return records, np.concatenate([np.load(file) for file in files])


def one_thread() -> None:
    """Let torch have one thread in this process."""
    torch.set_num_threads(1)


def encode_scenes(split: scenes.Split, first: int, size: int, target: Path) -> None:
    """Render and encode so many scenes of a split, from the first on."""
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    numbers = range(first, first + size)
    pictures = (Image.fromarray(scenes.render_scene(split, n).pixels) for n in numbers)
    encode(pictures, size, target, processor, model.model.vision_tower)


def validate(
    model: Any, layout: Layout, records: Sequence[scenes.Scene], features: npt.NDArray[np.float16]
) -> str:
    """Return the accuracy of the first answer token for prompts of 2, 4 and 8 images."""
    rng = np.random.default_rng(5)
    found = []
    for images in (2, 4, 8):
        right: list[bool] = []
        for _ in range(4):
            rows, parts = [], []
            for _ in range(10):
                chosen = rng.choice(len(records), images, replace=False)
                rows.append(branches(layout, [records[int(i)] for i in chosen], rng)[2:])
                parts.append(features[chosen])
            batch = collate(prefix(layout, images), rows, 0)
            with torch.inference_mode():
                given = torch.from_numpy(np.stack(parts)).float()
                logits = logits_of(model, batch, given, layout.image_id)
            wanted = batch.labels[batch.labels != -100][0::2]
            right += (logits.argmax(-1)[0::2] == wanted).tolist()
        found.append(f"{images} images {np.mean(right):.3f}")
    return ", ".join(found)


def images_of_prompts(progress: float, rng: np.random.Generator) -> int:
    """How many images the prompts of a step have: few first, then all numbers."""
    early, late = (0.4, 0.3, 0.2, 0.1, 0.0), (0.15, 0.15, 0.2, 0.2, 0.3)
    return int(rng.choice(IMAGES, p=early if progress < 0.3 else late))


def train(options: argparse.Namespace) -> None:
    """Go on from the bundled weights."""
    keep_memory()
    torch.manual_seed(options.seed)
    started = time.monotonic()
    records, features = features_of("train", options.scenes, options.work, options.workers)
    held_out = features_of("validation", options.validation, options.work, options.workers)

    def spent() -> str:
        return f"{time.monotonic() - started:.0f} s, {processor_seconds():.0f} s of processors"

    print(f"features of {len(records)} scenes and {len(held_out[0])} more: {spent()}", flush=True)
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    layout = Layout(processor)
    check_prompts(layout)
    # Steps are computed in bfloat16, by a copy. What is learnt moves the model's own float32
    # weights: a step is smaller than the last bit of most bfloat16 weights.
    quick = copy.deepcopy(model)
    ALL_ATTENTION_FUNCTIONS.register("products", attend)
    quick.model.language_model.set_attn_implementation("products")
    weights, copies = parameters(model), parameters(quick)
    for one in copies:
        one.data = one.data.bfloat16()
    rng = np.random.default_rng(options.seed)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    losses = []
    print(f"before: {validate(model, layout, *held_out)}", flush=True)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate, 50)
        images = images_of_prompts(step / options.steps, rng)
        rows, parts = [], []
        for _ in range(max(1, options.images // images)):
            chosen = rng.choice(len(records), images, replace=False)
            rows.append(branches(layout, [records[int(i)] for i in chosen], rng))
            parts.append(features[chosen])
        batch = collate(prefix(layout, images), rows, 0)
        visual = torch.from_numpy(np.stack(parts)).bfloat16()
        logits = logits_of(quick, replace(batch, mask=added(batch.mask)), visual, layout.image_id)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[batch.labels != -100])
        loss.backward()
        for own, one in zip(weights, copies, strict=True):
            own.grad = None if one.grad is None else one.grad.float()
            one.grad = None
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            for own, one in zip(weights, copies, strict=True):
                one.copy_(own)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            recent = np.mean(losses[-50:])
            print(f"{step + 1}/{options.steps} loss {recent:.4f}: {spent()}", flush=True)
        if (step + 1) % options.validate_every == 0 or step + 1 == options.steps:
            print(f"validation: {validate(model, layout, *held_out)}", flush=True)
            write_weights(model, layout.processor, options.out)
    (options.out / "training.json").write_text(
        json.dumps({**{k: str(v) for k, v in vars(options).items() if k != "run"}}, indent=1)
    )
    print(f"trained, encoding included: {spent()}")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by plain products of matrices, as transformers calls attention.

    The prompts are short, and the gradient of torch's fused attention in bfloat16 takes two to five
    times as long on a CPU. Without a mask attention is causal.
    """
    if mask is None:
        mask = added(torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril())
    scores = (query * scaling) @ key.transpose(2, 3) + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


def parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return what is trained: all but the encoder."""
    inner = model.model
    return [
        *inner.multi_modal_projector.parameters(),
        *inner.language_model.parameters(),
        *model.lm_head.parameters(),
    ]


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


@dataclass(frozen=True)
class Said:
    """An answer: its text, its tokens with the one that ends it, and each one's log-probability.

    `scores` has the log-probabilities of the likeliest tokens, or of all, at each of these tokens.
    """

    text: str
    tokens: tuple[int, ...]
    scores: tuple[dict[int, float], ...]


def chat(processor: Any, one: Asked) -> str:
    """Return a question's prompt."""
    made: str = processor.apply_chat_template(
        message([{"type": "image"}] * len(one.images), one.text), add_generation_prompt=True
    )
    return made


def said_here(
    model: Any, processor: Any, asked: Sequence[Asked], encoded: dict[Path, torch.Tensor]
) -> list[Said]:
    """Return what transformers answers, in batches, through `generate`."""
    found: list[Said] = []
    blank = Image.new("RGB", (224, 224))
    end = processor.tokenizer.eos_token_id
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        texts = [chat(processor, one) for one in part]
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
                **inputs,
                mm_encoder_outputs={"image": visual},
                max_new_tokens=ANSWER,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        scores = torch.stack(output.logits, dim=1).log_softmax(dim=-1).tolist()
        for tokens, steps in zip(answers, scores, strict=True):
            count = tokens.index(end) + 1 if end in tokens else len(tokens)
            text = processor.decode(tokens[:count], skip_special_tokens=True).strip()
            each = tuple(dict(enumerate(step)) for step in steps[:count])
            found.append(Said(text, tuple(tokens[:count]), each))
    return found


def right_of(said: Sequence[Said], asked: Sequence[Asked]) -> list[bool]:
    """Say which questions are answered right."""
    return [answer.text == one.answer for answer, one in zip(said, asked, strict=True)]


def calibrated(
    model: Any, processor: Any, options: argparse.Namespace, same: Sequence[Category]
) -> tuple[dict[str, HeadCategories], tuple[int, ...]]:
    """Return masks by name, and the places of an image's sinks.

    There is one for each alpha, and one for each category of `same`, which all heads have there.
    """
    labelled = Labelled(processor)
    prompts = calibration_prompts(options.prompts, options.work / "pictures")
    sinks = find_sinks(model, labelled, prompts)
    measured = measure_heads(model, labelled, prompts, sinks, block=options.block)
    layers = measured.model.layers
    masks = {
        f"alpha {alpha:g}": measured.choose(thresholds(layers, alpha)) for alpha in options.alpha
    }
    for category in same:
        every = ((category,) * measured.model.heads,) * layers
        masks[f"all {category}"] = replace(masks[f"alpha {options.alpha[0]:g}"], categories=every)
    return masks, sinks.places


def print_machine(options: argparse.Namespace) -> None:
    """Print what the figures were made with."""
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, blocks of {options.block}")


def evaluate(options: argparse.Namespace) -> None:
    """Print what each mask computes, and how many questions are answered right under it."""
    print_machine(options)
    model, processor = tokenprune_hf.load(str(bundled_model_path(weights=options.weights)))
    masks, places = calibrated(model, processor, options, ("intra+sink", "intra", "sink"))
    print(f"sinks at the places {places} of an image")
    for images in (2, 4, 8):
        asked = test_prompts(options.questions, images)
        encoded = encode_images(model, processor, {i for one in asked for i in one.images})
        plain = right_of(said_here(model, processor, asked, encoded), asked)
        accuracy = accuracy_of(plain)
        print(f"\n{images} images, {len(asked)} questions, plain: {in_percent(accuracy)}")
        print(
            f"{'mask':16} {'heads: sink intra intra+sink dense':36} density  pairs  right, %",
            end="",
        )
        print("             difference to plain          p")
        for name, heads in masks.items():
            with tokenprune_hf.sparse(model, heads) as running:
                right = right_of(said_here(model, processor, asked, encoded), asked)
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


# --- the other engine ---------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> None:
    """Print of how many questions both engines say the same, without masks and under each."""
    print_machine(options)
    path = bundled_model_path(weights=options.weights)
    model, processor = tokenprune_hf.load(str(path))
    asked = {images: test_prompts(options.questions, images) for images in (2, 4, 8)}
    every = {image for group in asked.values() for one in group for image in one.images}
    encoded = encode_images(model, processor, every)
    masks, _ = calibrated(model, processor, options, ("intra",))
    llm = start_vllm(path, next(iter(masks.values())), options.work, len(every))
    print(
        f"{'mask':16} {'heads: sink intra intra+sink dense':36} images  questions  "
        "same tokens  right here  right in vLLM  largest difference of log-probabilities"
    )
    notes = []
    for name, heads in ((PLAIN, None), *masks.items()):
        if heads is not None:
            llm.collective_rpc(give_heads, args=(heads,))
        for images, group in asked.items():
            under = nullcontext() if heads is None else tokenprune_hf.sparse(model, heads)
            with under:
                here = said_here(model, processor, group, encoded)
            there = said_in_vllm(llm, processor, group, masked=heads is not None)
            pairs = list(zip(here, there, strict=True))
            counts = "" if heads is None else " ".join(f"{n:3d}" for n in heads.counts().values())
            print(
                f"{name:16} {counts:36} {images:6} {len(group):10} "
                f"{sum(a.tokens == b.tokens for a, b in pairs):12} "
                f"{sum(right_of(here, group)):11} {sum(right_of(there, group)):14} "
                f"{max(apart(a, b) for a, b in pairs):40.1e}",
                flush=True,
            )
            notes += [
                f"{name}, {images} images, question {number}: {note}"
                for number, (a, b) in enumerate(pairs)
                if (note := difference(a, b))
            ]
    print(f"\n{len(notes)} answers differ", *notes, sep="\n")
    llm.llm_engine.engine_core.shutdown()


def start_vllm(path: Path, heads: HeadCategories, work: Path, images: int) -> Any:
    """Start vLLM with heads, in this process so that others can be handed over."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # masks do not run in the second model runner
    import vllm
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    print(f"vLLM {vllm.__version__}, both engines in float32")
    file = work / "heads.json"
    heads.save(file)
    return vllm.LLM(
        **tokenprune_vllm.engine_args(
            path,
            masks=file,
            dtype="float32",
            enforce_eager=True,
            # Heads are exchanged between questions, and keys are those of the heads before.
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_seqs=32,
            # So many tokens of encoded images are kept: all, and each is encoded once.
            max_num_batched_tokens=max(1024, IMAGE_TOKENS * images),
            limit_mm_per_prompt={"image": max(IMAGES), "video": 0},
            disable_log_stats=True,
            distributed_executor_backend=UniProcExecutor,
        )
    )


def said_in_vllm(llm: Any, processor: Any, asked: Sequence[Asked], *, masked: bool) -> list[Said]:
    """Return what vLLM answers, with the log-probabilities of the 20 likeliest tokens."""
    import vllm

    unmasked = {} if masked else {"mm_processor_kwargs": {"tokenprune": {"masks": False}}}
    requests = [
        {
            "prompt": chat(processor, one),
            "multi_modal_data": {
                "image": [Image.open(image).convert("RGB") for image in one.images]
            },
            **unmasked,
        }
        for one in asked
    ]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=20)
    found = []
    for output in llm.generate(requests, sampling, use_tqdm=False):
        (said,) = output.outputs
        scores = [{token: one.logprob for token, one in step.items()} for step in said.logprobs]
        found.append(Said(said.text.strip(), tuple(said.token_ids), tuple(scores)))
    return found


def apart(one: Said, other: Said) -> float:
    """Return the largest difference of log-probabilities, as far as both have read the same."""
    largest = 0.0
    for number, (a, b) in enumerate(zip(one.scores, other.scores, strict=False)):
        largest = max([largest, *(abs(a[token] - b[token]) for token in a.keys() & b.keys())])
        if one.tokens[number] != other.tokens[number]:
            break
    return largest


def difference(one: Said, other: Said) -> str:
    """Say where two answers part and how near a tie each is there; nothing if they are the same."""
    if one.tokens == other.tokens:
        return ""
    for a, b, here, there in zip(one.tokens, other.tokens, one.scores, other.scores, strict=False):
        if a != b:
            # Of vLLM the likeliest tokens are known alone.
            leads = here[a] - here[b], there[b] - there.get(a, -math.inf)
            return (
                f"{one.text!r} here, ahead by {leads[0]:.1e}; "
                f"{other.text!r} in vLLM, ahead by {leads[1]:.1e}"
            )
    return f"{one.text!r} here, {other.text!r} in vLLM: one goes on where the other ends"


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
