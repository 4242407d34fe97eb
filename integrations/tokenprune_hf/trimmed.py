"""Deprecated: `TrimmedAttention` is in `tokenprune_hf`, and the rest in `tokenprune_hf.mllama`."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from tokenprune_hf.mllama import trimmed
    from tokenprune_hf.mllama.method import METHOD

    moved = {
        "NAME": METHOD.name,
        "FirstLayer": trimmed.FirstLayer,
        "TrimmedAttention": trimmed.TrimmedAttention,
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"tokenprune_hf.trimmed.{name} is deprecated. Use tokenprune_hf.trim_cross_attention and "
        "tokenprune_hf.TrimmedAttention.",
        DeprecationWarning,
        stacklevel=2,
    )
    return moved[name]
