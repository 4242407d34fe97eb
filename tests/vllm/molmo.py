"""Molmo 2's folder as it is published, which vLLM loads with the code that stands in it.

Weights and processor are those of transformers. The code here is no more than the names by which
vLLM reads the config, and the one thing that the published processor does otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

MARKS = ("<|image|>", "<im_col>", "<low_res_im_start>", "<frame_start>", "<frame_end>", "<im_low>")
"""The tokens beside those of an image's patches, start and end."""

_NAMES = (
    *("image_col_id", "low_res_image_start_token_id"),
    *("frame_start_token_id", "frame_end_token_id", "image_low_res_id"),
)


def mark_ids(first: int) -> dict[str, int]:
    """Return what the config calls the marks' ids, of which the image's placeholder has `first`."""
    return dict(zip(_NAMES, range(first + 1, first + len(MARKS)), strict=True))


_CONFIGURATION = """\
from transformers import PretrainedConfig


class Molmo2Config(PretrainedConfig):
    model_type = "molmo2"

    def __init__(self, vit_config=None, adapter_config=None, text_config=None, **kwargs):
        self.vit_config = PretrainedConfig(**(vit_config or {}))
        self.adapter_config = PretrainedConfig(**(adapter_config or {}))
        self.text_config = PretrainedConfig(**(text_config or {}))
        super().__init__(**kwargs)
"""

_PROCESSING = """\
import torch
from transformers import Molmo2Processor


class PublishedProcessor(Molmo2Processor):
    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        grids = made.get("image_grids")
        if grids is not None:  # count the patches of each image from 0
            tokens = grids[:, :2].prod(dim=1) + grids[:, 2:].prod(dim=1)
            patches = made["image_num_crops"] * made["pixel_values"].shape[1]
            first = (patches.cumsum(0) - patches).repeat_interleave(tokens)[:, None]
            pooling = made["image_token_pooling"]
            made["image_token_pooling"] = torch.where(pooling < 0, -1, pooling - first)
        return made
"""


def publish(folder: Path) -> None:
    """Let a folder that transformers saved be as a published one."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    vision, adapter = config.pop("vision_config"), config["adapter_config"]
    vision["image_default_input_size"] = vision.pop("image_size")
    vision["image_patch_size"] = vision.pop("patch_size")
    vision["image_num_pos"] = vision.pop("num_position_embeddings")
    adapter["vit_layers"] = adapter.pop("vision_feature_layer")
    adapter["pooling_attention_mask"] = True  # so it is in all of them
    text = config["text_config"]
    text["qkv_bias"], text["layer_norm_eps"] = text["attention_bias"], text["rms_norm_eps"]
    text["use_qk_norm"] = True
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    config["vit_config"] = vision
    config["auto_map"] = {"AutoConfig": "configuration_molmo2.Molmo2Config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "configuration_molmo2.py").write_text(_CONFIGURATION)
    file = folder / "processor_config.json"
    processor = json.loads(file.read_text())
    processor["auto_map"] = {"AutoProcessor": "processing_molmo2.PublishedProcessor"}
    file.write_text(json.dumps(processor, indent=2))
    (folder / "processing_molmo2.py").write_text(_PROCESSING)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    # transformers adds rows to the embedding of their placeholder, vLLM puts them in its place.
    (embedding,) = (tensor for name, tensor in tensors.items() if name.endswith("wte.embedding"))
    embedding[config["image_patch_id"]] = 0
    save_file(tensors, weights, {"format": "pt"})
