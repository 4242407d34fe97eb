"""Architectures that vLLM alone has, as folders with a config and a processor and no weights.

What vLLM has no config of is read by a Python file in the folder, as those who publish such models
have it. `tests.vllm.checkpoints` writes the folders.
"""

from __future__ import annotations

import re
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
from transformers import AutoConfig, PretrainedConfig


class RemoteConfig(PretrainedConfig):
    model_type = "KIND"

    def __init__(self, **fields):
        for name in list(fields):
            part = fields[name]
            if name.endswith("_config") and isinstance(part, dict):
                kind = part.get("model_type", "")
                if kind in KNOWN:
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
        The content of its config.json.
    folder
        See `tests.vllm.checkpoints`.
    code
        Of the Python file with its config, "" where vLLM has that: `CODE`, or another one.
    """

    config: dict[str, Any]
    folder: dict[str, Any]
    code: str = ""

    def files(self) -> dict[str, Any]:
        """Return config.json, and the Python file."""
        if not self.code:
            return {"config.json": self.config}
        known = sorted(
            part["model_type"]
            for name, part in self.config.items()
            if name.endswith("_config") and "model_type" in part
        )
        code = self.code.replace("KIND", self.config["model_type"]).replace("KNOWN", str(known))
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
}
"""Name -> what is particular to it."""
