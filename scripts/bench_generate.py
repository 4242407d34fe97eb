#!/usr/bin/env python
"""Prefill of a LLaVA at 64 of 576 visual tokens: how much faster, and how near to the bound.

    python scripts/bench_generate.py

The model is LLaVA's architecture with random weights in float32: a CLIP-L/14-336 tower, LLaVA's
two-layer projector and a Qwen2-0.5B-shaped language model. Prefills of one prompt run in turn, and
the medians are compared:

    unpruned   the language model reads all 576 visual tokens
    pruned     selection, shortening of the prompt, and the language model on what is left; once
               more with proportional attention
    bound      the language model on a prompt that really is that short

The vision encoder runs before the clock starts, the same for all; its time is printed too. Last
comes how long methods that read the question take to select, and which share that is of what
pruning saves: of the unpruned prefill's time less that of the pruned prefill without selecting.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from bench_common import Variant, in_turn, processor, releases_line, seconds, table_of
from rich.console import Console

import tokenprune_hf

VISUAL, TEXT_BEFORE, TEXT_AFTER, IMAGE_TOKEN = 576, 8, 32, 151_655


CLIP_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
HALF_B: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""Qwen2-0.5B's shape."""


def build_model(vision: Mapping[str, Any] = CLIP_L, text: Mapping[str, Any] = HALF_B) -> Any:
    """Return the LLaVA, random weights, on torch's default device and in its dtype."""
    make: Any = transformers
    config = make.LlavaConfig(
        vision_config=make.CLIPVisionConfig(**vision),
        text_config=make.Qwen2Config(vocab_size=151_936, **text),
    )
    config.image_token_id = IMAGE_TOKEN
    torch.manual_seed(0)
    return make.LlavaForConditionalGeneration(config).eval()


READING: dict[str, tuple[str, dict[str, Any]]] = {
    "flexselect": ("flexselect", {}),
    "relevant-information": ("relevant-information", {}),
    "relevant-information, candidates=1.0": ("relevant-information", {"candidates": 1.0}),
}
"""Methods that read the question, and options."""


def prompt(visual: int) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask [1, L] with `visual` placeholders in one run."""
    words = torch.arange(100, 100 + TEXT_BEFORE + TEXT_AFTER)
    ids = torch.cat([words[:TEXT_BEFORE], torch.full((visual,), IMAGE_TOKEN), words[TEXT_BEFORE:]])[
        None
    ]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=int, default=64, help="visual tokens kept of 576")
    parser.add_argument("--method", default="cls-attention")
    parser.add_argument("--runs", type=int, default=9, help="runs of each, in turn")
    arguments = parser.parse_args()

    console = Console()
    model = build_model()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.inference_mode():
        full, short = prompt(VISUAL), prompt(arguments.keep)
        encoder = statistics.median(
            seconds(lambda: model.get_image_features(pixels, return_dict=True)) for _ in range(3)
        )
        encoded = tokenprune_hf.encode(model, pixel_values=pixels)
        rows = encoded.modalities["image"].rows

        def plain(inputs: dict[str, torch.Tensor], visual: int) -> Any:
            outputs = transformers.modeling_outputs.BaseModelOutputWithPooling(
                pooler_output=[rows[:visual]]
            )
            return model(**inputs, mm_encoder_outputs={"image": outputs}, logits_to_keep=1)

        def pruned(proportional: bool) -> Any:
            with tokenprune_hf.prune(
                model, arguments.method, arguments.keep, proportional_attention=proportional
            ):
                return model(**full, encoded=encoded, logits_to_keep=1)

        variants: dict[str, Callable[[], Any]] = {
            "unpruned": lambda: plain(full, VISUAL),
            "pruned": lambda: pruned(False),
            "pruned, proportional attention": lambda: pruned(True),
            "bound": lambda: plain(short, arguments.keep),
        }
        times = in_turn({name: Variant(run) for name, run in variants.items()}, arguments.runs)
        selecting: dict[str, list[float]] = {name: [] for name in READING}
        share_of_saved: dict[str, list[float]] = {name: [] for name in READING}
        for turn in range(arguments.runs + 1):
            for name, (method, options) in READING.items():
                # Just before each, as the machine may be faster at one time than at another.
                unpruned = seconds(lambda: plain(full, VISUAL))
                with tokenprune_hf.prune(model, method, arguments.keep, **options) as pruning:
                    whole = seconds(lambda: model(**full, encoded=encoded, logits_to_keep=1))
                took = pruning.selecting_seconds
                if turn:
                    selecting[name].append(took)
                    share_of_saved[name].append(took / (unpruned - (whole - took)))

    medians = {name: one.median for name, one in times.items()}
    console.print(f"{processor()}, {torch.get_num_threads()} threads, {releases_line()}, float32")
    console.print(
        f"CLIP-L/14-336 tower ({encoder:.2f} s an image, not counted below), Qwen2-0.5B-shaped "
        f"language model, prompt of {TEXT_BEFORE + TEXT_AFTER} text and {VISUAL} visual tokens, "
        f"{arguments.method} at {arguments.keep}, median of {arguments.runs} runs in turn"
    )
    table = table_of("", "prefill", "tokens", "seconds", "speed-up", words=["prefill"])
    for name, median in medians.items():
        visual = VISUAL if name == "unpruned" else arguments.keep
        table.add_row(
            name,
            str(visual + TEXT_BEFORE + TEXT_AFTER),
            f"{median:.3f}",
            f"{medians['unpruned'] / median:.2f}",
        )
    console.print(table)
    console.print(f"pruned reaches {medians['bound'] / medians['pruned']:.1%} of the bound")
    for name, values in selecting.items():
        share = statistics.median(share_of_saved[name])
        console.print(
            f"selecting by {name}: {statistics.median(values):.3f} s, {share:.2f} of what it saves"
        )


if __name__ == "__main__":
    main()
