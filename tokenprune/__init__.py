"""tokenprune: keep the visual tokens that matter, before the language model reads them.

The selector library. It needs torch and numpy only and knows no engine and no model family;
`tokenprune_hf` puts it into transformers. Names are loaded when first used, so that starting the
command does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.budget import Keep as Keep
    from tokenprune.budget import tokens_kept as tokens_kept
    from tokenprune.config import PruningConfig as PruningConfig
    from tokenprune.errors import TokenPruneError as TokenPruneError
    from tokenprune.projectors import MLPProjector as MLPProjector
    from tokenprune.registry import methods as methods
    from tokenprune.representation import tokens_represented as tokens_represented
    from tokenprune.selecting import select as select
    from tokenprune.selecting import select_many as select_many
    from tokenprune.selection import Selection as Selection
    from tokenprune.selectors.base import Picks as Picks
    from tokenprune.selectors.base import Selector as Selector
    from tokenprune.tokens import TokenBatch as TokenBatch
    from tokenprune.tokens import VisualTokens as VisualTokens

_HOMES = {
    "Keep": "budget",
    "MLPProjector": "projectors",
    "Picks": "selectors.base",
    "PruningConfig": "config",
    "Selection": "selection",
    "Selector": "selectors.base",
    "TokenBatch": "tokens",
    "TokenPruneError": "errors",
    "VisualTokens": "tokens",
    "methods": "registry",
    "select": "selecting",
    "select_many": "selecting",
    "tokens_kept": "budget",
    "tokens_represented": "representation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokenprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "errors"]
