"""Which tiny models are pruned like another one, for layout, positions and attention.

`scripts/test` runs the other one; `scripts/test-models` runs all.
"""

from __future__ import annotations

ALIKE: dict[str, str] = {
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5_moe": "qwen3_5",
    "glm4v_moe": "glm4v",
    "glm46v": "glm4v",
    "glm_ocr": "glm4v",
    "smolvlm": "idefics3",
}
"""Name of a tiny model (`tests.hf.models.TINY`, `tests.vllm.checkpoints.FAMILIES`) -> the other."""
