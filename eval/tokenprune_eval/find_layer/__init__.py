"""Which decoder layer of a model finds a needle in a video: the measurement and its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune_eval.find_layer.measure import FRAMES_PER_SET as FRAMES_PER_SET
    from tokenprune_eval.find_layer.measure import LayerRecall as LayerRecall
    from tokenprune_eval.find_layer.measure import Run as Run
    from tokenprune_eval.find_layer.measure import find_layer as find_layer
    from tokenprune_eval.find_layer.needles import Needle as Needle
    from tokenprune_eval.find_layer.needles import drawn_needles as drawn_needles
    from tokenprune_eval.find_layer.needles import read_needles as read_needles

_HOMES = {
    "FRAMES_PER_SET": "measure",
    "LayerRecall": "measure",
    "Needle": "needles",
    "Run": "measure",
    "drawn_needles": "needles",
    "find_layer": "measure",
    "read_needles": "needles",
}

__all__, __getattr__, __dir__ = lazy_names("tokenprune_eval.find_layer", _HOMES)
