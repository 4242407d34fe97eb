#!/usr/bin/env python
"""Whether a drafter guesses as well for a pruned prompt: speculative decoding of the bundled model.

    scripts/bench_speculation.py --work WORK > docs/bench_speculation.txt

Two EAGLE drafters (one layer that reads the token's embedding and what the model made of the token
before) are trained on captions of training scenes: one with all visual tokens, as the drafters that
people serve were, and one with prompts that were pruned, too. Each is the same for the same seed.
Then vLLM's real engine describes committed test scenes with them, unpruned and pruned, with both
kinds of positions.

Printed is how many tokens a step brings, the model's own included, which share of the drafted ones
the model accepts, and how often it accepts the first, the second and the third.

WORK keeps features of scenes and the drafters; they take some minutes on two cores.
Needs the extra ``demo``, vLLM, and what training the bundled model needs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
from bench_common import processor as processor_name
from bench_common import quiet, releases_line
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from train_demo_model import (
    CAPTION_PROMPT,
    SHUFFLED_PROMPT,
    Layout,
    encode,
    rendered,
    scene_records,
)
from transformers import LlamaConfig, LlamaModel

import tokenprune_hf
import tokenprune_vllm
from tokenprune.config import Positions
from tokenprune.files import making_folder
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune.tokens import VisualTokens
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import IMAGE_TOKENS, bundled_model_path
from tokenprune_hf.vision import vision_model

DRAFTED = 3  # tokens a step
ANSWER = 32  # tokens
BATCH = 32
TAUGHT = 2  # of the drafted tokens, each time from what the drafter made of the one before
PROMPTS = (CAPTION_PROMPT, SHUFFLED_PROMPT)

log = Console(stderr=True)


# The drafter -----------------------------------------------------------------------------------


class Drafter(nn.Module):
    """EAGLE's head as vLLM's `EagleLlamaForCausalLM` has it (Li et al. 2024, arXiv:2401.15077).

    Parameters
    ----------
    text
        Config of the language model.
    """

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters=dict(text.rope_parameters),
            tie_word_embeddings=False,
        )
        self.fc = nn.Linear(2 * text.hidden_size, text.hidden_size, bias=False)
        self.body = LlamaModel(self.config)
        self.body.embed_tokens = None  # the language model's own
        self.body.layers[0].input_layernorm = nn.Identity()
        self.body.norm = nn.Identity()

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return [B, L, D] what comes after each token, from its embedding and what was before."""
        made: Tensor = self.body(
            inputs_embeds=self.fc(torch.cat([embedded, hidden], dim=-1)), use_cache=False
        ).last_hidden_state
        return made

    def save(self, folder: Path) -> None:
        """Write the checkpoint that vLLM reads."""
        layer = {
            f"layers.0.{name}": tensor for name, tensor in self.body.layers[0].named_parameters()
        }
        weights = {"fc.weight": self.fc.weight, **layer}
        weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = {**self.config.to_dict(), "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Shape:
    """How a prompt is read: all of its image's tokens, or some.

    Attributes
    ----------
    keep
        Tokens of an image; None for all.
    positions
        See `tokenprune_hf.prune`.
    """

    keep: int | None = None
    positions: Positions = "original"


class Read:
    """What the bundled model makes of captions of training scenes.

    Parameters
    ----------
    shapes
        Batches of captions take turns in them.

    Attributes
    ----------
    embedded, hidden
        [N, L, D]: embeddings, and what the last layer made of each token.
    learnt
        BoolTensor [N, L]: whether what comes after the next token is a word of the answer.
    """

    def __init__(
        self, model: Any, layout: Layout, options: argparse.Namespace, shapes: Sequence[Shape]
    ) -> None:
        count, work, seed = options.scenes, options.work, options.seed
        records = scene_records("train", count, work / f"scenes-train-{count}.jsonl", "standard", 2)
        pictures = (Image.fromarray(one.pixels) for one in rendered("train", count, "standard", 2))
        target = work / f"scenes-train-{count}.npy"
        features = encode(pictures, count, target, layout.processor, model.model.vision_tower)
        rng = np.random.default_rng(seed)
        prefix = layout.prefix(None)
        rows: list[tuple[int, Sequence[int], int]] = []
        for number, scene in enumerate(records):
            for branch in (
                layout.branch(CAPTION_PROMPT, scenes.caption(scene)),
                layout.shuffled_caption(scene, rng),
            ):
                prompt = [*prefix, *branch.prompt]
                rows.append((number, [*prompt, *branch.answer], len(prompt)))
        length = max(len(ids) for _, ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        self.learnt = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, (_, tokens, prompt_length) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            self.learnt[row, prompt_length - 2 : len(tokens) - 2] = True
        scene_of = np.array([number for number, _, _ in rows])
        starts = range(0, len(rows), BATCH)
        parts = []
        for start, shape in zip(starts, itertools.cycle(shapes), strict=False):
            batch = slice(start, start + BATCH)
            part = _read(model, ids[batch], features[scene_of[batch]], shape, options.method)
            # Dropped tokens stand in front of the answer: what is learnt moves with it.
            left = length - part[0].shape[1]
            self.learnt[batch] = self.learnt[batch].roll(-left, dims=1)
            parts.append([nn.functional.pad(one, (0, 0, 0, left)) for one in part])
        self.embedded, self.hidden = (torch.cat(part) for part in zip(*parts, strict=True))


@torch.inference_mode()
def _read(
    model: Any, ids: Tensor, features: Any, shape: Shape, method: str
) -> tuple[Tensor, Tensor]:
    """Return embeddings, as they are of text alone, and last hidden states of a batch."""
    side = int(features.shape[1] ** 0.5)
    patches = torch.from_numpy(features).float().reshape(len(ids), side, side, -1)
    merged = model.model.pixel_shuffle(patches, scale_factor=0.5).flatten(1, 2)
    visual = model.model.multi_modal_projector(merged)
    embedded = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    given = embedded.masked_scatter(is_image[..., None], visual)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if shape.keep is not None:
        grid = (1, patches.shape[1] // 2, patches.shape[2] // 2)
        projector = vision_model(model).projector("image")
        items = [
            VisualTokens(grid=grid, features=one, embeddings=rows, projector=projector)
            for one, rows in zip(merged, visual, strict=True)
        ]
        stays = ~is_image
        for row, one in zip(stays, select_many(items, build(method, {}), shape.keep), strict=True):
            row[(~row).nonzero()[one.kept, 0]] = True
        # As many tokens of every prompt stay.
        columns = stays.nonzero()[:, 1].view(len(ids), -1)
        wide = columns[..., None].expand(-1, -1, given.shape[-1])
        given, embedded = given.gather(1, wide), embedded.gather(1, wide)
        positions = columns if shape.positions == "original" else positions[:, : columns.shape[1]]
    hidden = model.model.language_model(
        inputs_embeds=given,
        position_ids=positions,
        # Without a mask, gaps in positions would be taken for packed prompts.
        attention_mask=torch.ones_like(positions),
        use_cache=False,
    ).last_hidden_state
    return embedded, hidden


def train(
    model: Any, layout: Layout, options: argparse.Namespace, name: str, shapes: Sequence[Shape]
) -> Path:
    """Return the folder of a drafter, trained where there is none."""
    folder: Path = options.work / f"{name}-{options.scenes}-{options.steps}-{options.seed}"
    if (folder / "model.safetensors").is_file():
        return folder
    started = time.monotonic()
    read = Read(model, layout, options, shapes)
    log.print(f"read {len(read.hidden)} captions: {time.monotonic() - started:.0f} s")
    torch.manual_seed(options.seed)
    drafter = Drafter(model.config.text_config)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=options.steps, pct_start=0.1
    )
    for step in range(options.steps):
        rows = torch.randint(len(read.hidden), (BATCH // 2,))
        embedded, hidden = read.embedded[rows], read.hidden[rows]
        learnt = read.learnt[rows]
        loss = torch.zeros(())
        # What it made itself stands for the model's from the second drafted token on.
        before = hidden[:, :-1]
        for ahead in range(1, TAUGHT + 1):
            made = drafter(embedded[:, ahead:], before)
            wanted = hidden[:, ahead:]
            counts = learnt[:, ahead - 1 : -1]
            own = nn.functional.log_softmax(model.lm_head(made[counts]), dim=-1)
            right = nn.functional.softmax(model.lm_head(wanted[counts]), dim=-1)
            loss = loss + nn.functional.kl_div(own, right, reduction="batchmean")
            loss = loss + 0.1 * nn.functional.smooth_l1_loss(made[counts], wanted[counts])
            before = made[:, :-1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 25 == 0:
            spent = time.monotonic() - started
            log.print(f"{step + 1}/{options.steps} {spent:.0f} s loss {float(loss):.3f}")
    with making_folder(folder, known_by="model.safetensors") as made_folder:
        drafter.save(made_folder)
    log.print(f"{sum(one.numel() for one in drafter.parameters()):,} parameters")
    return folder


# Answers ---------------------------------------------------------------------------------------


@contextmanager
def engine(checkpoint: Path, options: argparse.Namespace, **more: Any) -> Iterator[Any]:
    """Start vLLM, and stop it after the block."""
    import vllm

    arguments = tokenprune_vllm.engine_args(
        checkpoint,
        options.method,
        options.keep[0],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=BATCH,
        disable_log_stats=False,
        **more,
    )
    llm = vllm.LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def requests(processor: Any, images: Sequence[Path], keep: int | None) -> list[dict[str, Any]]:
    """Return a request for each image and prompt; without a budget unpruned ones."""
    asked = {"off": True} if keep is None else {"keep": keep}
    made = []
    for image in images:
        for text in PROMPTS:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            message = [{"role": "user", "content": content}]
            made.append(
                {
                    "prompt": processor.apply_chat_template(message, add_generation_prompt=True),
                    "multi_modal_data": {"image": Image.open(image).convert("RGB")},
                    "mm_processor_kwargs": {"tokenprune": asked},
                }
            )
    return made


def describe(llm: Any, asked: Sequence[dict[str, Any]]) -> Tensor:
    """Return how many drafts, drafted tokens, and accepted tokens at each place there were."""
    import vllm

    before = _counted(llm)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=ANSWER)
    llm.generate(list(asked), sampling, use_tqdm=False)
    return _counted(llm) - before


def _counted(llm: Any) -> Tensor:
    found = {metric.name: metric for metric in llm.get_metrics()}
    of = "vllm:spec_decode_num_"
    counts = [found[f"{of}{counter}"].value for counter in ("drafts", "draft_tokens")]
    places = found[f"{of}accepted_tokens_per_pos"].values
    return torch.tensor([*counts, *places], dtype=torch.float64)


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="for features and the drafter")
    parser.add_argument("--scenes", type=int, default=600, help="to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=60, help="to describe, twice each")
    parser.add_argument("--method", default="zeroth-order")
    parser.add_argument("--keep", type=int, nargs="+", default=[32, 16])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    quiet()
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layout = Layout(processor)
    shapes = [Shape(), *(Shape(k, p) for k in options.keep for p in get_args(Positions))]
    drafters = {
        "unpruned": train(model, layout, options, "unpruned", [Shape()]),
        "pruned, too": train(model, layout, options, "pruned", shapes),
    }
    images = sorted({one.image for one in scenes.load_scenes()})[: options.images]
    budgets = [None, *options.keep]
    table = Table("trained on", "positions", "tokens of an image")
    table.add_column("tokens a step", justify="right")
    table.add_column("of drafted, accepted", justify="right")
    for number in range(DRAFTED):
        table.add_column(f"{number + 1}.", justify="right")
    for (name, drafter), positions in itertools.product(drafters.items(), get_args(Positions)):
        speculative = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": DRAFTED}
        settings = {"positions": positions, "speculative_config": speculative}
        with engine(bundled_model_path(), options, **settings) as llm:
            # Unpruned, both are the same.
            for keep in budgets if positions == "original" else options.keep:
                drafts, drafted, *right = describe(llm, requests(processor, images, keep)).tolist()
                table.add_row(
                    name,
                    "" if keep is None else positions,
                    f"{IMAGE_TOKENS}, unpruned" if keep is None else str(keep),
                    f"{1 + sum(right) / drafts:.2f}",
                    f"{sum(right) / drafted:.3f}",
                    *(f"{accepted / drafts:.3f}" for accepted in right),
                )
    console = Console(width=100)
    console.print(f"{processor_name()}\n{releases_line()}, vllm {_release()}", highlight=False)
    console.print(
        f"the bundled model, float32; EAGLE drafters trained on {2 * options.scenes} captions, "
        f"{DRAFTED} tokens a step\n{options.method}, {len(images)} test scenes, "
        f"{len(PROMPTS)} prompts each, at most {ANSWER} tokens",
        highlight=False,
    )
    console.print(table)


def _release() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    main()
