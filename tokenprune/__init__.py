"""tokenprune: keep the visual tokens that matter, before the language model reads them.

The selector library. It needs torch and numpy only and knows no engine and no model family;
`tokenprune_hf` puts it into transformers. Names are loaded when first used, so that starting the
command does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.budget import Keep as Keep
    from tokenprune.budget import tokens_kept as tokens_kept
    from tokenprune.config import PruningConfig as PruningConfig
    from tokenprune.errors import TokenPruneError as TokenPruneError
    from tokenprune.merging import Merge as Merge
    from tokenprune.registry import methods as methods
    from tokenprune.representation import tokens_represented as tokens_represented
    from tokenprune.selecting import select as select
    from tokenprune.selecting import select_many as select_many
    from tokenprune.selection import Selection as Selection
    from tokenprune.selectors.base import Picks as Picks
    from tokenprune.selectors.base import Selector as Selector
    from tokenprune.tokens import TokenBatch as TokenBatch
    from tokenprune.tokens import VisualTokens as VisualTokens
    from tokenprune.tower.projectors import MLPProjector as MLPProjector

DISTRIBUTION = "tokenprune-vlm"
"""The name under which pip knows this package; `tokenprune_vlm` tells it from others by this."""

_HOMES = {
    "Keep": "budget",
    "MLPProjector": "tower.projectors",
    "Merge": "merging",
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

__all__, __getattr__, __dir__ = lazy_names("tokenprune", _HOMES)
