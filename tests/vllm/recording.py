"""What a worker chose, told to the test: mixed into vLLM's own worker class by its name."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tokenprune.errors import UnsupportedModelError
from tokenprune.masks import HeadCategories


class Recording:
    """Methods that `LLM.collective_rpc` calls in the worker."""

    model_runner: Any

    def start_recording(self) -> None:
        """Note every selection from here on."""
        chooser = self.model_runner.get_model()._pruner.chooser
        self.seen: list[list[list[int]]] | None = None
        if chooser is None:  # a later stage of a pipeline
            return
        seen = self.seen = []
        if not hasattr(chooser, "plain_choose"):
            chooser.plain_choose = chooser.choose

        def choose(*arguments: Any) -> Any:
            chosen = chooser.plain_choose(*arguments)
            seen.extend([one.kept.tolist() for one in of_item] for of_item in chosen)
            return chosen

        chooser.choose = choose

    def recorded(self) -> list[list[list[int]]] | None:
        """Return kept indices: one list for each image or video, in it one for each segment.

        None where no images come.
        """
        return self.seen

    def start_noting_positions(self) -> None:
        """Note the positions with which the language model is called from here on."""
        pruner = self.model_runner.get_model()._pruner
        self.positions: list[list[list[int]]] = []
        if not hasattr(pruner, "plain_positions"):
            pruner.plain_positions = pruner.positions

        def positions(given: Any) -> Any:
            moved = pruner.plain_positions(given)
            self.positions.append(moved.reshape(-1, moved.shape[-1]).tolist())
            return moved

        pruner.positions = positions

    def noted_positions(self) -> list[list[list[int]]]:
        """Return them, step by step: in each a list for each axis."""
        return self.positions

    def why_not_read(self, layer: int) -> str | None:
        """Return why a layer cannot be read with the question, where questions are read."""
        chooser = self.model_runner.get_model()._pruner.chooser
        try:
            return None if chooser is None else str(chooser._language_model.reference_layer(layer))
        except UnsupportedModelError as error:
            return str(error)

    def warm_up(self) -> None:
        """Run the encoder and the model once as vLLM does to measure memory.

        On a CPU without torch.compile it does not, and so never makes the buffers for what later
        stages of a pipeline are handed: their first request would end the engine, pruned or not.
        """
        self.model_runner.profile_run()

    def start_noting_drafts(self) -> None:
        """Note what the drafter is called with, and what the model, from here on."""
        self.drafts: dict[str, list[Any]] = {"model": [], "positions": [], "slots": [], "rows": []}
        runner = self.model_runner
        model, drafter = runner.get_model(), runner.drafter.model
        if not hasattr(drafter, "plain_forward"):
            model.plain_forward, drafter.plain_forward = model.forward, drafter.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            self.drafts["model"].append(named["inputs_embeds"].tolist())
            return model.plain_forward(*arguments, **named)

        def draft(*arguments: Any, **named: Any) -> Any:
            from vllm.forward_context import get_forward_context

            positions, given = named["positions"], named["inputs_embeds"]
            self.drafts["positions"].append(positions.reshape(-1, positions.shape[-1]).tolist())
            slots = next(iter(get_forward_context().slot_mapping.values()))
            self.drafts["slots"].append(slots.tolist())
            self.drafts["rows"].append(None if given is None else given.tolist())
            return drafter.plain_forward(*arguments, **named)

        model.forward, drafter.forward = forward, draft

    def noted_drafts(self) -> dict[str, list[Any]]:
        """Return them, call by call: embeddings, the drafter's positions, slots and embeddings."""
        return self.drafts

    def encode_together(self) -> None:
        """Run the encoder on as many images at once as vLLM hands over."""
        self.model_runner.get_model()._pruner._most_rows = 10**9

    def runner(self) -> str:
        """Return the module of the model runner's class."""
        return str(type(self.model_runner).__module__)

    def layers_with_masks(self) -> int:
        """Return how many layers have another attention than vLLM's own."""
        layers = self.model_runner.compilation_config.static_forward_context.values()
        return sum("forward" in vars(layer.impl) for layer in layers)

    def exchange_heads(self, path: str) -> None:
        """Have the masks of another heads file of the same model from here on."""
        runner = self.model_runner
        runner.get_model()._masks.exchange(HeadCategories.load(path), runner.vllm_config)

    def memory(self) -> dict[str, int]:
        """Return how many encoded images the worker still holds, and how many requests."""
        runner = self.model_runner
        return {"images": len(runner.encoder_cache), "requests": len(runner.requests)}

    def rotary_length(self) -> int:
        """Return how many positions the language model's rotary table has."""
        lengths = [
            module.cos_sin_cache.shape[0]
            for module in self.model_runner.get_model().get_language_model().modules()
            if hasattr(module, "cos_sin_cache")
        ]
        return int(max(lengths))

    def put_heads_together(self) -> None:
        """Give rotary embeddings q and k as [n, H * d]: vLLM's CPU kernel is wrong on [n, H, d].

        LFM2 and DeepSeek call it so, and therefore give wrong answers on a CPU, pruned or not.
        """
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cos_sin_cache"):
                module.forward = _on_flat_heads(module.forward)

    def see_both_ways(self) -> None:
        """Let images see what vLLM's kernels for GPUs let them see, which those for CPUs do not.

        Prompts have to be read in one step: what came in an earlier one is not looked at again.
        """
        from vllm.v1.attention.backends import cpu_attn

        builder: Any = cpu_attn.CPUAttentionMetadataBuilder
        layer: Any = cpu_attn.CPUAttentionBackendImpl
        build, forward = builder.build, layer.forward

        def with_ranges(own: Any, prefix: int, common: Any, fast_build: bool = False) -> Any:
            made = build(own, prefix, common, fast_build)
            # Gemma 4 takes it off the layers that see everything.
            made.mm_prefix_range = common.mm_req_doc_ranges
            return made

        def both_ways(
            own: Any, module: Any, q: Any, k: Any, v: Any, cache: Any, made: Any, **more: Any
        ) -> Any:
            output = forward(own, module, q, k, v, cache, made, **more)
            edges = [] if made is None else made.query_start_loc.tolist()
            for request, (start, end) in enumerate(itertools.pairwise(edges)):
                length = int(made.seq_lens[request])
                ranges = (made.mm_prefix_range or {}).get(request)
                if ranges and end - start > 1:
                    assert end - start == length, "the prompt was read in several steps"
                    mask = _sees(length, ranges, own.sliding_window)
                    query, key, value = (one[start:end].transpose(0, 1)[None] for one in (q, k, v))
                    found = torch.nn.functional.scaled_dot_product_attention(
                        query, key, value, attn_mask=mask, scale=own.scale, enable_gqa=True
                    )
                    output[start:end] = found[0].transpose(0, 1)
            return output

        builder.build, layer.forward = with_ranges, both_ways


def _on_flat_heads(forward: Any) -> Any:
    """Return `forward` of a rotary embedding, called with the heads of q and k in one dimension."""

    def run(positions: Any, query: Any, key: Any, *more: Any) -> Any:
        # Of a single head `flatten` makes no copy, and the caller writes into what it gave.
        turned = forward(positions, query.flatten(1).clone(), key.flatten(1).clone(), *more)
        return tuple(one.view(given.shape) for one, given in zip(turned, (query, key), strict=True))

    return run


def _sees(length: int, ranges: list[tuple[int, int]], window: int) -> torch.Tensor:
    """Return [L, L]: causal, both ways in each range (its last token included), in the window."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for first, last in ranges:
        mask[first : last + 1, first : last + 1] = True
    return mask if window <= 0 else mask & torch.ones_like(mask).triu(1 - window)
