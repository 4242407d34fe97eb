"""Which of BlindSight's masks each head of a model can do with: the measurement and its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune_eval.calibrate_heads.measure import HeadCoverage as HeadCoverage
    from tokenprune_eval.calibrate_heads.measure import ask_about as ask_about
    from tokenprune_eval.calibrate_heads.measure import calibrate_heads as calibrate_heads
    from tokenprune_eval.calibrate_heads.measure import find_sinks as find_sinks
    from tokenprune_eval.calibrate_heads.measure import measure_heads as measure_heads
    from tokenprune_eval.calibrate_heads.prompts import QUESTION as QUESTION
    from tokenprune_eval.calibrate_heads.prompts import SUFFIXES as SUFFIXES
    from tokenprune_eval.calibrate_heads.prompts import Prompt as Prompt
    from tokenprune_eval.calibrate_heads.prompts import check_pictures as check_pictures
    from tokenprune_eval.calibrate_heads.prompts import read_prompts as read_prompts

_HOMES = {
    "HeadCoverage": "measure",
    "Prompt": "prompts",
    "QUESTION": "prompts",
    "SUFFIXES": "prompts",
    "ask_about": "measure",
    "calibrate_heads": "measure",
    "check_pictures": "prompts",
    "find_sinks": "measure",
    "measure_heads": "measure",
    "read_prompts": "prompts",
}

__all__, __getattr__, __dir__ = lazy_names("tokenprune_eval.calibrate_heads", _HOMES)
