"""Architectures that vLLM alone has, as folders with a config and a processor and no weights.

What vLLM has no config of is read by a Python file in the folder, as those who publish such models
have it. `tests.vllm.checkpoints` writes the folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from tests.hf.models import BOS, END, EOS, IMAGE, PAD, START, VIDEO

tf: Any = transformers  # its classes are not typed

TEXT: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
"""A language model."""

CODE = """\
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class RemoteConfig(PretrainedConfig):
    model_type = "KIND"

    def __init__(self, **fields):
        for name in list(fields):
            part = fields[name]
            if name.endswith("_config") and isinstance(part, dict):
                if part.get("model_type") in CONFIG_MAPPING:
                    part = AutoConfig.for_model(**part)
                else:
                    part = PretrainedConfig(**part)
                setattr(self, name, part)
                del fields[name]
        super().__init__(**fields)
"""
"""A config whose parts are those of transformers' where they name one of its types."""


@dataclass(frozen=True)
class OnlyVllm:
    """What is particular to an architecture.

    Attributes
    ----------
    config
        The content of its config.json, or what makes a config of transformers' kind.
    folder
        See `tests.vllm.checkpoints`.
    code
        Of the Python file with its config, "" where vLLM has that: `CODE`, or another one.
    """

    config: dict[str, Any] | Callable[[], Any]
    folder: dict[str, Any]
    code: str = ""

    def files(self) -> dict[str, Any]:
        """Return config.json, and the Python file."""
        if callable(self.config):
            return {"config.json": json.loads(self.config().to_json_string(use_diff=False))}
        if not self.code:
            return {"config.json": self.config}
        code = self.code.replace("KIND", self.config["model_type"])
        (config_class,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
        auto_map = {"AutoConfig": f"configuration.{config_class}"}
        return {"config.json": {**self.config, "auto_map": auto_map}, "configuration.py": code}


_COLOURS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _qwen_images(merge: int = 2, frames: int = 2, patch: int = 4) -> Any:
    """Return what makes Qwen2-VL's processor."""

    def make(tokenizer: Any, _config: Any) -> Any:
        token = (patch * merge) ** 2
        arguments = {
            "size": {"shortest_edge": 4 * token, "longest_edge": 256 * token},
            "patch_size": patch,
            "temporal_patch_size": frames,
            "merge_size": merge,
            **_COLOURS,
        }
        return tf.Qwen2VLProcessor(
            tf.Qwen2VLImageProcessor(**arguments),
            tokenizer,
            tf.Qwen2VLVideoProcessor(**arguments),
        )

    return make


_DOTS = """\
from vllm.transformers_utils.configs import dotsocr


class DotsOCRConfig(dotsocr.DotsOCRConfig):
    pass
"""

_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
"""A tower."""

_TILED: dict[str, Any] = {
    "force_image_size": 32,
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "max_dynamic_patch": 4,
    "min_dynamic_patch": 1,
    "use_thumbnail": True,
    "select_layer": -1,
    "ps_version": "v2",
}
"""What configs in the format of InternVL say."""

_INTERNVL = {
    "tokens": ("<IMG_CONTEXT>", "<|video_pad|>", "<img>", "</img>"),
    "image": "<image>",
    "processor": None,
}

ONLY_VLLM: dict[str, OnlyVllm] = {
    "dots_ocr": OnlyVllm(
        {
            "architectures": ["DotsOCRForCausalLM"],
            "model_type": "dots_ocr",
            **TEXT,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_config": {
                "embed_dim": 64,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
            },
        },
        {
            "tokens": ("<|imgpad|>", "<|video_pad|>", "<|img|>", "<|endofimg|>"),
            "image": "<|img|><|imgpad|><|endofimg|>",
            "processor": _qwen_images(frames=1),
        },
        _DOTS,
    ),
    "opencua": OnlyVllm(
        {
            "architectures": ["OpenCUAForConditionalGeneration"],
            "model_type": "opencua",
            "media_placeholder_token_id": IMAGE,
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "hidden_size": 64,
                "out_hidden_size": 64,
                "intermediate_size": 96,
                "depth": 2,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "hidden_act": "silu",
                "in_channels": 3,
                "tokens_per_second": 2,
            },
        },
        {
            "tokens": ("<|media_placeholder|>", "<|video_pad|>", "<|media_begin|>", "<|media_end|>"),
            "image": "<|media_begin|><|media_placeholder|><|media_end|>",
            "processor": _qwen_images(),
        },
        CODE,
    ),
    "eagle_2_5_vl": OnlyVllm(
        {
            "architectures": ["Eagle2_5_VLForConditionalGeneration"],
            "model_type": "eagle_2_5_vl",
            **_TILED,
            "text_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        },
        _INTERNVL,
        CODE,
    ),
    "nvlm_d": OnlyVllm(
        {
            "architectures": ["NVLM_D"],
            "model_type": "NVLM_D",
            **_TILED,
            "text_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TEXT},
            "vision_config": {
                "model_type": "intern_vit_6b",
                **_VISION,
                "hidden_size": 512,
                "num_attention_heads": 1,
                "initializer_factor": 1.0,
                "norm_type": "layer_norm",
                "qk_normalization": False,
                "qkv_bias": True,
            },
        },
        {
            **_INTERNVL,
            "tokens": ("<|vision_pad|>", "<|video_pad|>", "<Image>", "</Image>"),
            "image": "<image>\n",
        },
        CODE,
    ),
    "isaac": OnlyVllm(
        {
            "architectures": ["IsaacForConditionalGeneration"],
            "model_type": "isaac",
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
            "vision_config": {
                "model_type": "pixel_shuffle_siglip2",
                **_VISION,
                "num_patches": 64,
                "pixel_shuffle_scale_factor": 2,
            },
            "video_patch_size": 4,
            "vision_max_num_patches": 64,
            "pixel_shuffle_scale": 2,
        },
        {
            "tokens": ("<|image_pad|>", "<|video_pad|>", "<image>", "<|end|>"),
            "image": "<image>",
            "processor": None,
        },
    ),
}
"""Name -> what is particular to it."""
