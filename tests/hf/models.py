"""Tiny models of every family, made from configs with random weights, and prompts for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

tf: Any = transformers  # its config classes are not typed the way they are called

IMAGE, VIDEO, START, END, PAD, EOS, BOS = 90, 91, 92, 93, 0, 1, 2
"""Token ids shared by all tiny models; words are 3 to 89."""

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
_CLIP: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
    "projection_dim": 16,
}
_QWEN_TEXT: dict[str, Any] = {
    **_TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model's class and config, and how its prompts are made.

    Attributes
    ----------
    build
        Makes the model's config.
    architecture
        The model's class.
    image, video
        (number) -> (encoder arguments, placeholders of each); None where not supported.
    uneven
        The norm behind the tower, if what comes out of it would be of one length otherwise.
    convolves
        Whether the tower is one of timm that convolves.
    """

    build: Callable[[], Any]
    architecture: Any
    image: Callable[[int], tuple[dict[str, Tensor], list[int]]] | None = None
    video: Callable[[int], tuple[dict[str, Tensor], list[int]]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    uneven: str = ""
    convolves: bool = False

    def model(self, seed: int = 0) -> Any:
        """Return the model in float32 and eval mode, with weights large enough to matter."""
        torch.manual_seed(seed)
        model = self.architecture(self.build()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.2)
                elif self.uneven and self.uneven in name:
                    parameter.uniform_(0.5, 1.5)
                elif "norm" not in name and "lambda" not in name:
                    parameter.normal_(0.0, 0.1)
                elif "visual.vision_model.post_layernorm.weight" in name:
                    parameter.normal_(1.0, 0.2)  # else all features would be of one length
        if self.convolves:
            enliven(model)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        # Random weights would "say" placeholders, which no processor lets through.
        model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
        return model


def enliven(model: Any) -> None:
    """Give convolutions weights with which what a tower returns depends on the pixels."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4:
                parameter.normal_(0.0, 1.4 * parameter[0].numel() ** -0.5, generator=generator)
            elif parameter.ndim == 1 and "bn" in name and name.endswith("weight"):
                parameter.fill_(1.0)


def pixels(*shape: int, seed: int = 7) -> Tensor:
    """Return reproducible noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )


def _llava_next() -> Any:
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[48, 24], [24, 48], [48, 48]],
        vision_feature_layer=-2,
    )


def _llava_next_video() -> Any:
    return tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[48, 24], [24, 48], [48, 48]],
        vision_feature_layer=-2,
    )


def _onevision() -> Any:
    vision = {**_CLIP}
    vision.pop("projection_dim")
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=tf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[48, 24], [24, 48], [48, 48], [72, 72]],
        vision_aspect_ratio="anyres_max_2",
    )


def _video_llava() -> Any:
    return tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def _internvl() -> Any:
    return tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=[32, 32],
            patch_size=[4, 4],
            attention_bias=True,
            use_mean_pooling=False,
        ),
        text_config=tf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def _qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=_QWEN_TEXT,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen25_vl() -> Any:
    return tf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        text_config=_QWEN_TEXT,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen3_vl(kind: Any = tf.Qwen3VLConfig, **text: Any) -> Any:
    return kind(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**_QWEN_TEXT, "head_dim": 8, **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen3_vl_moe() -> Any:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
    # vLLM reads norm_topk_prob, which published configs have; transformers always does it.
    experts |= {"moe_intermediate_size": 24, "norm_topk_prob": True}
    return _qwen3_vl(tf.Qwen3VLMoeConfig, **experts)


_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Three layers that keep a state, and one that attends; every other number of a head is rotated."""


def _qwen3_5(kind: Any = tf.Qwen3_5Config, **text: Any) -> Any:
    config = _qwen3_vl().to_dict()
    rope = {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    vision = {**config["vision_config"], "model_type": kind.sub_configs["vision_config"].model_type}
    vision.pop("deepstack_visual_indexes")
    vision.pop("rope_parameters", None)
    return kind(
        vision_config=vision,
        text_config={
            **_QWEN_TEXT,
            **_LINEAR,
            "head_dim": 8,
            "rope_parameters": {**_QWEN_TEXT["rope_parameters"], **rope},
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen3_5_moe() -> Any:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    return _qwen3_5(tf.Qwen3_5MoeConfig, **experts)


def _glm4v(kind: Any = tf.Glm4vConfig, **text: Any) -> Any:
    rope = {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    return kind(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "image_size": 32,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={
            **_TEXT,
            "rope_parameters": {**_QWEN_TEXT["rope_parameters"], **rope},
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=94,
        video_end_token_id=95,
    )


def _glm4v_moe() -> Any:
    experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2}
    return _glm4v(tf.Glm4vMoeConfig, moe_intermediate_size=24, **experts)


def _glm46v() -> Any:
    return _glm4v(tf.Glm46VConfig)


def _glm_ocr() -> Any:
    return _glm4v(tf.GlmOcrConfig)


def _glm5_next() -> Any:
    glm4v = _glm4v().to_dict()["vision_config"]
    same = (
        *("depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_heads"),
        *("patch_size", "image_size", "spatial_merge_size", "temporal_patch_size"),
    )
    return tf.Glm5NextConfig(
        vision_config={name: glm4v[name] for name in same} | {"projection_intermediate_size": 40},
        text_config={
            **_TEXT,
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_types": ["full", "full"],
            "mlp_layer_types": ["dense", "sparse"],
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            # fewer than a prompt has
            "index_topk": 16,
            "index_kpool": 4,
            "index_head_dim": 8,
            "index_n_heads": 4,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=94,
        video_end_token_id=95,
    )


def _nemotron_h_omni() -> Any:
    return tf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            "patch_size": 4,
            "max_img_size": 64,
            "video_temporal_patch_size": 2,
        },
        text_config={
            **_TEXT,
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "num_hidden_layers": 3,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 16,
        },
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=40,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=95,
    )


def _paddleocr_vl() -> Any:
    return tf.PaddleOCRVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        text_config={**_QWEN_TEXT, "head_dim": 8},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _kimi_k25() -> Any:
    return tf.Kimi_K25Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 4,
            "pos_emb_height": 6,
            "pos_emb_width": 6,
        },
        text_config={
            **_TEXT,
            "model_type": "deepseek_v3",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def _minicpmv4_6(kind: Any = tf.MiniCPMV4_6Config, **more: Any) -> Any:
    text = {**_TEXT, **_LINEAR, "head_dim": 8, "model_type": "qwen3_5_text"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return kind(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 4,
        },
        text_config={**text, "rope_parameters": {**rope, "mrope_section": [1, 1, 0]}},
        insert_layer_id=1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **more,
    )


def _minicpmv4_7() -> Any:
    marks = {"image_start_id": START, "image_end_id": END, "newline_id": EOS}
    return _minicpmv4_6(tf.MiniCPMV4_7Config, slice_start_id=94, slice_end_id=95, **marks)


def _idefics3() -> Any:
    return tf.Idefics3Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def _smolvlm() -> Any:
    return tf.SmolVLMConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )


_COHERE2: dict[str, Any] = {
    **_TEXT,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _aya_vision() -> Any:
    vision = {**_CLIP, "image_size": 32}
    vision.pop("projection_dim")
    return tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=tf.Cohere2Config(**_COHERE2),
        image_token_id=IMAGE,
        alignment_intermediate_size=40,
    )


def _cohere2_vision() -> Any:
    vision = {**_CLIP, "image_size": 32}
    vision.pop("projection_dim")
    return tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=tf.Cohere2Config(**_COHERE2),
        image_token_id=IMAGE,
        alignment_intermediate_size=40,
    )


def _perception_lm() -> Any:
    return tf.PerceptionLMConfig(
        vision_config={
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 4,
                "img_size": [32, 32],
                "patch_size": 4,
                "use_post_transformer_norm": False,
                "global_pool": "",
                "ref_feat_shape": [8, 8],
            },
        },
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )


def _ovis2() -> Any:
    return tf.Ovis2Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            "vocab_size": 40,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 4,
        },
        text_config=tf.Qwen2Config(**_TEXT),
        hidden_size=32,
        vocab_size=96,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, 94, 95],
    )


def _llama4() -> Any:
    return tf.Llama4Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,  # of a token of 2 x 2 patches
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            "projector_input_dim": 40,
            "projector_output_dim": 40,
            "vision_output_dim": 40,
        },
        text_config={
            **_TEXT,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 512,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _gemma3() -> Any:
    vision = {**_CLIP, "image_size": 32}
    vision.pop("projection_dim")
    return tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=64),
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
    )


def _gemma3n() -> Any:
    return tf.Gemma3nConfig(
        vision_config={
            "architecture": "mobilenetv3_small_050",
            "hidden_size": 288,
            "vocab_size": 4,  # of special tokens, behind those of text
            "vocab_offset": 90,
        },
        audio_config={
            "vocab_size": 2,
            "vocab_offset": 94,
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
        },
        text_config={
            **_TEXT,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 90,
            "altup_num_inputs": 2,
        },
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=95,
    )


def _gemma4() -> Any:
    return tf.Gemma4Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        text_config={
            **_TEXT,
            "head_dim": 8,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "use_bidirectional_attention": "vision",
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=95,
    )


def _molmo2() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    return tf.Molmo2Config(
        vision_config={
            **heads,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "image_size": [32, 32],
            "patch_size": 4,
        },
        adapter_config={
            **heads,
            "hidden_size": 24,
            "intermediate_size": 40,
            "text_hidden_size": 32,
            "vision_feature_layer": [2, 1],
        },
        text_config={
            **_TEXT,
            "head_dim": 8,
            "additional_vocab_size": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        low_res_image_start_token_id=94,
        frame_start_token_id=94,
        frame_end_token_id=95,
    )


def _plain(name: str, size: int, tokens: int) -> Any:
    def make(count: int) -> tuple[dict[str, Tensor], list[int]]:
        return {name: pixels(count, 3, size, size)}, [tokens] * count

    return make


def _crops(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Images of 48 x 36, 24 x 48 and so on: their padding is cut off, with newlines at row ends."""
    sizes = torch.tensor([[48, 36], [24, 48], [40, 48]])[torch.arange(count) % 3]
    # base 36 patches; then the padded map less its padding, and a newline for each row of it
    grids = [(12, 10), (6, 12), (10, 12)]
    tokens = [36 + rows * (columns + 1) for rows, columns in grids]
    return (
        {"pixel_values": pixels(count, 5, 3, 24, 24), "image_sizes": sizes},
        [tokens[index % 3] for index in range(count)],
    )


def _onevision_crops(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Images of 72 x 72, in nine crops that are resampled, and of 24 x 48, which are not."""
    sizes = torch.tensor([[72, 72], [24, 48]])[torch.arange(count) % 2]
    # 18 x 18 patches are more than 2 * 36 * 1.1 ** 2: resampled to 8 x 8
    tokens = [36 + 8 * 9, 36 + 6 * 13]
    return (
        {"pixel_values": pixels(count, 10, 3, 24, 24), "image_sizes": sizes},
        [tokens[index % 2] for index in range(count)],
    )


def _packed(name: str, grid_name: str, grids: list[list[int]]) -> Any:
    def make(count: int) -> tuple[dict[str, Tensor], list[int]]:
        grid = torch.tensor(grids)[torch.arange(count) % len(grids)]
        patches = int(grid.prod(dim=1).sum())
        return (
            {name: pixels(patches, 3 * 2 * 4 * 4), grid_name: grid},
            (grid.prod(dim=1) // 4).tolist(),
        )

    return make


def _lfm2_vl() -> Any:
    return tf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 4,
            "num_patches": 64,
            "vision_use_head": False,
        },
        text_config={
            **_TEXT,
            "model_type": "lfm2",
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_ff_dim": 48,
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_id=IMAGE,
        projector_hidden_size=40,
        downsample_factor=2,
    )


def _spatial(count: int) -> tuple[dict[str, Tensor], list[int]]:
    shapes = torch.tensor([[4, 6], [8, 4], [6, 6]])[torch.arange(count) % 3]
    real = torch.arange(40) < shapes.prod(dim=1, keepdim=True)
    values = pixels(count, 40, 48) * real[..., None]
    return (
        {
            "pixel_values": values,
            "spatial_shapes": shapes,
            "pixel_attention_mask": real.long(),
        },
        (shapes.prod(dim=1) // 4).tolist(),
    )


def _pixtral() -> Any:
    return tf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=4,
    )


def _llava_of_pixtral() -> Any:
    return tf.LlavaConfig(
        vision_config=_pixtral(),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _mistral3() -> Any:
    return tf.Mistral3Config(
        vision_config=_pixtral(),
        text_config=tf.MistralConfig(**_TEXT, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _sized(token: int) -> Any:
    """Images of sides of their own, of so many pixels a token."""

    def make(count: int) -> tuple[dict[str, Tensor], list[int]]:
        sizes = torch.tensor([[24, 32], [16, 24], [32, 16]])[torch.arange(count) % 3]
        values = torch.zeros(count, 3, 32, 32)
        for picture, (height, width) in enumerate(sizes.tolist()):
            values[picture, :, :height, :width] = pixels(3, height, width, seed=picture)
        tokens = (sizes.prod(dim=1) // token).tolist()
        return {"pixel_values": values, "image_sizes": sizes}, tokens

    return make


def _padded_patches(grids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return pictures of rows x columns patches, padded to 112, and each patch's (x, y)."""
    places = torch.full((len(grids), 112, 2), -1)
    for picture, (rows, columns) in enumerate(grids):
        for patch in range(rows * columns):
            places[picture, patch] = torch.tensor([patch % columns, patch // columns])
    values = torch.rand(len(grids), 112, 48, generator=torch.Generator().manual_seed(7))
    return values * (places[..., :1] >= 0), places


def _gemma4_images(count: int) -> tuple[dict[str, Tensor], list[int]]:
    grids = [[[8, 12], [12, 8], [4, 10]][index % 3] for index in range(count)]
    values, places = _padded_patches(grids)
    return (
        {"pixel_values": values, "image_position_ids": places},
        [rows * columns // 4 for rows, columns in grids],
    )


def _gemma4_videos(count: int) -> tuple[dict[str, Tensor], list[int]]:
    frames = [[3, 2][index % 2] for index in range(count)]
    sides = [[[4, 8], [6, 6]][index % 2] for index in range(count)]
    values, places = _padded_patches(
        [side for side, number in zip(sides, frames, strict=True) for _ in range(number)]
    )
    return (
        {
            "pixel_values_videos": values,
            "video_position_ids": places,
            "num_frames_per_video": torch.tensor(frames),
        },
        [
            number * rows * columns // 4
            for number, (rows, columns) in zip(frames, sides, strict=True)
        ],
    )


def _pooled(patches: Tensor, side: int) -> Tensor:
    """Return [tokens, side * side]: the patches of each token of a map, -1 where it ends."""
    padding = [-length % side for length in (patches.shape[1], patches.shape[0])]
    left, top = padding[0] // 2, padding[1] // 2
    edges = left, padding[0] - left, top, padding[1] - top
    whole = torch.nn.functional.pad(patches, edges, value=-1)
    return whole.unfold(0, side, side).unfold(1, side, side).reshape(-1, side**2)


def _molmo2_images(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Images of a whole and two crops of 8 x 8 patches, of which an edge of two is in both."""
    whole, one, two = torch.arange(192).view(3, 8, 8)
    maps = torch.cat([one[:, :7], two[:, 1:]], dim=1), torch.cat([one[:7], two[1:]])
    pooling, grids = [], []
    for number in range(count):
        of_image = torch.cat([_pooled(whole, 2), _pooled(maps[number % 2], 2)])
        pooling.append(of_image + 192 * number)
        grids.append([4, 4, *((4, 7), (7, 4))[number % 2]])
    arguments = {
        "pixel_values": pixels(3 * count, 64, 48),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
    }
    return arguments, [44] * count


def _molmo2_videos(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Videos of three frames or two, of which 3 x 3 patches or what is left make a token."""
    frames = [[3, 2][number % 2] for number in range(count)]
    pooled = _pooled(torch.arange(64).view(8, 8), 3)
    arguments = {
        "pixel_values_videos": pixels(sum(frames), 64, 48),
        "video_token_pooling": torch.cat(
            [torch.where(pooled < 0, -1, pooled + 64 * frame) for frame in range(sum(frames))]
        ),
        "video_grids": torch.tensor([[number, 3, 3] for number in frames]),
    }
    return arguments, [9 * number for number in frames]


def _tiles(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Images that are all cut into two tiles, and have a whole one in front."""
    return {"pixel_values": pixels(count, 3, 3, 32, 32)}, [3 * 16] * count


def _frames(size: int, frames: int, tokens: int) -> Any:
    def make(count: int) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values_videos": pixels(count, frames, 3, size, size)}, [tokens] * count

    return make


def _idefics_tiles(count: int) -> tuple[dict[str, Tensor], list[int]]:
    return {"pixel_values": pixels(1, count, 3, 32, 32)}, [16] * count


VIDEO_LLAVA_IMAGES = "pixel_values"
if "pixel_values" not in inspect.signature(tf.VideoLlavaModel.get_image_features).parameters:
    VIDEO_LLAVA_IMAGES = "pixel_values_images"  # its name until transformers 5.20

_QWEN_IMAGE = _packed("pixel_values", "image_grid_thw", [[1, 8, 12], [1, 12, 8]])
_QWEN_VIDEO = _packed("pixel_values_videos", "video_grid_thw", [[3, 8, 8], [2, 4, 8]])


def _patches(count: int) -> tuple[dict[str, Tensor], list[int]]:
    arguments, tokens = _QWEN_IMAGE(count)
    patches = len(arguments["pixel_values"])
    return {**arguments, "pixel_values": pixels(patches, 3, 4, 4)}, tokens


def _chunks(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Chunks of a video, of which Kimi-K2.5 takes the mean over frames."""
    arguments, _ = _QWEN_VIDEO(count)
    patches, grid = len(arguments["pixel_values_videos"]), arguments["video_grid_thw"]
    arguments["pixel_values_videos"] = pixels(patches, 3, 4, 4)
    return arguments, (grid[:, 1:].prod(dim=1) // 4).tolist()


def _grid_hw(count: int) -> tuple[dict[str, Tensor], list[int]]:
    arguments, tokens = _QWEN_IMAGE(count)
    grid = arguments["image_grid_thw"][:, 1:]
    return {"pixel_values": pixels(int(grid.prod(dim=1).sum()), 48), "image_grid_hw": grid}, tokens


def _tubelets(count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Videos of six frames of 8 x 12 patches, two of which make one picture of Nemotron VL."""
    return {"pixel_values_videos": pixels(count, 3, 6, 32, 48)}, [3 * 24] * count


# Until then it cannot encode chunks of several frames.
_KIMI_VIDEO = _chunks if Version(transformers.__version__) >= Version("5.24") else None
# Until then it takes one video at a time.
_NEMOTRON_VIDEO = _tubelets if Version(transformers.__version__) >= Version("5.24") else None


def _navit(pixel_name: str, sizes_name: str) -> Any:
    """Pictures of 16 x 24 patches and so on, in one row of patches; 16 patches make a token."""

    def make(count: int) -> tuple[dict[str, Tensor], list[int]]:
        sizes = torch.tensor([[16, 24], [24, 16], [8, 16]])[torch.arange(count) % 3]
        patches = int(sizes.prod(dim=1).sum())
        arguments = {pixel_name: pixels(1, 3, 4, 4 * patches), sizes_name: sizes}
        return arguments, (sizes.prod(dim=1) // 16).tolist()

    return make


TINY: dict[str, Tiny] = {
    "llava": Tiny(_llava, tf.LlavaForConditionalGeneration, _plain("pixel_values", 24, 36)),
    "llava_next": Tiny(_llava_next, tf.LlavaNextForConditionalGeneration, _crops),
    "llava_next_video": Tiny(
        _llava_next_video,
        tf.LlavaNextVideoForConditionalGeneration,
        _crops,
        _frames(24, 4, 4 * 9),
    ),
    "llava_onevision": Tiny(
        _onevision,
        tf.LlavaOnevisionForConditionalGeneration,
        _onevision_crops,
        _frames(24, 4, 4 * 9 + 1),
    ),
    "video_llava": Tiny(
        _video_llava,
        tf.VideoLlavaForConditionalGeneration,
        _plain(VIDEO_LLAVA_IMAGES, 24, 36),
        _frames(24, 4, 4 * 37),
    ),
    "internvl": Tiny(
        _internvl, tf.InternVLForConditionalGeneration, _plain("pixel_values", 32, 16)
    ),
    "qwen2_vl": Tiny(_qwen2_vl, tf.Qwen2VLForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "qwen2_5_vl": Tiny(_qwen25_vl, tf.Qwen2_5_VLForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "qwen3_vl": Tiny(_qwen3_vl, tf.Qwen3VLForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "qwen3_vl_moe": Tiny(
        _qwen3_vl_moe, tf.Qwen3VLMoeForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO
    ),
    "qwen3_5": Tiny(_qwen3_5, tf.Qwen3_5ForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "qwen3_5_moe": Tiny(
        _qwen3_5_moe, tf.Qwen3_5MoeForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO
    ),
    "glm4v": Tiny(_glm4v, tf.Glm4vForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "glm4v_moe": Tiny(_glm4v_moe, tf.Glm4vMoeForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "glm46v": Tiny(_glm46v, tf.Glm46VForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "glm_ocr": Tiny(_glm_ocr, tf.GlmOcrForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "glm5_next": Tiny(_glm5_next, tf.Glm5NextForConditionalGeneration, _QWEN_IMAGE, _QWEN_VIDEO),
    "nemotron_h_omni": Tiny(
        _nemotron_h_omni, tf.NemotronH_Omni_Reasoning_V3, _grid_hw, _NEMOTRON_VIDEO
    ),
    "paddleocr_vl": Tiny(_paddleocr_vl, tf.PaddleOCRVLForConditionalGeneration, _patches),
    "kimi_k25": Tiny(
        _kimi_k25,
        tf.Kimi_K25ForConditionalGeneration,
        _patches,
        _KIMI_VIDEO,
        uneven="final_layernorm",
    ),
    "minicpmv4_6": Tiny(
        _minicpmv4_6,
        tf.MiniCPMV4_6ForConditionalGeneration,
        _navit("pixel_values", "target_sizes"),
        _navit("pixel_values_videos", "target_sizes_videos"),
        uneven="post_layernorm",
    ),
    "minicpmv4_7": Tiny(
        _minicpmv4_7,
        tf.MiniCPMV4_7ForConditionalGeneration,
        _navit("pixel_values", "target_sizes"),
        _navit("pixel_values_videos", "target_sizes_videos"),
        uneven="post_layernorm",
    ),
    "idefics3": Tiny(
        _idefics3, tf.Idefics3ForConditionalGeneration, _idefics_tiles, uneven="post_layernorm"
    ),
    "smolvlm": Tiny(
        _smolvlm, tf.SmolVLMForConditionalGeneration, _idefics_tiles, uneven="post_layernorm"
    ),
    "aya_vision": Tiny(
        _aya_vision, tf.AyaVisionForConditionalGeneration, _plain("pixel_values", 32, 16)
    ),
    "cohere2_vision": Tiny(
        _cohere2_vision,
        tf.Cohere2VisionForConditionalGeneration,
        _plain("pixel_values", 32, 16),
        uneven="post_layernorm",
    ),
    "perception_lm": Tiny(
        _perception_lm, tf.PerceptionLMForConditionalGeneration, _tiles, _frames(32, 4, 4 * 16)
    ),
    "ovis2": Tiny(
        _ovis2, tf.Ovis2ForConditionalGeneration, _plain("pixel_values", 32, 16), uneven="rms_norm"
    ),
    "llama4": Tiny(_llama4, tf.Llama4ForConditionalGeneration, _plain("pixel_values", 32, 16)),
    "gemma3": Tiny(_gemma3, tf.Gemma3ForConditionalGeneration, _plain("pixel_values", 32, 16)),
    "gemma3n": Tiny(
        _gemma3n,
        tf.Gemma3nForConditionalGeneration,
        _plain("pixel_values", 128, 16),
        convolves=True,
    ),
    "lfm2_vl": Tiny(_lfm2_vl, tf.Lfm2VlForConditionalGeneration, _spatial),
    "mistral3": Tiny(_mistral3, tf.Mistral3ForConditionalGeneration, _sized(64)),
    "pixtral": Tiny(_llava_of_pixtral, tf.LlavaForConditionalGeneration, _sized(16)),
    "gemma4": Tiny(_gemma4, tf.Gemma4ForConditionalGeneration, _gemma4_images, _gemma4_videos),
}
if hasattr(tf, "Molmo2Config"):
    TINY["molmo2"] = Tiny(
        _molmo2, tf.Molmo2ForConditionalGeneration, _molmo2_images, _molmo2_videos
    )
"""Every supported `model_type` and its tiny model; "pixtral" is LLaVA with that tower."""

if transformers.__version__ == "5.24.0":  # where its forward fails itself, pruned or not
    del TINY["llama4"]


SLIDING: tuple[str, ...] = ("gemma3", "gemma3n", "gemma4", "aya_vision", "cohere2_vision", "llama4")
"""Those whose language model has layers that see a window, or a chunk, of tokens only."""

UNATTENDING = ("gemma3n",)
"""Those whose tower ends in convolutions, so that nothing can look at its attention."""

APART = tuple(name for name in TINY if name.startswith(("glm4", "glm_", "molmo2", "nemo")))
"""Those that take no call with both images and videos."""

STATEFUL = (
    *("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "lfm2_vl", "glm5_next"),
    "nemotron_h_omni",
)
"""Those some of whose layers keep a state in place of keys."""


def mixing(name: str, samples: list[str]) -> list[str]:
    """Return samples of images and videos; of videos alone where no call takes both."""
    return [sample.replace("i", "v") for sample in samples] if name in APART else samples


def checkpoint_gradients(model: Any) -> None:
    """Turn gradient checkpointing on, by the name that transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


def prompt(tiny: Tiny, samples: list[str], words: int = 3) -> dict[str, Any]:
    """Return what a processor would return for a batch of prompts.

    Parameters
    ----------
    tiny
        The model's maker.
    samples
        One string per prompt: ``i`` an image, ``v`` a video, ``t`` a few words.
    words
        How many words each ``t`` stands for.

    Returns
    -------
    dict
        input_ids and attention_mask [B, L], padded on the left, mm_token_type_ids where the
        model reads them, and the encoder's arguments.
    """
    counts = {kind: sum(sample.count(kind) for sample in samples) for kind in "iv"}
    inputs: dict[str, Any] = {}
    sizes: dict[str, list[int]] = {"i": [], "v": []}
    for kind, make in (("i", tiny.image), ("v", tiny.video)):
        if counts[kind]:
            if make is None:
                raise ValueError(f"this model takes no {kind}")
            arguments, sizes[kind] = make(counts[kind])
            inputs.update(arguments)
    generator = torch.Generator().manual_seed(sum(map(len, samples)))
    rows = []
    for sample in samples:
        row: list[int] = [BOS]
        for kind in sample:
            if kind == "t":
                row += torch.randint(3, 90, (words,), generator=generator).tolist()
            elif kind == "i":
                row += [START, *[IMAGE] * sizes["i"].pop(0), END]
            else:
                marks = (94, 95) if tiny.architecture.__name__.startswith("Glm5") else (START, END)
                row += [marks[0], *_video_row(tiny, sizes["v"].pop(0), inputs), marks[1]]
        rows.append(row)
    length = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    inputs["attention_mask"] = torch.tensor(
        [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    )
    kinds = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
    if tiny.architecture.__name__.startswith(("Qwen", "Glm", "Paddle", "Gemma4", "MiniCPMV4_7")):
        inputs["mm_token_type_ids"] = kinds
    if tiny.architecture.__name__.startswith("Molmo2"):  # marks are what they stand around
        inputs["mm_token_type_ids"] = torch.isin(
            inputs["input_ids"], torch.tensor([IMAGE, VIDEO, START, END])
        ).long()
    if tiny.architecture.__name__.startswith(("Glm", "Molmo2", "Nemotron")):
        # frames look like images in the prompt
        inputs["input_ids"] = inputs["input_ids"].masked_fill(kinds == 2, IMAGE)
    if "Gemma3F" in tiny.architecture.__name__:
        inputs["token_type_ids"] = (kinds == 1).long()
    return inputs


def _video_row(tiny: Tiny, size: int, inputs: dict[str, Any]) -> list[int]:
    name = tiny.architecture.__name__
    row: list[int]
    if "num_frames_per_video" in inputs:  # Gemma 4 writes the time, and marks around each frame
        frames = next(number for number, total in ((3, 24), (2, 18)) if total == size)
        row = []
        for frame in range(frames):
            row += [10 + frame, START, *[VIDEO] * (size // frames), END]
        return row
    if "video_grids" in inputs:  # Molmo 2 does so, too
        row = []
        for frame in range(size // 9):
            row += [10 + frame, START, *[VIDEO] * 9, END]
        return row
    if name.startswith("Nemotron"):
        return [11, *[VIDEO] * 24, END, 12, START, *[VIDEO] * 24, END, 13, START, *[VIDEO] * 24]
    if not name.startswith(("Qwen3", "Glm")):
        return [VIDEO] * size
    # Qwen3-VL writes the time in front of each frame, GLM-4V behind it.
    grid = [
        row for row in inputs["video_grid_thw"].tolist() if row[0] * row[1] * row[2] == 4 * size
    ]
    frames = grid[0][0]
    row = []
    for frame in range(frames):
        own = [VIDEO] * (size // frames)
        row += [START, *own, END, 10 + frame] if name.startswith("Glm") else [10 + frame, *own]
    return row
