"""tokenprune_hf: visual token pruning inside transformers.

    with tokenprune_hf.prune(model, method="zeroth-order", keep=0.1) as pruning:
        output = model.generate(**inputs, max_new_tokens=32)
    pruning.selections

The model's own forward runs; no code of transformers is copied and no attention is made eager.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenprune_vlm.checked  # noqa: F401  # raises where `tokenprune` is another project's
from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.media.video import Video as Video
    from tokenprune.media.video import read_video as read_video
    from tokenprune_hf.encoding import Encoded as Encoded
    from tokenprune_hf.encoding import encode as encode
    from tokenprune_hf.encoding import join as join
    from tokenprune_hf.loading import ask as ask
    from tokenprune_hf.loading import load as load
    from tokenprune_hf.mllama.trimmed import TrimmedAttention as TrimmedAttention
    from tokenprune_hf.mllama.trimmed import trim_cross_attention as trim_cross_attention
    from tokenprune_hf.pruning import Pruning as Pruning
    from tokenprune_hf.pruning import apply as apply
    from tokenprune_hf.pruning import prune as prune
    from tokenprune_hf.pruning import remove as remove
    from tokenprune_hf.resized import Resized as Resized
    from tokenprune_hf.resizing import resize as resize
    from tokenprune_hf.sparse_attention import Sparse as Sparse
    from tokenprune_hf.sparse_attention import sparse as sparse
    from tokenprune_hf.vision import supported_models as supported_models

_HOMES = {
    "Encoded": "encoding",
    "Pruning": "pruning",
    "Resized": "resized",
    "Sparse": "sparse_attention",
    "TrimmedAttention": "mllama.trimmed",
    "Video": "tokenprune.media.video",
    "apply": "pruning",
    "ask": "loading",
    "encode": "encoding",
    "join": "encoding",
    "load": "loading",
    "supported_models": "vision",
    "prune": "pruning",
    "read_video": "tokenprune.media.video",
    "remove": "pruning",
    "resize": "resizing",
    "sparse": "sparse_attention",
    "trim_cross_attention": "mllama.trimmed",
}

__all__, __getattr__, __dir__ = lazy_names("tokenprune_hf", _HOMES, has_moved=["measure_dominance"])
