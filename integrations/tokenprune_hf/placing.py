"""Models whose forward takes an encoder's rows in equal blocks, which kept rows are not.

Until transformers 5.19 a block of SmolVLM's is the first entry of the rows, later a patch's side;
what stays of an image or a video is no multiple of either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tokenprune_hf.attached import named_arguments

PLACES_ROWS_IN_BLOCKS = frozenset({"smolvlm"})
"""The `config.model_type` of such models."""


class _Placing:
    """A hook that puts kept rows into the prompt; an object, so that a copied model has its own."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def __call__(
        self, inner: Any, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Give the inner model embeddings in place of ids and rows."""
        # In embeddings rows may be put wherever their placeholders are, and an inner model that is
        # given no ids and no encoder output takes them as they are.
        named = named_arguments(inner, args, kwargs)
        image = (named.get("mm_encoder_outputs") or {}).get("image")
        if image is None or named.get("input_ids") is None:
            return None
        input_ids = named.pop("input_ids")
        embeddings = inner.get_input_embeddings()(input_ids)
        rows = torch.cat(list(image.pooler_output)).to(embeddings)
        places = (input_ids == self._token_id)[..., None].to(embeddings.device)
        embeddings = embeddings.masked_scatter(places, rows)
        return (), {**named, "inputs_embeds": embeddings, "mm_encoder_outputs": None}


def place_kept_rows(inner: Any, token_id: int) -> RemovableHandle:
    """Put kept rows into prompts ourselves, until the hook is removed.

    Parameters
    ----------
    inner
        The model without its language model head.
    token_id
        The placeholder's.
    """
    handle: RemovableHandle = inner.register_forward_pre_hook(_Placing(token_id), with_kwargs=True)
    return handle
