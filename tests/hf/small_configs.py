"""The default config of a type of transformers, made small field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.hf.models import BOS, END, EOS, IMAGE, PAD, START, VIDEO

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    # towers
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projection_dim": 32,
    "projector_hidden_size": 32,
    "projection_hidden_size": 32,
    "projection_intermediate_size": 32,
    "num_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention, indexers, linear attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Fields of configs, by name, and the value that makes them tiny."""

COUNTED = {
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "per_layer_config",
    "indexer_types",
    "kv_source_layers",
    "layer_rope_theta",
    "moe_layers",
    "rope_scaling_layers",
    "number_of_conv_states",
    "use_mamba_kernels",
}
"""Fields that say something of each layer, which a config works out anew from their number."""

NOT_TO_SAY = list(range(IMAGE, SMALL["vocab_size"]))
"""Token ids that mean something, which random weights would say."""


def small_config(kind: str, over: dict[str, Any]) -> Any:
    """Return the default config of a type with small numbers in it, and `over`, nested, on top."""
    ids = iter(range(END + 1, SMALL["vocab_size"]))
    default = CONFIG_MAPPING[kind]()
    return type(default)(**_small(default.to_dict(), over, ids))


def _small(fields: dict[str, Any], over: dict[str, Any], ids: Iterator[int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("_config") and "model_type" in (over.get(name) or {}):
            value = CONFIG_MAPPING[over[name]["model_type"]]().to_dict()
        if isinstance(value, dict) and "model_type" in value:
            own = over.get(name, {})
            result[name] = _small(value, own, ids) if isinstance(own, dict) else own
        elif name in over or name in COUNTED or name.startswith("_"):
            continue
        elif value is not None and name in SMALL:
            # Some configs have height and width.
            result[name] = [SMALL[name]] * 2 if isinstance(value, list | tuple) else SMALL[name]
        elif isinstance(value, int) and name in PLACEHOLDERS:
            result[name] = PLACEHOLDERS[name]
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            result[name] = next(ids)
        else:
            result[name] = value
    return result | {name: value for name, value in over.items() if name not in result}


PLACEHOLDERS = {
    **dict.fromkeys(("image_token_id", "image_token_index", "image_patch_id"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
