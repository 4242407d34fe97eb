"""What is particular to each type of transformers that is handed its encoder's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.hf.media import (
    FUYU_PATCHES,
    Media,
    crops,
    grids,
    high_resolution,
    local_crops,
    merge_sizes,
    of_codes,
    of_crops,
    of_grid,
    of_local_crops,
    of_pooled_crops,
    patches,
    per_prompt,
    per_prompt_masked,
    placed,
    pooled,
    separator,
    shaped,
    sized,
    square,
    targets,
    with_marks,
)
from tests.hf.models import END, EOS, IMAGE, START, VIDEO, VIDEO_LLAVA_IMAGES
from tokenprune.config import Positions


@dataclass(frozen=True)
class Type:
    """What is particular to a type.

    Attributes
    ----------
    media
        What its encoder is given of images; an image is its number, whatever the batch.
    over
        Fields of its config.
    types
        Names of its arguments that say of each token whether it is an image's.
    prefix
        Whether they say instead which tokens come after the prompt, which is seen both ways.
    around
        Tokens in front of an image and behind it.
    structure
        Which rows of an image's, by its number, are the same whatever its pixels.
    hides
        Whether a token that is dropped is the same to the others as one that the mask hides.
    positions
        ``"compact"`` where the model cannot read tokens at those of the unpruned prompt.
    projector
        The module that makes of rows what the decoder reads, where the forward calls it.
    batched
        Whether the plain model reads the prompts of a batch as it reads each by itself.
    """

    media: Media
    over: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ()
    prefix: bool = False
    around: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]
    structure: Callable[[int], list[int]] = lambda number: []
    hides: bool = True
    positions: Positions = "original"
    projector: str | None = None
    batched: bool = True


SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
WHOLE = {**SECTIONS, "partial_rotary_factor": 1.0}
MROPE = {"text_config": {"rope_parameters": SECTIONS}}
LAST_SEES_ALL = {"vision_config": {"fullatt_block_indexes": [1]}}
"""A tower of two layers, the last of which sees more than windows, as in the real models."""
MM = ("mm_token_type_ids",)
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "rope_parameters": WHOLE}
"""One layer with a state over all tokens, and one that attends."""
WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}


HEADS_OF_KEYS = {"num_key_value_heads": 4, "qk_rope_head_dim": 4}
"""Latent attention has as many of them as of queries."""
TWO_FRAMES = 2 * 3 * 4 * 4
"""Numbers of a patch over two frames of 4 x 4 pixels."""
SAM = {
    "output_channels": 16,
    "window_size": 4,
    "num_attention_heads": 2,
    "global_attn_indexes": [1],
    "downsample_channels": [16, 32],
    "mlp_dim": 48,
    "image_size": 64,
}
GEMMA4 = {**WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
GEMMA4 |= {"use_bidirectional_attention": "vision"}
GEMMA4_TOWER = {"pooling_kernel_size": 2, "position_embedding_size": 64, "mm_posemb_size": 16}
GEMMA4_TOWER |= {"mm_embed_dim": 32, "output_proj_dims": 32}
MINICPM = {
    "text_config": LINEAR,
    "vision_config": {"insert_layer_id": 0, "image_size": 64},
    "insert_layer_id": 0,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
INKLING = {
    "unpadded_vocab_size": 128,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 16,
}
OMNI = {
    **MROPE,
    "vision_config": {"deepstack_visual_indexes": [0, 1]},
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "output_dim": 32,
        "downsample_hidden_size": 16,
    },
}
CODES = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "embed_dim": 32,
    "latent_channels": 32,
    "attn_resolutions": [],
}
VISUAL = {"<image>": IMAGE, "<|extra_200|>": 94}
"""Names of tokens: the placeholder, the end of a line, and each code of an image for two types."""
VISUAL |= {f"<|visual token {code:06}|>": 100 + code for code in range(16)}
VISUAL |= {
    f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z": 100 + code
    for code in range(16)
}
PINPOINTS = {
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
    "vision_config": {"patch_size": 8},
}


TYPES: dict[str, Type] = {
    # packed patches of any size, with their grids
    "qwen2_vl": Type(grids(), MROPE, MM),
    "qwen2_5_vl": Type(grids(), {**MROPE, **LAST_SEES_ALL}, MM),
    "qwen3_vl": Type(grids(), {**MROPE, "vision_config": {"deepstack_visual_indexes": [0, 1]}}, MM),
    "qwen3_vl_moe": Type(
        grids(), {**MROPE, "vision_config": {"deepstack_visual_indexes": [0, 1]}}, MM
    ),
    "qwen3_5": Type(grids(), {"text_config": LINEAR}, MM, hides=False),
    "qwen3_5_moe": Type(grids(), {"text_config": LINEAR}, MM, hides=False),
    "glm4v": Type(grids(), {"text_config": {"rope_parameters": WHOLE}}, MM),
    "glm46v": Type(grids(), {"text_config": {"rope_parameters": WHOLE}}, MM),
    "glmga": Type(grids(), {"text_config": {"rope_parameters": WHOLE}}, MM),
    "glm4v_moe": Type(grids(), {"text_config": {"rope_parameters": WHOLE}}, MM),
    "glm_ocr": Type(grids(), {"text_config": {"rope_parameters": WHOLE}}, MM),
    "paddleocr_vl": Type(grids(3, 4, 4), MROPE, MM),
    "ernie4_5_vl_moe": Type(
        grids(),
        {
            "text_config": {
                "rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 8],
                "mlp_layer_types": ["dense", "sparse"],
            }
        },
        (*MM, "moe_mm_token_type_ids"),
    ),
    "exaone4_5": Type(grids(), LAST_SEES_ALL, hides=False),
    "hyperclovax_vision_v2": Type(grids(), LAST_SEES_ALL),
    "video_llama_3": Type(merge_sizes),
    "kimi_k25": Type(
        grids(3, 4, 4),
        {
            "text_config": HEADS_OF_KEYS | {"head_dim": 4},
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
            "projection_hidden_size": 32,
        },
    ),
    "muse_glimmer": Type(
        grids(TWO_FRAMES), {"text_config": WINDOW, "out_hidden_size": 128}, hides=False
    ),
    "cosmos3_omni": Type(
        grids(), {**MROPE, "vision_config": {"deepstack_visual_indexes": [0, 1]}}, MM
    ),
    "lfm3_vl": Type(
        grids(),
        {
            "text_config": {"layer_types": ["conv", "full_attention"]},
            "vision_config": {"layer_types": ["conv", "full_attention"]},
        },
        hides=False,
    ),
    # images of one size
    "llava": Type(square()),
    "vipllava": Type(square(), {"vision_feature_layers": [-1, -2]}),
    "deepseek_vl": Type(square()),
    "internvl": Type(square(), {"vision_config": {"image_size": [32, 32], "patch_size": [4, 4]}}),
    "qianfan_ocr": Type(
        square(), {"vision_config": {"image_size": [32, 32], "patch_size": [4, 4]}}
    ),
    "aya_vision": Type(square(), {"text_config": WINDOW}, hides=False),
    "cohere2_vision": Type(square(), {"text_config": WINDOW}, hides=False),
    "paligemma": Type(square(), types=("token_type_ids",), prefix=True),
    "gemma3": Type(
        square(),
        {"text_config": WINDOW, "mm_tokens_per_image": 16},
        ("token_type_ids",),
        hides=False,
    ),
    "fast_vlm": Type(
        square(256),
        {
            "vision_config": {
                "architecture": "fastvit_mci3",
                "hidden_size": 128,
                "model_args": {
                    "inference_mode": True,
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [32, 32, 32, 32, 64],
                },
            }
        },
    ),
    "gemma3n": Type(
        square(128),
        {
            "text_config": {
                **WINDOW,
                "intermediate_size": 48,
                "num_kv_shared_layers": 0,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.0, 0.0],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 112,
                "altup_num_inputs": 2,
            },
            "vision_config": {
                "architecture": "mobilenetv3_small_050",
                "vocab_size": 8,
                "vocab_offset": 112,
                "hidden_size": 288,
            },
            "audio_config": {"vocab_size": 8, "vocab_offset": 120},
            "vision_soft_tokens_per_image": 16,
        },
        hides=False,
    ),
    "video_llava": Type(square(name=VIDEO_LLAVA_IMAGES)),
    "deepseek_vl_hybrid": Type(
        high_resolution, {"high_res_vision_config": {**SAM, "image_size": 64}}
    ),
    "janus": Type(
        square(),
        {
            "vision_config": {"num_image_tokens": 64},
            "vq_config": {
                **CODES,
                "embed_dim": 8,
                "num_embeddings": 16,
                "image_token_embed_dim": 32,
            },
        },
    ),
    "got_ocr2": Type(square()),
    "pp_chart2table": Type(square()),
    "perception_lm": Type(
        square(32, 1),
        {
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": 32,
                    "depth": 2,
                    "num_heads": 4,
                    "img_size": [32, 32],
                    "patch_size": 8,
                    "use_post_transformer_norm": False,
                    "global_pool": "",
                    "ref_feat_shape": [4, 4],
                },
            },
            "projector_pooling_ratio": 2,
        },
    ),
    "ovis2": Type(
        square(),
        {"visual_indicator_token_ids": [START, END, 40, 41, 42]},
        around=([START], [END]),
    ),
    "llama4": Type(
        square(),
        {
            "text_config": {
                "attention_chunk_size": 16,
                "intermediate_size_mlp": 48,
                "no_rope_layers": [1, 0],
                "num_experts_per_tok": 1,
            },
            "vision_config": {
                "patch_size": 8,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
            },
        },
        hides=False,
        projector="multi_modal_projector",
    ),
    "aria": Type(
        square(),
        {"projector_patch_to_query_dict": {64: 8}, "max_value_projector_patch_to_query_dict": 8},
    ),
    "inkling_mm_model": Type(
        patches(2, 4, 4, 3, flat_too=True),
        {
            "text_config": INKLING | {"logits_mup_width_multiplier": 1.0},
            "vision_config": {"n_layers": 2},
            "audio_config": {"mel_vocab_size": 8, "n_mel_bins": 4},
        },
        hides=False,
    ),
    "shieldgemma2": Type(
        square(),
        {"text_config": WINDOW, "mm_tokens_per_image": 16},
        ("token_type_ids",),
        hides=False,
    ),
    # crops, with rows that are structure
    "llava_next": Type(crops, PINPOINTS, structure=of_crops),
    "llava_next_video": Type(crops, PINPOINTS, structure=of_crops),
    "llava_onevision": Type(crops, PINPOINTS, structure=of_crops),
    "granite4_vision": Type(
        crops,
        {
            "image_grid_pinpoints": PINPOINTS["image_grid_pinpoints"],
            "text_config": {"model_type": "granite4_vision_text"},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "patch_size": 8,
                "hidden_size": 64,
            },
            "vision_feature_select_strategy": "full",
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "spatial_target_layers": [1],
            "downsample_rate": "2/4",
            "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
        },
        structure=of_pooled_crops,
    ),
    "deepseek_ocr2": Type(
        local_crops(64),
        {
            "vision_config": {"sam_config": SAM, "encoder_config": {"num_key_value_heads": 4}},
            "text_config": {
                "num_key_value_heads": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
            },
        },
        structure=separator,
    ),
    "unlimited_ocr": Type(
        local_crops(64, grid=True),
        {
            "vision_config": {"sam_config": SAM, "encoder_config": {"patch_size": 8}},
            "text_config": {"num_key_value_heads": 4},
        },
        structure=of_local_crops,
    ),
    "step3p7": Type(
        local_crops(32),
        {
            "text_config": {
                **WINDOW,
                "sliding_window": 16,
                "mlp_layer_types": ["dense", "sparse"],
                "share_expert_dim": 16,
            },
            "vision_config": {"image_size": 64, "mlp_ratio": 2.0, "max_position_embeddings": 256},
        },
        hides=False,
    ),
    # images of several sizes otherwise
    "mistral3": Type(sized),
    "mistral_large4": Type(
        sized,
        {"text_config": HEADS_OF_KEYS},
        hides=False,
        batched=False,  # its indexer scores many columns 0, and padding moves which it takes
    ),
    "lighton_ocr": Type(sized),
    "lfm2_vl": Type(
        shaped, {"text_config": {"layer_types": ["conv", "full_attention"]}}, hides=False
    ),
    "gemma4": Type(
        placed(1),
        {"text_config": GEMMA4, "vision_config": {"model_type": "gemma4_vision", **GEMMA4_TOWER}},
        MM,
        hides=False,
    ),
    "gemma4_unified": Type(
        placed(2),
        {
            "text_config": GEMMA4,
            "vision_config": {"model_type": "gemma4_unified_vision", **GEMMA4_TOWER},
        },
        MM,
        hides=False,
    ),
    "minicpmv4_6": Type(targets, MINICPM, hides=False),
    "minicpm_ocr": Type(targets, MINICPM, hides=False),
    "minicpmv4_7": Type(
        targets,
        {
            **MINICPM,
            "image_start_id": START,
            "image_end_id": END,
            "slice_start_id": 94,
            "slice_end_id": 95,
            "newline_id": 96,
        },
        MM,
        around=([START], [END]),
        hides=False,
    ),
    "molmo2": Type(
        pooled,
        {
            "vision_config": {
                "patch_size": 8,
                "num_key_value_heads": 4,
                "num_position_embeddings": 16,
            },
            "adapter_config": {"vision_feature_layer": [0, 1], "num_key_value_heads": 4},
        },
        MM,
        around=([START], [END]),
    ),
    # an entry of all images of a prompt
    "idefics2": Type(per_prompt, hides=False),
    "idefics3": Type(per_prompt, {"scale_factor": 2}),
    "smolvlm": Type(per_prompt, {"scale_factor": 2}),
    "granite_docling": Type(
        per_prompt_masked,
        {
            "vision_config": {
                "scale_factor": 2,
                "deepstack_visual_indexes": [0],
                "out_hidden_size": 32,
            }
        },
    ),
    # more packed patches
    "qwen4_exp": Type(
        grids(),
        {
            "text_config": {
                **LINEAR,
                "hc_lowrank": 8,
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 64,
                "split_ngram_parts": 4,
                "make_ngram_vocab_size_divisible_by": 8,
                "indexer_n_heads": 4,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
                "ple_layer_ids": [1],
                "ple_embed_dim": 32,
                "eos_token_id": EOS,
            }
        },
        MM,
        hides=False,
    ),
    "cohere_compass": Type(
        grids(),
        {
            "text_config": {
                "rope_parameters": {"full_attention": SECTIONS, "sliding_attention": SECTIONS}
            },
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
        },
        MM,
    ),
    "cosmos3_edge": Type(grids(), MROPE, MM),
    "dots3_note": Type(
        grids(),
        {
            "text_config": {"num_key_value_heads": 4, "shared_experts_intermediate_size": 16},
            "vision_config": {
                "adapter_in_dim": 32,
                "adapter_out_dim": 32,
                "mlp_layer_types": ["dense", "dense"],
            },
            "audio_config": {
                "num_key_value_heads": 4,
                "adapter_input_size": 32,
                "adapter_out_dim": 32,
                "downsample_hidden_size": 16,
            },
        },
        hides=False,
    ),
    "glm5_next": Type(
        grids(),
        {
            "text_config": {
                "layer_types": ["linear_attention", "indexed_attention"],
                "indexer_types": ["full", "full"],
                "mlp_layer_types": ["dense", "sparse"],
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "index_kpool": 4,
                "num_key_value_heads": 4,
            }
        },
        MM,
        hides=False,
    ),
    "hunyuan_vl": Type(
        grids(),
        {
            "text_config": {
                "head_dim": 8,
                "rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 1, 1]},
            },
            "im_start_id": START,
            "im_end_id": END,
            "im_newline_id": 94,
        },
        MM,
        structure=with_marks,
    ),
    "hy_v4_vl": Type(
        grids(),
        {
            "text_config": {
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 8,
                "rope_parameters": SECTIONS,
            }
        },
        MM,
        structure=of_grid,
    ),
    "inkling2": Type(
        grids(8, 8, 3, merged=True),
        {"text_config": INKLING, "vision_config": {"projection_hidden_dim": 32}},
        hides=False,
    ),
    "inkling2_loop": Type(
        grids(8, 8, 3, merged=True),
        {"text_config": INKLING, "vision_config": {"projection_hidden_dim": 32}},
        hides=False,
    ),
    "minimax_m3_vl": Type(
        grids(),
        {
            "merged_hidden_size": 128,
            "text_config": {
                "dense_intermediate_size": 48,
                "shared_intermediate_size": 16,
                "rotary_dim": 8,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse"],
                "index_block_size": 8,
                "index_topk_blocks": 2,
                "index_n_heads": 2,
            },
        },
        hides=False,
        positions="compact",
        batched=False,
    ),
    "muse_spark": Type(
        grids(TWO_FRAMES),
        {
            "text_config": {**WINDOW, "moe_hidden_size": 16},
            "audio_config": {
                "num_hidden_layers": 4,
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
            },
            "out_hidden_size": 128,
        },
        hides=False,
    ),
    "nemotron_h_omni": Type(
        grids(48, name="image_grid_hw"),
        {
            "text_config": {
                "layers_block_type": ["linear_attention", "mlp", "full_attention"],
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "n_groups": 1,
                "ssm_state_size": 16,
                "chunk_size": 16,
                "moe_shared_expert_intermediate_size": 16,
            },
            "vision_config": {"max_img_size": 64, "patch_dim": 48, "video_patch_dim": 96},
            "vision_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        hides=False,
    ),
    "qwen2_5_omni_thinker": Type(grids(), {**OMNI, **LAST_SEES_ALL}, around=([START], [END])),
    "qwen3_omni_moe_thinker": Type(grids(), OMNI, around=([START], [END])),
    # codes, queries, patches without a tower
    "apertus1p5": Type(
        sized,
        {
            "image_token_offset": 100,
            "audio_token_offset": 116,
            "text_config": {"vocab_size": 128},
            "vision_config": {**CODES, "codebook_size": 16},
            "audio_config": {
                "hidden_size": 8,
                "codebook_dim": 8,
                "codebook_size": 8,
                "num_filters": 2,
            },
        },
    ),
    "emu3": Type(
        sized,
        {
            "vq_config": {
                **CODES,
                "codebook_size": 16,
                "embed_dim": 4,
                "latent_channels": 4,
                "hidden_size": 64,
                "num_attention_heads": 1,
            },
            "vocabulary_map": VISUAL,
            "image_token_id": IMAGE,
        },
        structure=of_codes,
    ),
    "chameleon": Type(
        square(),
        {
            "vq_config": {**CODES, "num_embeddings": 16, "resolution": 32},
            "vocabulary_map": VISUAL,
            "image_token_id": IMAGE,
        },
    ),
    "fuyu": Type(patches(48, name=FUYU_PATCHES)),
}


VIDEO_FAULTS = {("kimi_k25", "5.19.0"), ("kimi_k25", "5.20.2")}
"""Types whose encoder of videos fails in a release: it counts the rows of every frame."""
CACHE_FAULTS = {("ernie4_5_vl_moe", "5.19.0"), ("ernie4_5_vl_moe", "5.20.2")}
"""Types whose `generate` fails on a filled cache in a release: it passes all token types on."""

OWN_FAULTS = {("llama4", "5.24.0"): "its output has no image_outputs, which its forward reads"}
"""Types whose forward fails in a release of transformers, pruned or not, and why."""

TIMM = {"fast_vlm", "gemma3n", "perception_lm"}
"""Types with a tower of timm."""


@dataclass(frozen=True)
class Video:
    """How a prompt has a video of two steps.

    Attributes
    ----------
    by_frame
        Whether text stands between the frames.
    structure
        Which rows are the same whatever the pixels.
    """

    by_frame: bool = False
    structure: tuple[int, ...] = ()


WHOLE_VIDEO, BY_FRAME = Video(), Video(by_frame=True)
VIDEOS: dict[str, Video] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "ernie4_5_vl_moe", "exaone4_5"), WHOLE_VIDEO),
    **dict.fromkeys(("hyperclovax_vision_v2", "video_llama_3", "kimi_k25"), WHOLE_VIDEO),
    **dict.fromkeys(("muse_glimmer", "muse_spark", "lfm3_vl", "dots3_note"), WHOLE_VIDEO),
    **dict.fromkeys(("minimax_m3_vl", "qwen2_5_omni_thinker"), WHOLE_VIDEO),
    **dict.fromkeys(("qwen3_omni_moe_thinker", "llava_next_video"), WHOLE_VIDEO),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), BY_FRAME),
    **dict.fromkeys(("qwen4_exp", "cosmos3_omni", "cosmos3_edge", "cohere_compass"), BY_FRAME),
    "hy_v4_vl": Video(structure=(3, 7, 11, 15)),
    "llava_onevision": Video(structure=(16,)),
}
"""Types whose videos stand in the prompt as tokens of their own."""
