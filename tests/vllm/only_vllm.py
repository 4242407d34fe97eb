"""Architectures that vLLM alone has, as folders with a config and a processor and no weights.

What vLLM has no config of is read by a Python file in the folder, as those who publish such models
have it. `tests.vllm.checkpoints` writes the folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from tests.hf.models import BOS, END, EOS, IMAGE, PAD, START, VIDEO
from tests.hf.types import architecture_of
from tests.vllm.looking import OneVisionTower, OvisTiles, OvisTower, Tower
from tests.vllm.other_types import ONE_PAD, PADS, WIDTH, OtherType, grids

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
    images
        How many vLLM takes in a prompt.
    hears
        Whether it takes videos, and sound.
    videos
        Whether it takes a video.
    tower
        Where its tower is, if methods that look at it are compared too.
    parts
        Of how many rows an image has, which are tokens: those of each part that is pruned on its
        own. The others always stay.
    enlarged
        By how much pictures are larger than others', where each token is many pixels.
    positions
        Those that kept tokens have.
    engine
        What the engine is started with besides.
    more
        Further files: text, or what is written as JSON.
    """

    config: dict[str, Any] | Callable[[], Any]
    folder: dict[str, Any]
    code: str = ""
    images: int = 2
    hears: bool = False
    videos: bool = False
    tower: Tower | None = None
    parts: Callable[[int], list[range]] = lambda rows: [range(rows)]
    enlarged: int = 1
    positions: str = "original"
    engine: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, Any]:
        """Return config.json, and what stands beside it."""
        if callable(self.config):
            return {"config.json": json.loads(self.config().to_json_string(use_diff=False))}
        if not self.code:
            return {"config.json": self.config, **self.more}
        code = self.code.replace("KIND", self.config["model_type"])
        (config_class,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
        auto_map = {"AutoConfig": f"configuration.{config_class}"}
        config = {**self.config, "auto_map": auto_map}
        return {"config.json": config, "configuration.py": code, **self.more}


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


def _of_transformers(
    kind: str,
    folder: dict[str, Any],
    over: dict[str, Any] | None = None,
    architecture: str | None = None,
    **more: Any,
) -> OnlyVllm:
    """Return a type whose config transformers has, and whose model it has otherwise than vLLM."""

    def config() -> Any:
        made = OtherType(folder, over or {}).tiny(kind).build()
        made.architectures = [architecture or architecture_of(kind).__name__]
        return made

    return OnlyVllm(config, folder, **more)


def _siglip(tokenizer: Any, config: Any) -> Any:
    side = config["vit_config"]["image_size"]
    images = tf.SiglipImageProcessor(size={"height": side, "width": side})
    return _Parts(images, tokenizer)


class _Parts:
    """An image processor and a tokenizer, of which vLLM makes a processor of its own."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def save_pretrained(self, folder: Any) -> None:
        for part in self._parts:
            part.save_pretrained(folder)


_PROCESSING = """\
import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from torchvision.transforms import functional as F


class RemoteImages(BaseImageProcessor):
    patch_size, merge_size = 4, 2
    size = {"min_pixels": 256, "max_pixels": 16384}

    def __call__(self, images, **_):
        side, patch = self.patch_size * self.merge_size, self.patch_size
        made = {"pixel_values": [], "image_grid_thw": []}
        for image in images if isinstance(images, list) else [images]:
            sides = [max(1, min(one, 128) // side) * side for one in (image.height, image.width)]
            pixels = F.to_tensor(image.convert("RGB").resize(sides[::-1])) * 2 - 1
            rows, columns = (one // patch for one in sides)
            patches = pixels.unfold(1, patch, patch).unfold(2, patch, patch)
            made["pixel_values"].append(patches.permute(1, 2, 0, 3, 4).flatten(0, 1))
            made["image_grid_thw"].append([1, rows, columns])
        return BatchFeature(
            {
                "pixel_values": torch.cat(made["pixel_values"]),
                "image_grid_thw": torch.tensor(made["image_grid_thw"]),
            }
        )


class RemoteProcessor(ProcessorMixin):
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, tokenizer=None):
        self.tokenizer, self.image_processor = tokenizer, RemoteImages()
        self.chat_template = None

    @classmethod
    def from_pretrained(cls, folder, **_):
        return cls(AutoTokenizer.from_pretrained(folder))

    def __call__(self, text=None, images=None, **_):
        made = {} if not images else self.image_processor(images)
        if text is not None:
            made = {**self.tokenizer(text), **made}
        return BatchFeature(made)
"""
"""An image processor of packed patches [3, 4, 4], four of them a token."""

_KEYE_FILES = {
    "processing.py": _PROCESSING,
    "processor_config.json": {"auto_map": {"AutoProcessor": "processing.RemoteProcessor"}},
}

_KEYE: dict[str, Any] = {
    **TEXT,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    },
    "vision_config": {**_VISION, "spatial_merge_size": 2},
}

_STEP: dict[str, Any] = {
    "tokens": ("<im_patch>", "<|video_pad|>", "<im_start>", "<im_end>"),
    "image": "<im_patch>",
    "processor": None,
    "more": {188: "<patch_start>", 189: "<patch_end>", 190: "<patch_newline>"},
}

_PERCEPTION: dict[str, Any] = {
    "model_type": "perception_encoder",
    "width": 64,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 1.5,
    "image_size": 728,
    "patch_size": 14,
    "output_dim": None,
    "hidden_act": "gelu",
    "ls_init_value": 0.1,
    "use_abs_posemb": True,
    "use_cls_token": False,
    "use_ln_post": False,
    "use_ln_pre": True,
    "use_rope2d": True,
}

_STEP3P7 = """\
from transformers import PretrainedConfig
from vllm.transformers_utils.configs.step3p5 import Step3p5Config


class Step3p7Config(PretrainedConfig):
    model_type = "step3p7"

    def __init__(self, text_config=None, vision_config=None, **fields):
        self.text_config = Step3p5Config(**(text_config or {}))
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**fields)
"""

_LONG = {"max_model_len": 8192, "num_gpu_blocks_override": 128}
"""For images of fixed sizes, and as many crops as the largest may have."""


def _pixtral(tokenizer: Any, config: Any) -> Any:
    patch, merged = config.vision_config.patch_size, config.spatial_merge_size
    side = patch * merged
    images = tf.PixtralImageProcessor(
        size={"longest_edge": config.vision_config.image_size},
        patch_size={"height": side, "width": side},
    )
    return tf.PixtralProcessor(images, tokenizer, patch_size=patch, spatial_merge_size=merged)


def _blip_2_config() -> Any:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = {"ffn_dim": 96, "word_embed_proj_dim": 64, "vocab_size": 192, "num_hidden_layers": 2}
    return tf.Blip2Config(
        vision_config={**_VISION, "num_hidden_layers": 2},
        qformer_config={**small, "num_attention_heads": 2, "encoder_hidden_size": 64},
        text_config={
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "hidden_size": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 1024,
            **text,
        },
        num_query_tokens=16,
        image_token_index=IMAGE,
        architectures=["Blip2ForConditionalGeneration"],
    )


def _blip_2(tokenizer: Any, config: Any) -> Any:
    side = config.vision_config.image_size
    images = tf.BlipImageProcessor(size={"height": side, "width": side})
    return tf.Blip2Processor(images, tokenizer, num_query_tokens=config.num_query_tokens)


def _omni(kind: str, name: str, rope: dict[str, Any], architecture: str = "") -> OnlyVllm:
    """Return a model that also hears: of it vLLM runs the part that writes text, the thinker."""
    ids = {"audio_token_id": 188, "audio_start_token_id": 189, "audio_end_token_id": 190}
    ids |= {"vision_start_token_id": START, "vision_end_token_id": END}
    images = grids("Qwen2_5_VL")

    def config() -> Any:
        text = {
            "rope_parameters": rope,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        }
        # Published configs say them; transformers does not know them.
        vision: dict[str, Any] = {"image_size": 32, "apply_vit_abs_pos_embed": True}
        vision |= {"deepstack_visual_indexes": [0, 1]}
        over = {"text_config": text, "vision_config": vision, "audio_config": {"output_dim": WIDTH}}
        made = getattr(tf, f"{name}Config")()
        made.thinker_config = OtherType({}, over | ids).tiny(f"{kind}_thinker").build()
        made.architectures = [architecture or f"{name}ForConditionalGeneration"]
        return made

    def processor(tokenizer: Any, config: Any) -> Any:
        thinker = config.thinker_config
        seen = images(tokenizer, thinker)
        return getattr(tf, f"{name}Processor")(
            seen.image_processor,
            seen.video_processor,
            tf.WhisperFeatureExtractor(feature_size=thinker.audio_config.num_mel_bins),
            tokenizer,
        )

    return OnlyVllm(
        config,
        {
            "tokens": PADS,
            "image": ONE_PAD,
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
            "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
            "processor": processor,
            "more": {188: "<|audio_pad|>", 189: "<|audio_start|>", 190: "<|audio_end|>"},
            "named": {
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "audio_token": "<|audio_pad|>",
                "vision_bos_token": "<|vision_start|>",
                "vision_eos_token": "<|vision_end|>",
                "audio_bos_token": "<|audio_start|>",
                "audio_eos_token": "<|audio_end|>",
            },
        },
        hears=True,
        engine={
            "limit_mm_per_prompt": {"image": 2, "video": 1, "audio": 1},
            "max_model_len": 8192,  # videos are large, whatever their processor is told
            "num_gpu_blocks_override": 128,
        },
    )


def _ovis(architecture: str, kind: str, text: dict[str, Any]) -> OnlyVllm:
    """Return an Ovis 2.5 or 2.6, whose processor knows the ids of indicators by heart."""
    return OnlyVllm(
        {
            "architectures": [architecture],
            "model_type": kind,
            "hidden_size": TEXT["hidden_size"],
            "visual_vocab_size": 36,  # 32 words and four indicators
            "llm_config": {**TEXT, **text, "max_position_embeddings": 8192},
            "vit_config": {
                "model_type": "siglip2_navit",
                **_VISION,
                "attention_dropout": 0.0,
                "num_patches": -1,
                "patch_size": 32,  # the fewest pixels that an image is made to have are 448 x 448
                "temporal_patch_size": 1,
                "hidden_stride": 2,
                "window_size": 192,
                "fullatt_block_indexes": None,
                "preserve_original_pe": True,
                "use_rope": True,
                "image_size": 128,
            },
        },
        {
            "tokens": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
            "image": "<image>",
            "video": "<video>",
            "processor": _siglip,
            "more": dict(enumerate(_OVIS_MARKS, 151669)),
        },
        CODE,
        images=2,
        videos=True,
        tower=OvisTower(),
        parts=lambda rows: [range(1, rows - 1)],
        enlarged=3,
        engine={**_LONG, "limit_mm_per_prompt": {"image": 2, "video": 1}},
    )


_OVIS_MARKS = (
    *("<image>", "<video>", "<ovis_visual_atom>"),
    *("<ovis_image_start>", "<ovis_image_end>", "<ovis_video_start>", "<ovis_video_end>"),
)


_ONEVISION = """\
import torch
from transformers import BatchFeature


class LlavaOnevision2Processor:
    def __init__(self, image_processor, tokenizer, **_):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text, images=None, **_):
        made = {}
        if images:
            made = dict(self.image_processor(images, return_tensors="pt"))
            grids = made["image_grid_thw"].tolist()
            made["patch_positions"] = torch.cat([self._positions(*grid) for grid in grids])
        return BatchFeature({**self.tokenizer(text), **made})

    def _positions(self, frames, rows, columns):
        merge = self.image_processor.merge_size
        axes = (torch.arange(side) for side in (frames, rows, columns))
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        places = places.unflatten(1, (-1, merge)).unflatten(3, (-1, merge))
        return places.transpose(2, 3).reshape(-1, 3)
"""
"""The checkpoint's own processor, as far as vLLM calls it for images and for frames of videos."""


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
                # What its image processor does, whatever the config says.
                "patch_size": 16,
                "num_patches": 256,
                "pixel_shuffle_scale_factor": 2,
            },
            "vision_patch_size": 16,
            "vision_max_num_patches": 2048,
            "pixel_shuffle_scale": 2,
        },
        {
            "tokens": ("<|image_pad|>", "<|video_pad|>", "<image>", "<|end|>"),
            "image": "<image>",
            "processor": None,
        },
        engine={"max_model_len": 1024},
    ),
    "exaone4_5": _of_transformers(
        "exaone4_5",
        {
            "tokens": PADS,
            "image": ONE_PAD,
            "processor": grids("Exaone4_5_", "Qwen2VL", "Qwen2VL"),
        },
    ),
    "cosmos3_edge": _of_transformers(
        "cosmos3_edge",
        {
            "tokens": PADS,
            "image": ONE_PAD,
            "processor": grids("Cosmos3Edge", "Cosmos3Edge", "Cosmos3Edge"),
        },
        {
            "text_config": {"rope_parameters": {"mrope_section": [6, 5, 5]}},
            "projector_config": {
                "input_hidden_size": WIDTH,
                "merger_intermediate_size": 96,
                "out_hidden_size": WIDTH,
            },
        },
    ),
    "cohere_compass": _of_transformers(
        "cohere_compass",
        {
            "tokens": tuple(text.upper() for text in PADS),
            "image": ONE_PAD.upper(),
            "processor": grids("CohereCompass", "CohereCompass", "CohereCompass"),
        },
        {
            "text_config": {
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "full_attention": {"mrope_section": [6, 5, 5]},
                    "sliding_attention": {"mrope_section": [6, 5, 5]},
                },
            },
            "tie_word_embeddings": True,
        },
    ),
    # In the format in which it is published, which transformers has another one for.
    "qianfan_ocr": OnlyVllm(
        {
            "architectures": ["QianfanOCRForConditionalGeneration"],
            "model_type": "qianfan_ocr",
            **_TILED,
            "image_token_id": IMAGE,
            "text_config": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **TEXT},
            "vision_config": {"model_type": "qianfan_ocr_vision", **_VISION},
        },
        _INTERNVL,
    ),
    "bagel": OnlyVllm(
        {
            "architectures": ["BagelForConditionalGeneration"],
            "model_type": "bagel",
            "llm_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TEXT},
            "vit_config": {
                "model_type": "siglip_vision_model",
                **_VISION,
                "image_size": 24,
            },
            "vit_max_num_patch_per_side": 6,
        },
        {
            "tokens": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
            "processor": _siglip,
        },
    ),
    "step3_vl": OnlyVllm(
        {
            "architectures": ["Step3VLForConditionalGeneration"],
            "model_type": "step3_vl",
            "image_token_id": IMAGE,
            "understand_projector_stride": 2,
            "text_config": {
                "architectures": ["Step3TextForCausalLM"],
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_attention_heads": 2,
                "num_attention_groups": 1,
                "num_hidden_layers": 2,
                "vocab_size": 192,
                "head_dim": 32,
                "share_q_dim": 64,
                "share_expert_dim": 32,
                "moe_intermediate_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_layers_enum": "1",
                "max_position_embeddings": 8192,
            },
            "vision_config": {
                **_VISION,
                "output_hidden_size": 64,
                "image_size": 728,
                "patch_size": 14,
            },
        },
        _STEP,
        engine=_LONG,
    ),
    # transformers has it too, and its processor resizes otherwise.
    "muse_glimmer": OnlyVllm(
        {
            "architectures": ["MuseGlimmerForConditionalGeneration"],
            "model_type": "muse_glimmer",
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": {
                **TEXT,
                "model_type": "muse_glimmer_text",
                "vocab_size": 195,
                "max_position_embeddings": 8192,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
                "no_rope_layers": [1, 0],
            },
            "vision_config": {
                "model_type": "muse_glimmer_vision",
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "output_dim": 256,
                "adapter_dim": 96,
            },
        },
        {
            "tokens": ("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>"),
            "image": "<|patch|>",
            "processor": None,
            "more": dict(
                enumerate(
                    ("<|image|>", "<|vid_start|>", "<|vid_end|>", "<|vid_frame_separator|>"), 190
                )
            ),
        },
        enlarged=4,
        engine={**_LONG, "num_gpu_blocks_override": 288},  # sliding layers have blocks of their own
    ),
    "keye": OnlyVllm(
        {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", **_KEYE},
        {"tokens": PADS, "image": ONE_PAD, "processor": None},
        CODE,
        more=_KEYE_FILES,
    ),
    "keye_vl1_5": OnlyVllm(
        {
            "architectures": ["KeyeVL1_5ForConditionalGeneration"],
            "model_type": "KeyeVL1_5",
            **_KEYE,
        },
        {"tokens": PADS, "image": ONE_PAD, "processor": None},
        CODE,
        more=_KEYE_FILES,
    ),
    # As it was published before transformers had it: with the config of Mistral 3.
    "lightonocr": _of_transformers(
        "mistral3",
        {
            "tokens": ("[IMG]", "<|video|>", "[IMG_BREAK]", "[IMG_END]"),
            "image": "[IMG]",
            "processor": _pixtral,
        },
        {
            "vision_config": {"image_size": 64},
            "text_config": {"tie_word_embeddings": False},
            "tie_word_embeddings": False,
        },
        architecture="LightOnOCRForConditionalGeneration",
    ),
    "step_vl": OnlyVllm(
        {
            "architectures": ["StepVLForConditionalGeneration"],
            "model_type": "step_robotics",
            "image_token_id": IMAGE,
            "projector_bias": False,
            "text_config": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **TEXT}
            | {"max_position_embeddings": 8192},
            "vision_config": _PERCEPTION,
        },
        _STEP,
        CODE,
        engine=_LONG,
    ),
    "step3p7": OnlyVllm(
        {
            "architectures": ["Step3p7ForConditionalGeneration"],
            "model_type": "step3p7",
            "image_token_id": IMAGE,
            "projector_bias": False,
            "text_config": {
                **TEXT,
                "architectures": ["Step3p5ForCausalLM"],
                "max_seq_len": 8192,
                "max_position_embeddings": 8192,
                "num_attention_groups": 1,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 64,
                "moe_intermediate_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 4,
                "share_expert_dim": 32,
            },
            "vision_config": _PERCEPTION,
        },
        _STEP,
        _STEP3P7,
        engine={**_LONG, "num_gpu_blocks_override": 288},  # sliding layers have blocks of their own
    ),
    "blip_2": OnlyVllm(
        _blip_2_config,
        {
            "tokens": ("<image>", "<|video|>", "<|start|>", "<|end|>"),
            "image": "",
            "processor": _blip_2,
        },
        images=1,
        positions="compact",
    ),
    "qwen2_5_omni": _omni("qwen2_5_omni", "Qwen2_5Omni", {"mrope_section": [6, 5, 5]}),
    "qwen2_5_omni_model": _omni(
        "qwen2_5_omni", "Qwen2_5Omni", {"mrope_section": [6, 5, 5]}, "Qwen2_5OmniModel"
    ),
    "qwen3_omni_moe": _omni(
        "qwen3_omni_moe", "Qwen3OmniMoe", {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    ),
    "ovis": OnlyVllm(
        {
            "architectures": ["Ovis"],
            "model_type": "ovis",
            "hidden_size": TEXT["hidden_size"],
            "llm_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TEXT},
            "visual_tokenizer_config": {
                "model_type": "siglip_visual_tokenizer",
                "vocab_size": 37,  # 32 words and five indicators
                "hidden_stride": 2,
                "backbone_config": {
                    "model_type": "siglip_vision_model",
                    **_VISION,
                    "vision_use_head": False,
                },
            },
        },
        {
            "tokens": PADS,
            "image": "<image>",
            "processor": lambda tokenizer, _config: _Parts(
                tf.SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer
            ),
            "more": {188: "<image>"},
        },
        images=1,  # vLLM takes several only if they have as many tiles
        tower=OvisTiles(),
        parts=lambda rows: [
            range(17 * tile + 1, 17 * (tile + 1)) for tile in range((rows - 1) // 17)
        ],
        engine={"max_model_len": 1024},
    ),
    "llava_onevision2": OnlyVllm(
        {
            "architectures": ["LlavaOnevision2ForConditionalGeneration"],
            "model_type": "llava_onevision2",
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **TEXT},
            "vision_config": {**_VISION, "spatial_merge_size": 2, "frame_windows_size": 4},
        },
        {
            "tokens": PADS,
            "image": ONE_PAD,
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
            "processor": lambda *made_of: _Parts(
                (made := _qwen_images(frames=1)(*made_of)).image_processor, made.tokenizer
            ),
        },
        CODE,
        videos=True,
        tower=OneVisionTower(),
        engine={
            "limit_mm_per_prompt": {"image": 2, "video": 1},
            "max_model_len": 1024,
        },
        more={
            "processing_llava_onevision2.py": _ONEVISION,
            "video_processing_llava_onevision2.py": _ONEVISION.replace(
                "LlavaOnevision2Processor", "LlavaOnevision2VideoProcessor"
            ).replace("tokenizer, **_", "tokenizer=None, **_"),
        },
    ),
    "ovis2_5": _ovis(
        "Ovis2_5", "ovis2_5", {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    ),
    "ovis2_6": _ovis(
        "Ovis2_6ForCausalLM",
        "ovis2_6",
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    ),
    "ovis2_6_moe": _ovis(
        "Ovis2_6_MoeForCausalLM",
        "ovis2_6_moe",
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
}
"""Name -> what is particular to it."""
