"""Selectors of flexselect-lite with random weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenprune_hf.lite.model import LiteConfig, LiteModel

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def lite(features: int, vocab_size: int, model_type: str, **decoder: Any) -> LiteModel:
    """Return a selector with weights large enough to matter."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LiteConfig(features, model_type, vocab_size, {**DECODER, **decoder})
    model = LiteModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    torch.random.set_rng_state(state)
    return model.eval()


def saved(folder: Path, features: int, vocab_size: int, model_type: str) -> dict[str, Any]:
    """Save such a selector; return the options that name it."""
    lite(features, vocab_size, model_type).save(folder)
    return {"path": str(folder)}
