"""Prefill under sparse masks in vLLM's engine, by density and length, for `bench_masks.py`.

One engine answers one prompt with one token, again and again: without masks, as its request asks,
and under heads of each density, which are exchanged between requests. All-dense heads leave every
layer to vLLM; it is checked that they do. Nothing is cached between requests but encoded images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_common import seconds, spread, table_of
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenprune.masks import HeadCategories, PromptLayout

TOKEN = 4
"""Pixels of a token's side: two patches of two."""

TEXT = {"<pad>": 0, "<s>": 1, "</s>": 2}
"""Special tokens of text, as the model's config says. Their names begin no other word."""

PLAIN = "unmasked"


@dataclass
class VllmRuns:
    """Seconds to the first token at one length, by what was asked for, turn by turn."""

    tokens: int
    pairs: dict[float, float] = field(default_factory=dict)
    layers: dict[float, int] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    masked: dict[float, list[float]] = field(default_factory=dict)

    def ratios(self, density: float) -> list[float]:
        """How much faster than without masks, turn by turn."""
        return [slow / fast for slow, fast in zip(self.plain, self.masked[density], strict=True)]


def save(model: Any, folder: Path, most_tokens: int, names: dict[str, int]) -> None:
    """Write a checkpoint that vLLM loads.

    Parameters
    ----------
    model
        Of `bench_masks.build_model`.
    folder
        Where.
    most_tokens
        Tokens of the largest image.
    names
        Special tokens, and their numbers.
    """
    model.save_pretrained(folder)
    vocabulary = model.config.get_text_config().vocab_size
    words = {f"w{number}": number for number in range(vocabulary)}
    names = {**TEXT, **names}
    for name, number in names.items():
        del words[f"w{number}"]
        words[name] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(names))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip
    vision = model.config.vision_config
    shape = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": TOKEN**2, "longest_edge": most_tokens * TOKEN**2},
    }
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape),
        fast,
        transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **shape),
    ).save_pretrained(folder)


def request(layout: PromptLayout, masks: bool) -> dict[str, Any]:
    """Return a prompt of this layout; each image has noise of its own."""
    generator = np.random.default_rng(0)
    words, images, place = [], [], 0
    for span in layout.images:
        words += [f"w{number}" for number in generator.integers(3, 4000, span.start - 1 - place)]
        words.append("<|vision_start|><|image_pad|><|vision_end|>")
        _, rows, columns = span.grid or (1, 1, len(span))
        pixels = generator.integers(0, 256, (TOKEN * rows, TOKEN * columns, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
        place = span.stop + 1
    words += [f"w{number}" for number in generator.integers(3, 4000, layout.length - place)]
    return {
        "prompt": " ".join(words),
        "multi_modal_data": {"image": images},
        **({} if masks else {"mm_processor_kwargs": {"tokenprune": {"masks": False}}}),
    }


def give_heads(worker: Any, heads: HeadCategories) -> int:
    """Exchange a worker's heads; return how many layers have masks."""
    masks = worker.get_model()._masks
    masks.exchange(heads, worker.vllm_config)
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sum("forward" in vars(getattr(layer, "impl", None) or object) for layer in layers)


def start(folder: Path, heads: HeadCategories, plan: argparse.Namespace) -> Any:
    """Return an engine with a heads file, in this process."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if plan.threads:  # as many as torch has, on any core
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In this process, so that heads can be handed over; and the model runner that masks take.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    import tokenprune_vllm

    heads.save(folder / "heads.json")
    return vllm.LLM(
        **tokenprune_vllm.engine_args(
            folder,
            masks=folder / "heads.json",
            dtype=str(plan.dtype).removeprefix("torch."),
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=plan.lengths[-1] + 16,
            max_num_batched_tokens=min(plan.chunk, plan.lengths[-1] + 16),
            max_num_seqs=2,
            limit_mm_per_prompt={"image": plan.images, "video": 0},
            disable_log_stats=True,
            distributed_executor_backend=UniProcExecutor,
        )
    )


def measure(
    llm: Any,
    layout: PromptLayout,
    turns: int,
    heads: dict[float, HeadCategories],
    pairs: dict[float, float],
    clock: Callable[[], float] = time.perf_counter,
) -> VllmRuns:
    """Run a prompt without masks and under heads of each density, in turn.

    Parameters
    ----------
    llm
        The engine.
    layout
        Of the prompt.
    turns
        How often; the images are encoded before.
    heads, pairs
        By density, and the share of pairs that they let through.
    clock
        What requests are timed with.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    plain, masked = request(layout, masks=False), request(layout, masks=True)

    def answer(asked: dict[str, Any]) -> Callable[[], Any]:
        return lambda: llm.generate(asked, sampling, use_tqdm=False)

    (said,) = answer(plain)()
    answer(masked)()
    found = VllmRuns(len(said.prompt_token_ids), pairs)
    if found.tokens != layout.length:
        raise RuntimeError(f"the prompt has {found.tokens} tokens and not {layout.length}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(turns):
        found.plain.append(seconds(answer(plain), device, clock))
        for density, categories in heads.items():
            (found.layers[density],) = llm.collective_rpc(give_heads, args=(categories,))
            took = seconds(answer(masked), device, clock)
            found.masked.setdefault(density, []).append(took)
    return found


def print_vllm(console: Console, measured: dict[int, VllmRuns], plan: argparse.Namespace) -> None:
    """Print the engine's times."""
    table = table_of(
        f"vLLM, seconds to the first token, chunks of {plan.chunk} tokens",
        "tokens",
        "masks",
        "pairs",
        "layers with masks",
        "seconds",
        "x faster than unmasked",
        words=["masks"],
    )
    for length, runs in measured.items():
        table.add_row(str(length), PLAIN, "1.000", "0", f"{statistics.median(runs.plain):.3f}", "")
        for density, times in runs.masked.items():
            table.add_row(
                str(length),
                "all dense" if density == 1 else f"asked for {density:g}",
                f"{runs.pairs[density]:.3f}",
                str(runs.layers[density]),
                f"{statistics.median(times):.3f}",
                spread(runs.ratios(density)),
            )
        table.add_section()
    console.print(table)
    console.print(
        "Whole requests: processor, scheduler and language model; images are encoded before. One "
        "turn from\n32k tokens. Seconds are those "
        + ("of the processor, all threads together.\n" if plan.clock == "cpu" else "of a clock.\n")
    )


def times_of(runs: VllmRuns, densities: Sequence[float]) -> list[tuple[float, float]]:
    """Return pairs and seconds, from dense to sparse."""
    return [(runs.pairs[one], statistics.median(runs.masked[one])) for one in densities]
