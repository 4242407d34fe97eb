"""tokenprune_vllm: visual token pruning inside vLLM.

    llm = vllm.LLM(**tokenprune_vllm.engine_args(MODEL, method="cls-attention", keep=64))

vLLM's own engine and models run; the plugin registers architectures of its own beside vLLM's, and
without them vLLM behaves as if it were not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune_vllm.architectures import ARCHITECTURES as ARCHITECTURES
    from tokenprune_vllm.engine import engine_args as engine_args
    from tokenprune_vllm.settings import RequestError as RequestError

_HOMES = {
    "ARCHITECTURES": "architectures",
    "RequestError": "settings",
    "engine_args": "engine",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenprune_vllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokenprune_vllm.{_HOMES[name]}"), name)
