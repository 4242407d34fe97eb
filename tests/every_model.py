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
    "aya_vision": "cohere2_vision",
    "pixtral": "mistral3",
    "glm5_next": "glm4v",
    "minicpmv4_7": "minicpmv4_6",
}
"""Name of a tiny model (`tests.hf.models.TINY`, `tests.vllm.checkpoints.FAMILIES`) -> the other."""

ALIKE_IN_VLLM: dict[str, str] = {
    "internvl_chat": "internvl",
    "idefics3": "internvl",
    "qwen2_vl": "qwen2_5_vl",
    "paddleocr_vl": "glm4v",
    "lfm2_vl": "qwen3_5",
    "minicpmv4_6": "qwen3_5",
    "kimi_k25": "qwen2_5_vl",
    "kimi_vl": "qwen2_5_vl",
    "cohere2_vision": "internvl",
    "llava_next_video": "llava_next",
    "llama4": "internvl",
    "gemma3n": "gemma4",
    "molmo2": "gemma3",
}
"""Likewise in tests/vllm/test_families.py, where each costs a start of the engine."""

ONE_OF_EACH_KIND = {
    # containers of rows
    "llava": "a list",
    "internvl": "a tensor of tiles",
    "granite_docling": "an entry for each prompt, with deepstack features, in padded batches",
    "granite4_vision": "deepstack features alone",
    "inkling_mm_model": "an entry for each row; relative positions, convolutions",
    "fuyu": "the last hidden state; positions of its own",
    "llama4": "the last hidden state, projected later; chunks",
    "molmo2": "rows added to embeddings; images seen both ways",
    "fast_vlm": "an output that cannot be made of rows alone",
    # rows that are structure
    "llava_next_video": "newlines",
    "unlimited_ocr": "newlines in and behind crops, a separator",
    "emu3": "codes of an image, and of the ends of its lines",
    # what encoders are told besides
    "mistral3": "sizes of images",
    "lfm2_vl": "shapes and a mask; convolutions",
    "gemma4": "places of patches; windows, images seen both ways, embeddings of each layer",
    "minicpmv4_7": "target sizes; three axes",
    # positions and attention
    "paligemma": "from 1; a prefix seen both ways",
    "qwen3_5": "three axes; linear attention",
    "ernie4_5_vl_moe": "three axes; experts of text and of images",
    "hunyuan_vl": "four axes; begin, newlines and end",
    "exaone4_5": "left out of the steps of generate; windows",
    "qwen3_omni_moe_thinker": "by marks in the prompt; deepstack features",
    "minimax_m3_vl": "compact alone; blocks of columns",
    "kimi_k25": "latent attention",
    "nemotron_h_omni": "without effect; Mamba",
    # refused
    "blip": "no rows are taken",
    "blip-2": "a generate of its own",
    "udop": "an encoder for text",
    "mistral4": "text alone",
    "pi0": "no generate",
    "qwen2_5_omni": "several models",
}
"""Types of `tests.hf.type_table` that `scripts/test` runs -> what is particular to them."""
