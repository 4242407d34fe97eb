"""ERNIE-4.5-VL's folder as it is published, which vLLM loads with the code that stands in it.

Weights and image processor are those of transformers. The code here is no more than the names by
which vLLM reads the config, and what it wants of a processor.
"""

from __future__ import annotations

import json
from pathlib import Path

_CONFIGURATION = """\
from transformers import PretrainedConfig


class ErnieConfig(PretrainedConfig):
    model_type = "ernie4_5_moe_vl"

    def __init__(self, text_config=None, vision_config=None, **kwargs):
        text, vision = dict(text_config or {}), dict(vision_config or {})
        for part in (text, vision, kwargs):
            part.pop("model_type", None)
        if not text:
            super().__init__(**kwargs)
            return
        sparse = [n for n, kind in enumerate(text.pop("mlp_layer_types")) if kind == "sparse"]
        experts = text.pop("moe_num_experts")
        super().__init__(**{**text, **kwargs})
        self.vision_config = PretrainedConfig(**vision)
        self.vision_config.embed_dim = vision["hidden_size"]
        self.vision_config.mlp_ratio = vision["intermediate_size"] / vision["hidden_size"]
        self.moe_num_experts = [experts, experts]
        self.moe_layer_start_index = [sparse[0], sparse[0]]
        self.moe_layer_end_index = [sparse[-1], sparse[-1]]
        self.freq_allocation = text["rope_parameters"]["mrope_section"][2]
        self.im_patch_id = self.image_token_id
        self.pixel_hidden_size = vision["hidden_size"]
        self.spatial_conv_size = vision["spatial_merge_size"]
        self.temporal_conv_size = vision["temporal_merge_size"]
        self.use_temporal_conv = True
"""

_PROCESSOR = """\
from transformers import BatchFeature, Ernie4_5_VLMoeProcessor


class PublishedProcessor(Ernie4_5_VLMoeProcessor):
    spatial_conv_size = 2
    temporal_conv_size = 2

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, **kwargs)
        names = "shortest_edge", "longest_edge"
        self.limits = {name: self.image_processor.size[name] for name in names}
        least, most = self.limits.values()
        self.image_processor.size = {**self.limits, "min_pixels": least, "max_pixels": most}

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        made = {"input_ids": self.tokenizer(text, return_tensors="pt").input_ids}
        if images:  # vLLM takes mean and deviation off
            plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
            found = self.image_processor(images=images, size=self.limits, **plain)
            made |= {"images": found["pixel_values"], "grid_thw": found["image_grid_thw"]}
        return BatchFeature(made)
"""


def publish(folder: Path) -> None:
    """Let a folder that transformers saved be as a published one."""
    for name, auto, file, code in (
        ("config.json", "AutoConfig", "configuration_ernie.ErnieConfig", _CONFIGURATION),
        (
            "processor_config.json",
            "AutoProcessor",
            "processing_ernie.PublishedProcessor",
            _PROCESSOR,
        ),
    ):
        described = json.loads((folder / name).read_text())
        described["auto_map"] = {auto: file}
        (folder / name).write_text(json.dumps(described, indent=2))
        (folder / f"{file.partition('.')[0]}.py").write_text(code)
