"""Ovis2's marks around an image, whose embeddings its forward takes from the encoder's output.

They are rows of a table of the model, the same whatever the image, and the output that hands kept
rows on has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tokenprune_hf.attached import named_arguments

READS_INDICATORS = frozenset({"ovis2"})
"""The `config.model_type` of such models."""


class _Indicators:
    """A hook that adds the marks' embeddings; an object, so that a copied model has its own."""

    def __call__(self, inner: Any, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Add them to the output of the encoder with which the inner model is called."""
        named = named_arguments(inner, args, kwargs)
        image = (named.get("mm_encoder_outputs") or {}).get("image")
        if image is None or getattr(image, "visual_indicator_features", None) is not None:
            return
        table = inner.visual_embeddings_table
        count = int(inner.vision_tower.num_visual_indicator_tokens)
        last = torch.arange(inner.visual_vocab_size - count, inner.visual_vocab_size)
        image.visual_indicator_features = table(last.to(table.weight.device))


def give_indicators(inner: Any) -> RemovableHandle:
    """Add the marks' embeddings to kept rows, until the hook is removed.

    Parameters
    ----------
    inner
        The model without its language model head.
    """
    handle: RemovableHandle = inner.register_forward_pre_hook(_Indicators(), with_kwargs=True)
    return handle
