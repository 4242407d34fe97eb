"""tokenprune_vllm: visual token pruning inside vLLM.

    llm = vllm.LLM(**tokenprune_vllm.engine_args(MODEL, method="cls-attention", keep=64))

vLLM's own engine and models run; the plugin registers architectures of its own beside vLLM's, and
without them vLLM behaves as if it were not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenprune_vlm.checked  # noqa: F401  # raises where `tokenprune` is another project's
from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune_vllm.architectures import ARCHITECTURES as ARCHITECTURES
    from tokenprune_vllm.engine import engine_args as engine_args
    from tokenprune_vllm.settings import RequestError as RequestError

_HOMES = {
    "ARCHITECTURES": "architectures",
    "RequestError": "settings",
    "engine_args": "engine",
}

__all__, __getattr__, __dir__ = lazy_names("tokenprune_vllm", _HOMES)
