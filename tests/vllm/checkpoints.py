"""Tiny random checkpoints that transformers and the vLLM engine both load, and inputs for both.

The configs and weights are those of the tiny models in ``tests/hf``. What is added is all that a
folder on a disk needs: a tokenizer, a processor, a chat template, and the tensor names that both
engines read.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from tests.hf.models import BOS, END, EOS, IMAGE, PAD, START, TINY, VIDEO, Tiny, tf
from tests.vllm import molmo
from tests.vllm.only_vllm import ONLY_VLLM
from tests.vllm.other_types import OTHER_TYPES

WORDS: list[int] = list(range(3, 90))
"""The token ids that random weights may say; all others are placeholders or parts of words."""

FPS = 2.0
"""Frames per second of every video."""

_UNKNOWN, _CHARACTERS, _VOCABULARY = 94, 96, 192
"""The token id of whatever is unknown, that of the first character, and the number of all ids."""

_TILES = 4
"""Most tiles that InternVL cuts an image into, without the thumbnail."""

_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    # vLLM's attention on a CPU takes heads of 32, 64, 80 ... and no smaller ones.
    "head_dim": 32,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True)
class _Family:
    """How a family's folder and prompts differ from the others'.

    Attributes
    ----------
    tokens
        The text of the special tokens IMAGE, VIDEO, START and END.
    image, video
        What stands for one in a prompt, for both engines; no video where a family takes none.
    audio
        Likewise a sound, where vLLM alone is asked about one.
    processor
        (tokenizer, config) -> transformers' processor.
    changes
        Attributes of the tiny model's config that have to be others here.
    begins
        Whether the tokenizer starts every text with BOS.
    opening
        What every prompt starts with, where the processor would put it in front.
    named
        Special tokens that the processor wants to find as attributes of the tokenizer.
    more
        Further special tokens, by id.
    dtype
        In which the weights are saved, and both engines calculate.
    says
        Fields that config.json has in place of those that transformers writes.
    renamed
        Patterns of names of weights, and what published checkpoints, which vLLM reads, say.
    """

    tokens: tuple[str, str, str, str]
    image: str
    processor: Any
    video: str | None = None
    audio: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    begins: bool = False
    opening: str = ""
    named: dict[str, str] = field(default_factory=dict)
    more: dict[int, str] = field(default_factory=dict)
    dtype: str = "float32"
    says: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, Any] = field(default_factory=dict)


def _square(config: Any) -> dict[str, int]:
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def _clip(config: Any) -> dict[str, Any]:
    """Return how many tokens an image has: one for each patch, and CLS, which is not used."""
    return {
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }


def _llava(tokenizer: Any, config: Any) -> Any:
    size = _square(config)
    images = tf.CLIPImageProcessor(size={"shortest_edge": size["height"]}, crop_size=size)
    return tf.LlavaProcessor(images, tokenizer, **_clip(config))


def _llava_next(tokenizer: Any, config: Any) -> Any:
    size = _square(config)
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": size["height"]},
        crop_size=size,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return tf.LlavaNextProcessor(images, tokenizer, **_clip(config))


def _internvl_whole(tokenizer: Any, config: Any) -> Any:
    processor = _internvl(tokenizer, config)
    processor.image_processor.max_patches = 1
    return processor


def _llava_next_video(tokenizer: Any, config: Any) -> Any:
    images = _llava_next(tokenizer, config).image_processor
    size = _square(config)
    videos = tf.LlavaNextVideoVideoProcessor(
        size={"shortest_edge": size["height"]}, crop_size=size, do_sample_frames=False
    )
    return tf.LlavaNextVideoProcessor(videos, images, tokenizer, **_clip(config))


def _llava_onevision(tokenizer: Any, config: Any) -> Any:
    size = _square(config)
    images = tf.LlavaOnevisionImageProcessor(
        size=size, image_grid_pinpoints=config.image_grid_pinpoints
    )
    return tf.LlavaOnevisionProcessor(
        images,
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(size["height"] // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


def _internvl(tokenizer: Any, config: Any) -> Any:
    # The mean and deviation that vLLM has built in for the original format.
    colours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = _square(config)
    images = tf.GotOcr2ImageProcessor(
        size=size, crop_to_patches=True, min_patches=1, max_patches=_TILES, **colours
    )
    return tf.InternVLProcessor(
        images,
        tokenizer,
        tf.InternVLVideoProcessor(size=size, **colours),
        image_seq_length=config.image_seq_length,
    )


def _qwen(processor: str, videos: str, width: str, **rope: Any) -> _Family:
    def make(tokenizer: Any, config: Any) -> Any:
        vision = config.vision_config
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        arguments = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            # vLLM normalizes inside the model, videos like images: they must not differ.
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        # The pixels of a video are those of a frame, but in Qwen3-VL those of all its frames.
        return getattr(tf, processor)(
            tf.Qwen2VLImageProcessor(
                size={"shortest_edge": 4 * token, "longest_edge": 512 * token}, **arguments
            ),
            tokenizer,
            getattr(tf, videos)(
                size={"shortest_edge": 4 * token, "longest_edge": 1024 * token},
                cap_pixels_per_frame=False,
                **arguments,
            ),
        )

    image, video, start, end = tokens = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    return _Family(
        tokens=tokens,
        image=f"{start}{image}{end}",
        video=f"{start}{video}{end}",
        processor=make,
        changes={
            "text_config": {"rope_parameters": rope},
            "vision_config": {width: _TEXT["hidden_size"]},
        },
    )


def _gemma3(tokenizer: Any, config: Any) -> Any:
    images = tf.Gemma3ImageProcessor(size=_square(config))
    return tf.Gemma3Processor(images, tokenizer, image_seq_length=config.mm_tokens_per_image)


def _gemma3n(tokenizer: Any, config: Any) -> Any:
    images = tf.SiglipImageProcessor(size={"height": 128, "width": 128})
    return tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(),
        images,
        tokenizer,
        image_seq_length=config.vision_soft_tokens_per_image,
    )


def _gemma4(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size}
    return tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessor(max_soft_tokens=vision.default_output_length, **sizes),
        tokenizer,
        tf.Gemma4VideoProcessor(do_sample_frames=False, **sizes),
        image_seq_length=vision.default_output_length,
    )


def _idefics3(tokenizer: Any, config: Any) -> Any:
    side = config.vision_config.image_size
    images = tf.Idefics3ImageProcessor(
        size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}
    )
    tokens = (side // config.vision_config.patch_size // config.scale_factor) ** 2
    return tf.Idefics3Processor(images, tokenizer, image_seq_len=tokens)


def _smolvlm(tokenizer: Any, config: Any) -> Any:
    side = config.vision_config.image_size
    sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    tokens = (side // config.vision_config.patch_size // config.scale_factor) ** 2
    return tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**sizes),
        tokenizer,
        tf.SmolVLMVideoProcessor(**sizes),
        image_seq_len=tokens,
    )


def _cohere2_vision(tokenizer: Any, config: Any) -> Any:
    side = config.vision_config.image_size
    images = tf.Cohere2VisionImageProcessor(
        size=_square(config),
        max_patches=_TILES,
        patch_size=side // config.vision_config.patch_size // config.downsample_factor,
    )
    return tf.Cohere2VisionProcessor(images, tokenizer)


def _llama4(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    images = tf.Llama4ImageProcessor(size=_square(config), max_patches=_TILES)
    return tf.Llama4Processor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
    )


def _lfm2_vl(tokenizer: Any, config: Any) -> Any:
    images = tf.Lfm2VlImageProcessor(
        encoder_patch_size=config.vision_config.patch_size,
        downsample_factor=config.downsample_factor,
        tile_size=32,
        min_tiles=2,
        max_tiles=_TILES,
        min_image_tokens=9,
        max_image_tokens=24,
        max_num_patches=96,
        max_pixels_tolerance=1.5,
        do_image_splitting=True,
        use_thumbnail=True,
    )
    return tf.Lfm2VlProcessor(images, tokenizer)


def _mistral3(tokenizer: Any, config: Any) -> Any:
    patch, merged = config.vision_config.patch_size, getattr(config, "spatial_merge_size", 1)
    images = tf.PixtralImageProcessor(
        size={"longest_edge": config.vision_config.image_size},
        patch_size={"height": patch * merged, "width": patch * merged},
    )
    return tf.PixtralProcessor(images, tokenizer, patch_size=patch, spatial_merge_size=merged)


def _molmo2(tokenizer: Any, config: Any) -> Any:
    arguments = {"size": _square(config), "patch_size": config.vision_config.patch_size}
    images = tf.Molmo2ImageProcessor(max_crops=_TILES, overlap_margins=[1, 1], **arguments)
    # Three patches do not divide a frame, so that tokens at its edges have fewer.
    videos = tf.Molmo2VideoProcessor(pooling_size=[3, 3], do_sample_frames=False, **arguments)
    return tf.Molmo2Processor(images, videos, tokenizer)


_PIXTRAL = _Family(
    tokens=("[IMG]", "<|video|>", "[IMG_BREAK]", "[IMG_END]"),
    image="[IMG]",
    processor=_mistral3,
    begins=True,
)


def _more(*texts: str) -> dict[int, str]:
    """Return special tokens behind all others, by id."""
    return dict(enumerate(texts, _VOCABULARY))


_IDEFICS3 = _Family(
    tokens=("<image>", "<|video|>", "<fake_token_around_image>", "<end_of_utterance>"),
    image="<image>",
    processor=_idefics3,
    begins=True,
    more=_more(
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        "\n",
    ),
)

_INTERNVL = _Family(
    tokens=("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    image="<IMG_CONTEXT>",
    video="<video>",
    processor=_internvl,
    changes={
        "tie_word_embeddings": False,
        # The original format has no norm after the last layer.
        "vision_config": {"use_mean_pooling": True},
    },
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)


_QWEN3 = _qwen(
    "Qwen3VLProcessor",
    "Qwen3VLVideoProcessor",
    "out_hidden_size",
    mrope_section=[6, 5, 5],
    # transformers interleaves whatever the config says, vLLM when it says so.
    mrope_interleaved=True,
)


_QWEN3_5 = _qwen(
    "Qwen3VLProcessor",
    "Qwen3VLVideoProcessor",
    "out_hidden_size",
    mrope_section=[3, 3, 2],
    mrope_interleaved=True,
    partial_rotary_factor=0.5,
)
_QWEN3_5 = replace(
    _QWEN3_5,
    changes={
        **_QWEN3_5.changes,
        "text_config": {
            **_QWEN3_5.changes["text_config"],
            # The only ones that vLLM's layers of linear attention take on a CPU.
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    },
    dtype="bfloat16",
)


def _glm(processor: str, images: str, videos: str, **text: Any) -> _Family:
    def make(tokenizer: Any, config: Any) -> Any:
        vision = config.vision_config
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        arguments = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        size = {"shortest_edge": 8 * token, "longest_edge": 1024 * token}
        return getattr(tf, processor)(
            getattr(tf, images)(size=size, **arguments),
            tokenizer,
            getattr(tf, videos)(size=size, **arguments),
        )

    rope = {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
    return _Family(
        tokens=("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
        processor=make,
        more={190: "<|begin_of_video|>", 191: "<|end_of_video|>"},
        changes={
            "video_start_token_id": 190,
            "video_end_token_id": 191,
            "text_config": {"rope_parameters": rope, **text},
            "vision_config": {"out_hidden_size": _TEXT["hidden_size"]},
        },
    )


_GLM4V = _glm(
    "Glm4vProcessor",
    "Glm4vImageProcessor",
    "Glm4vVideoProcessor",
    attention_bias=True,  # vLLM reads what published configs say; transformers always has one
)
_GLM_OCR = _glm(
    "Glm46VProcessor",
    "Glm46VImageProcessor",
    "Glm46VVideoProcessor",
    # transformers has the projector three times as wide as the model, and vLLM as wide as this.
    intermediate_size=3 * _TEXT["hidden_size"],
)


def _paddleocr_vl(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    images = tf.PaddleOCRVLImageProcessor(
        size={"shortest_edge": 4 * token, "longest_edge": 512 * token},
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
    )
    return tf.PaddleOCRVLProcessor(images, tokenizer)


def _minicpm(release: str, **changes: Any) -> _Family:
    def make(tokenizer: Any, config: Any) -> Any:
        # Images of more pixels than 48 x 48 are sliced.
        sizes = {"scale_resolution": 48, "patch_size": config.vision_config.patch_size}
        return getattr(tf, f"MiniCPMV{release}Processor")(
            image_processor=tf.MiniCPMV4_6ImageProcessor(max_slice_nums=_TILES, **sizes),
            tokenizer=tokenizer,
            video_processor=tf.MiniCPMV4_6VideoProcessor(max_slice_nums=1, **sizes),
        )

    marks = ("<slice>", "</slice>", "<image_id>", "</image_id>", "\n")
    image, video, start, end = tokens = ("<|image_pad|>", "<|video_pad|>", "<image>", "</image>")
    return _Family(
        tokens=tokens,
        image=image,
        video=video,
        processor=make,
        changes={"text_config": _QWEN3_5.changes["text_config"], **changes},
        named={
            **{"image_token": image, "video_token": video},
            **{"image_start_token": start, "image_end_token": end},
            **{"slice_start_token": marks[0], "slice_end_token": marks[1]},
            **{"image_id_start_token": marks[2], "image_id_end_token": marks[3]},
        },
        more=_more(*marks),
        dtype="bfloat16",
    )


_KIMI_PIXELS: dict[str, Any] = {
    "patch_size": 4,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


_KIMI_CHUNKS: dict[str, Any] = {
    "media_proc_cfg": {
        **_KIMI_PIXELS,
        "merge_kernel_size": 2,
        "temporal_merge_kernel_size": 4,
        "in_patch_limit": 1024,
        "in_patch_limit_each_frame": 1024,
        "in_patch_limit_video": None,
        "patch_limit_on_one_side": 32,
        "fixed_output_tokens": None,
    }
}
"""How vLLM's own processor of images, and of the chunks of videos, wants to be told."""


def _kimi_k25(tokenizer: Any, config: Any) -> Any:
    # No image is as large as 128 x 128, so none is resized, which the engines do differently.
    sizes = {**_KIMI_PIXELS, "merge_size": 2, "size": {"max_height": 32, "max_width": 32}}
    return tf.Kimi_K25Processor(
        image_processor=tf.Kimi_K25ImageProcessor(max_patches=1024, **sizes),
        tokenizer=tokenizer,
        video_processor=tf.Kimi_K25VideoProcessor(
            max_patches=1024, do_sample_frames=False, **sizes
        ),
    )


_KIMI_K25 = _Family(
    tokens=(
        "<|media_pad|>",
        "<|kimi_k25_video_placeholder|>",
        "<|media_begin|>",
        "<|media_end|>",
    ),
    image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
    video="<|kimi_k25_video_placeholder|>",
    processor=_kimi_k25,
    more=_more("<|media_content|>"),
    changes={
        "text_config": {
            # The only latent states that vLLM's layers take on a CPU.
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "qk_head_dim": 96,
            "head_dim": 64,
            "num_key_value_heads": 2,
            # What published configs say; transformers does not ask.
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        "vision_config": {"num_attention_heads": 4},
    },
    says={
        "architectures": ["KimiK25ForConditionalGeneration"],
        "use_unified_vision_chunk": True,
    },
    renamed={
        r"^language_model\.model\.blocks\.": "language_model.model.layers.",
        r"^model\.mm_projector\.": "mm_projector.",
        r"^vision_tower\.encoder\.patch_embed\.": "vision_tower.patch_embed.",
    },
)


_KIMI_VL = replace(
    _KIMI_K25,
    video=None,
    says={},
    renamed={
        **_KIMI_K25.renamed,
        r"^mm_projector\.(proj\.0|proj\.2|pre_norm)\b": lambda found: (
            "multi_modal_projector."
            + {"proj.0": "linear_1", "proj.2": "linear_2", "pre_norm": "pre_norm"}[found[1]]
        ),
    },
)
"""Its tower, its projector and its language model are those of Kimi-K2.5, named otherwise."""


_FAMILIES: dict[str, _Family] = {
    "llava": _Family(
        tokens=("<image>", "<|video|>", "<|start|>", "<|end|>"),
        image="<image>",
        processor=_llava,
        begins=True,
    ),
    "llava_next": _Family(
        tokens=("<image>", "<|video|>", "<|start|>", "<|end|>"),
        image="<image>",
        processor=_llava_next,
        begins=True,
    ),
    "llava_next_video": _Family(
        tokens=("<image>", "<video>", "<|start|>", "<|end|>"),
        image="<image>",
        video="<video>",
        processor=_llava_next_video,
        begins=True,
    ),
    "llava_onevision": _Family(
        tokens=("<image>", "<video>", "<|start|>", "<|end|>"),
        image="<image>",
        video="<video>",
        processor=_llava_onevision,
        # vLLM reads no other number than 9, whatever the config says.
        changes={"vision_aspect_ratio": "anyres_max_9"},
    ),
    "internvl": _INTERNVL,
    "internvl_chat": replace(
        _INTERNVL,
        # <image> and <video> are plain text in the original format, of several tokens.
        tokens=("<IMG_CONTEXT>", "<|video_pad|>", "<img>", "</img>"),
        image="<image>",
        named={},
    ),
    "qwen2_vl": _qwen(
        "Qwen2VLProcessor", "Qwen2VLVideoProcessor", "hidden_size", mrope_section=[4, 6, 6]
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", "out_hidden_size", mrope_section=[4, 6, 6]
    ),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": replace(
        _QWEN3_5,
        changes={
            **_QWEN3_5.changes,
            # All of them: rounding decides which of two experts that are rated alike is asked.
            "text_config": {**_QWEN3_5.changes["text_config"], "num_experts_per_tok": 4},
        },
    ),
}

_FAMILIES |= {
    "glm4v": _GLM4V,
    "glm4v_moe": replace(
        _GLM4V,
        changes={
            **_GLM4V.changes,
            # Published configs say it.
            "text_config": {**_GLM4V.changes["text_config"], "use_qk_norm": False},
        },
    ),
    "glm_ocr": _GLM_OCR,
    "paddleocr_vl": _Family(
        tokens=("<|IMAGE_PLACEHOLDER|>", "<|video|>", "<|IMAGE_START|>", "<|IMAGE_END|>"),
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        processor=_paddleocr_vl,
        changes={
            "text_config": {"rope_parameters": {"mrope_section": [4, 6, 6]}},
            # A table of one position: the engines resample larger ones differently, transformers
            # with aligned corners and vLLM without.
            "vision_config": {"image_size": 4},
        },
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "gemma3": _Family(
        tokens=("<image_soft_token>", "<|video|>", "<start_of_image>", "<end_of_image>"),
        image="<start_of_image>",
        processor=_gemma3,
        begins=True,
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        # vLLM makes one token of newlines that touch: the space between crops must be one too.
        more=_more(" ", "\n", "\n\n", "\n\n\n", "\n\n\n\n"),
    ),
    "gemma3n": _Family(
        tokens=("<image_soft_token>", "<|video|>", "<start_of_image>", "<end_of_image>"),
        image="<image_soft_token>",
        processor=_gemma3n,
        begins=True,
        # Behind all tokens: for those in a table of images or sound, which transformers looks up
        # there, vLLM takes the table of text.
        changes={
            "text_config": {"vocab_size_per_layer_input": _VOCABULARY + 8},
            "vision_config": {"vocab_offset": _VOCABULARY + 8},
            "audio_config": {"vocab_offset": _VOCABULARY + 12},
        },
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
        more=_more(
            *("<audio_soft_token>", "<start_of_audio>", "<end_of_audio>"),
            *(" ", "\n", "\n\n", "\n\n\n", "\n\n\n\n"),
        ),
    ),
    "gemma4": _Family(
        tokens=("<|image|>", "<|video|>", "<|image>", "<image|>"),
        image="<|image|>",
        video="<|video|>",
        processor=_gemma4,
        # The fewest tokens that its image processor knows; a published config says 280.
        changes={
            "vision_config": {"default_output_length": 70},
            "text_config": {"vocab_size_per_layer_input": _VOCABULARY + 3},
        },
        # vLLM leaves BOS out where there is a chat template, which says it.
        named={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        more=_more("<|audio|>", "<|audio>", "<audio|>"),
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": replace(
        _IDEFICS3,
        processor=_smolvlm,
        tokens=("<image>", "<video>", "<fake_token_around_image>", "<end_of_utterance>"),
        named={
            "image_token": "<image>",
            "video_token": "<video>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    ),
    "lfm2_vl": _Family(
        tokens=("<image>", "<|video|>", "<|image_start|>", "<|image_end|>"),
        image="<image>",
        processor=_lfm2_vl,
        changes={
            # What published configs say and transformers does not ask for.
            "text_config": {
                "architectures": ["Lfm2ForCausalLM"],
                "conv_dim": _TEXT["hidden_size"],
                "block_dim": _TEXT["hidden_size"],
            }
        },
        more=_more(
            "<|img_thumbnail|>",
            *(
                f"<|img_row_{row}_col_{column}|>"
                for row in range(1, _TILES + 1)
                for column in range(1, _TILES + 1)
            ),
        ),
    ),
    "cohere2_vision": _Family(
        tokens=("<|IMG_PATCH|>", "<|video|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"),
        image="<|IMG_PATCH|>",
        processor=_cohere2_vision,
        changes={"text_config": {"architectures": ["Cohere2ForCausalLM"]}},
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        more=_more("<|IMG_LINE_BREAK|>"),
    ),
    "llama4": _Family(
        tokens=("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>"),
        image="<|image|>",
        processor=_llama4,
        begins=True,
        # Shorter than most prompts; vLLM wants whole blocks of its cache.
        changes={"text_config": {"attention_chunk_size": 64}},
        more=_more("<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    ),
    "mistral3": replace(
        _PIXTRAL, changes={"text_config": {"architectures": ["MistralForCausalLM"]}}
    ),
    "pixtral": _PIXTRAL,
    "kimi_k25": _KIMI_K25,
    "kimi_vl": _KIMI_VL,
    "minicpmv4_6": _minicpm("4_6"),
    "minicpmv4_7": _minicpm(
        "4_7",
        # What published configs say for vLLM; transformers does not ask.
        mrope_mode="canvas",
        slice_start_id=_VOCABULARY,
        slice_end_id=_VOCABULARY + 1,
        newline_id=_VOCABULARY + 4,
    ),
}

if "molmo2" in TINY:  # since transformers 5.20
    _FAMILIES["molmo2"] = _Family(
        tokens=("<im_patch>", "<|video|>", "<im_start>", "<im_end>"),
        image=molmo.MARKS[0],
        video="<|video|>",
        processor=_molmo2,
        opening="<s>",
        changes={
            **molmo.mark_ids(_VOCABULARY),
            "adapter_config": {"text_hidden_size": _TEXT["hidden_size"]},
        },
        more=_more(*molmo.MARKS),
    )

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Every family that can be saved."""

CALLED_WITH: dict[str, dict[str, Any]] = {
    # The processor takes these from the call alone, whatever its folder says.
    "gemma3": {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 2,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
}
"""What both engines call a family's processor with."""

VIDEOS: tuple[str, ...] = tuple(name for name, family in _FAMILIES.items() if family.video)
"""Those that take videos."""


VIDEOS_ALONE: tuple[str, ...] = ("llava_next_video",)
"""Those of which vLLM takes videos alone, one in a prompt."""


def _vipllava() -> Any:
    return tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TINY["llava"].build().vision_config.to_dict()),
        text_config=tf.LlamaConfig(**TINY["llava"].build().text_config.to_dict()),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )


_OTHERS: dict[str, tuple[Tiny, _Family]] = {
    # vLLM has no class for it, and runs that of transformers.
    "vipllava": (Tiny(_vipllava, tf.VipLlavaForConditionalGeneration), _FAMILIES["llava"]),
    # Of a plugin of somebody else: tests/vllm/plugin.
    "own_llava": (TINY["llava"], _FAMILIES["llava"]),
    "own_llava_next": (TINY["llava_next"], _FAMILIES["llava_next"]),
    "own_vl": (TINY["qwen2_vl"], _FAMILIES["qwen2_vl"]),
    "interns1": (TINY["internvl"], replace(_INTERNVL, processor=_internvl_whole)),
    "skywork_chat": (TINY["internvl"], _FAMILIES["internvl_chat"]),
    "h2ovl_chat": (TINY["internvl"], _FAMILIES["internvl_chat"]),
    **{name: (other.tiny(name), _Family(**other.folder)) for name, other in OTHER_TYPES.items()},
}

_ONE_TILE = {"max_dynamic_patch": 1}

LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    name: (known, {"model_type": name, "architectures": [architecture], **more})
    for name, known, architecture, more in (
        ("own_llava", "llava", "OwnLlava", {}),
        ("own_llava_next", "llava_next", "OwnNext", {}),
        ("own_vl", "qwen2_vl", "OwnVL", {}),
        ("skywork_chat", "internvl_chat", "SkyworkR1VChatModel", _ONE_TILE),
        ("h2ovl_chat", "internvl_chat", "H2OVLChatModel", {**_ONE_TILE, "use_msac": False}),
    )
}
LIKE["interns1"] = ("internvl", {"architectures": ["InternS1ForConditionalGeneration"]})
"""Type -> family that has its weights, and what its config says otherwise."""

CHATS = ("internvl_chat", "skywork_chat", "h2ovl_chat")
"""Types in the original format of InternVL."""

TRUSTED = (
    *CHATS,
    "molmo2",
    "kimi_vl",
    *(name for name, other in OTHER_TYPES.items() if other.publish is not None),
)
"""Types that vLLM loads with ``trust_remote_code``."""

OTHERS: tuple[str, ...] = tuple(_OTHERS)
"""Types of no family, which can be saved too."""

_RULES = (
    _FAMILIES
    | {name: rules for name, (_, rules) in _OTHERS.items()}
    | {name: _Family(**only.folder) for name, only in ONLY_VLLM.items()}
)
_TINY = TINY | {name: tiny for name, (tiny, _) in _OTHERS.items()}

DTYPES: dict[str, str] = {name: rules.dtype for name, rules in _RULES.items()}
"""In which each is saved, and both engines calculate."""


def save(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random checkpoint that both engines load.

    Parameters
    ----------
    family
        One of FAMILIES. ``internvl_chat`` is the original format of InternVL, made of the same
        weights as ``internvl``; transformers has no class for it, and vLLM loads its config
        through the Python file in the folder, so it has to be started with
        ``trust_remote_code=True``.
    folder
        Where to write; made if it is not there.
    seed
        Of the weights.
    changes
        Attributes of the config. A dict changes those of the config of that name:
        ``text_config={"max_position_embeddings": 4096}``.

    Returns
    -------
    Path
        The folder.
    """
    rules = _RULES[family]
    tiny = _TINY[_in_transformers(family)]

    vocabulary = max(_VOCABULARY, *(index + 1 for index in (0, *rules.more)))
    more = {"vocab_size": vocabulary}

    def build() -> Any:
        config = tiny.build()
        # Those of other types come as wide as they have to be.
        wide = {} if family in OTHER_TYPES else {"text_config": _TEXT | more}
        for change in (wide, rules.changes, changes):
            _change(config, change)
        return config

    model = replace(tiny, build=build).model(seed).to(getattr(torch, rules.dtype))
    model.generation_config.suppress_tokens = sorted(set(range(vocabulary)) - set(WORDS))
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tokenizer = _tokenizer(rules)
    if family in CHATS:
        save_file(dict(_original(load_file(weights))), weights, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_original_config(model.config), indent=2))
        code = _CONFIGURATION.replace('"internvl_chat"', f'"{family}"')
        (folder / "configuration_internvl_chat.py").write_text(code)
        tokenizer.save_pretrained(folder)
    else:
        if family == "qwen3_vl_moe":
            # transformers keeps experts turned over against the published checkpoints, which are
            # what vLLM reads; it turns them back by their shape.
            turned = {
                name: tensor.mT.contiguous() if ".experts." in name else tensor
                for name, tensor in load_file(weights).items()
            }
            save_file(turned, weights, {"format": "pt"})
        if "llava" in family or family in ("gemma3", "lfm2_vl", "cohere2_vision"):
            # transformers leaves a part of the name out that vLLM, like the published
            # checkpoints, has.
            named = {
                re.sub(r"\bvision_tower\.", "vision_tower.vision_model.", name): tensor
                for name, tensor in load_file(weights).items()
            }
            save_file(named, weights, {"format": "pt"})
        tensors = load_file(weights)
        for pattern, name in rules.renamed.items():
            tensors = {re.sub(pattern, name, own): tensor for own, tensor in tensors.items()}
        save_file(tensors, weights, {"format": "pt"})
        if family in OTHER_TYPES:
            OTHER_TYPES[family].place(folder, weights)
        processor = rules.processor(tokenizer, model.config)
        processor.chat_template = tokenizer.chat_template
        processor.save_pretrained(folder)
        if family == "kimi_k25":
            # One file for transformers' processor of images and vLLM's.
            parts = json.loads((folder / "processor_config.json").read_text())
            images = parts.pop("image_processor")
            (folder / "processor_config.json").write_text(json.dumps(parts))
            (folder / "preprocessor_config.json").write_text(json.dumps(images | _KIMI_CHUNKS))
    if family in OTHER_TYPES:
        OTHER_TYPES[family].finish(folder)
    if family == "molmo2":
        molmo.publish(folder)
    if family == "kimi_vl":
        _write_kimi_vl(folder)
    says = rules.says | (LIKE[family][1] if family in LIKE else {})
    if says:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | says))
    return folder


def save_without_weights(name: str, folder: Path) -> Path:
    """Write the folder of one of `ONLY_VLLM`, and return it."""
    rules = _RULES[name]
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(rules)
    tokenizer.save_pretrained(folder)
    if rules.processor is not None:
        config: Any = ONLY_VLLM[name].config
        processor = rules.processor(tokenizer, config() if callable(config) else config)
        processor.save_pretrained(folder)
    for file, content in ONLY_VLLM[name].files().items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (folder / file).write_text(text)
    return folder


def _change(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        # Gemma 4's config refuses to be asked for what its layers may have each in its own way.
        before = vars(config).get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            setattr(config, name, before | value)
        elif isinstance(value, dict) and before is not None:
            _change(before, value)
        else:
            setattr(config, name, value)


def _in_transformers(family: str) -> str:
    if family == "kimi_vl":
        return "kimi_k25"
    return "internvl" if family in CHATS else family


def _tokenizer(family: _Family) -> Any:
    """Return a tokenizer of whole words (``w3`` to ``w89``), special tokens and characters.

    Whatever is no word is split into characters, so that the times and frame numbers that
    processors write into prompts are several tokens. Spaces and newlines are dropped.
    """
    special = {PAD: "<pad>", EOS: "</s>", BOS: "<s>", _UNKNOWN: "<unk>"}
    special.update(zip((IMAGE, VIDEO, START, END), family.tokens, strict=True))
    texts = {index: f"w{index}" for index in WORDS} | special
    characters = string.digits + string.ascii_letters + string.punctuation
    texts.update(enumerate(characters, _CHARACTERS))
    texts |= family.more
    vocabulary = {text: index for index, text in texts.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[_UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"w[0-9]+|\S"), behavior="isolated"),
        ]
    )
    tokenizer.add_special_tokens([*special.values(), *family.more.values()])
    if family.begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    # Chats are tokenized without BOS, so the template has to say it.
    template = (
        ("{{ bos_token }}" if family.begins else "")
        + "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        + family.image
        + "{% elif part.type == 'video' %}"
        + (family.video or "")
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[PAD],
        eos_token=special[EOS],
        bos_token=special[BOS],
        unk_token=special[_UNKNOWN],
        extra_special_tokens=family.named or [*family.tokens, *family.more.values()],
        chat_template=template,
    )


_CONFIGURATION = """\
from transformers import PretrainedConfig, Qwen2Config


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**kwargs)
"""


def _original_config(config: Any) -> dict[str, Any]:
    """Return InternVL's config in the original format."""
    vision, size = config.vision_config, _square(config)["height"]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": size,
        "max_dynamic_patch": _TILES,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "use_thumbnail": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "llm_config": {**config.text_config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": size,
            "patch_size": vision.patch_size[0],
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "initializer_factor": 1.0,
        },
    }


_KIMI_VL_PROCESSOR = """\
from transformers import Kimi_K25Processor


class KimiVLProcessor(Kimi_K25Processor):
    def __init__(
        self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None
    ):
        super().__init__(image_processor, tokenizer, video_processor, chat_template)
        images = self.image_processor
        images.merge_kernel_size = [images.merge_size, images.merge_size]
        images.in_token_limit = images.max_patches

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        if "image_grid_thw" in inputs:
            inputs["image_grid_hws"] = inputs.pop("image_grid_thw")[:, 1:]
        return inputs
"""


def _write_kimi_vl(folder: Path) -> None:
    """Make a Kimi-VL of a Kimi-K2.5 in a folder; its processor is code of its checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    vision |= {
        "model_type": "moonvit",
        "init_pos_emb_height": vision["pos_emb_height"],
        "init_pos_emb_width": vision["pos_emb_width"],
    }
    own = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "media_placeholder_token_id": IMAGE,
        "text_config": config["text_config"],
        "vision_config": vision,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "processing_kimi_vl.py").write_text(_KIMI_VL_PROCESSOR)
    path = folder / "processor_config.json"
    processor = json.loads(path.read_text()) | {
        "processor_class": "KimiVLProcessor",
        "auto_map": {"AutoProcessor": "processing_kimi_vl.KimiVLProcessor"},
    }
    path.write_text(json.dumps(processor))


_ORIGINAL = {
    "vision_tower": "vision_model",
    "cls_token": "class_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding",
    "encoder.layer": "encoder.layers",
    "attention.projection_layer": "attn.proj",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}


def _original(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield InternVL's weights under their names in the original format."""
    for name, tensor in tensors.items():
        if re.search(r"attention\.[kv]_proj", name):
            continue  # comes with the query
        if "attention.q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        if not name.startswith("language_model."):
            for ours, original in _ORIGINAL.items():
                name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{original}", name)
        yield name, tensor


def image(number: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return an image of coloured squares with some noise, always the same for a number.

    Parameters
    ----------
    number
        Which image.
    size
        Width and height in pixels.
    """
    return Image.fromarray(_pixels(np.random.default_rng([0, number]), size))


def video(number: int, frames: int = 4, size: tuple[int, int] = (48, 32)) -> NDArray[np.uint8]:
    """Return a video of unrelated frames, always the same for a number.

    Parameters
    ----------
    number
        Which video.
    frames
        Their number.
    size
        Width and height in pixels.

    Returns
    -------
    numpy.ndarray
        uint8 [T, H, W, 3].
    """
    generator = np.random.default_rng([1, number])
    return np.stack([_pixels(generator, size) for _ in range(frames)])


def _pixels(generator: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    width, height = size
    squares = generator.integers(0, 224, (-(-height // 8), -(-width // 8), 3))
    colours = squares.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return (colours + generator.integers(0, 32, (height, width, 3))).astype(np.uint8)


def sound(number: int, seconds: float = 0.5, rate: int = 16000) -> NDArray[np.float32]:
    """Return noise, always the same for a number: float32 [seconds * rate]."""
    generator = np.random.default_rng([2, number])
    return generator.normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def prompt(family: str, kinds: str, words: int = 3) -> str:
    """Return the text of a prompt, its placeholders not yet expanded.

    Both engines take the same text. Only ``internvl_chat`` has one that transformers does not
    know: there it is the text of ``internvl``, and the tokens come out the same.

    Parameters
    ----------
    family
        One of FAMILIES.
    kinds
        ``i`` an image, ``v`` a video, ``a`` a sound, ``t`` a few words, each ``t`` other words.
    words
        How many words each ``t`` stands for.
    """
    rules = _RULES[family]
    parts: list[str] = [rules.opening] if rules.opening else []
    for kind in kinds:
        if kind == "t":
            start = sum(part.startswith("w") for part in parts) + 7
            parts += [f"w{WORDS[(start + word) % len(WORDS)]}" for word in range(words)]
        elif kind == "i":
            parts.append(rules.image)
        elif kind == "a" and rules.audio is not None:
            parts.append(rules.audio)
        elif rules.video is None:
            raise ValueError(f"{family} takes no videos")
        else:
            parts.append(rules.video)
    return " ".join(parts)


def metadata(frames: int) -> dict[str, Any]:
    """Return what vLLM and transformers want to know about a video of which they get all frames.

    Qwen2.5-VL reads the seconds per step from it and Qwen3-VL the time of each frame; vLLM
    refuses their videos without. The other families ignore it.
    """
    return {
        "fps": FPS,
        "duration": frames / FPS,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }


def vllm_request(
    family: str,
    kinds: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[NDArray[np.uint8]] = (),
    words: int = 3,
) -> dict[str, Any]:
    """Return a request for ``vllm.LLM.generate``.

    Parameters
    ----------
    family, kinds, words
        See `prompt`.
    images, videos
        As many as `kinds` has.
    """
    if family == "kimi_k25":
        return _kimi_request(prompt(family, kinds, words), kinds, images, videos)
    media: dict[str, Any] = {}
    if images:
        media["image"] = list(images)
    if videos:
        # do_sample_frames is vLLM's own key: these are all the frames, draw none from them.
        media["video"] = [
            (frames, {**metadata(len(frames)), "do_sample_frames": False}) for frames in videos
        ]
    return {"prompt": prompt(family, kinds, words), "multi_modal_data": media}


def _kimi_request(
    text: str, kinds: str, images: Sequence[Image.Image], videos: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Return a request with images, and videos of one chunk each, in the order of the prompt."""
    of_kind: dict[str, Iterator[dict[str, Any]]] = {
        "i": ({"type": "image", "image": one, "uuid": None} for one in images),
        "v": (
            {
                "type": "video_chunk",
                "video_chunk": list(map(Image.fromarray, frames)),
                "uuid": None,
                "prompt": "",
                "video_idx": number,
            }
            for number, frames in enumerate(videos)
        ),
    }
    chunks = [next(of_kind[kind]) for kind in kinds if kind in of_kind]
    chunk = f"00:00:00.000{_KIMI_K25.image.replace('image', 'video')}"
    text = text.replace(str(_KIMI_K25.video), chunk)
    return {"prompt": text, "multi_modal_data": {"vision_chunk": chunks} if chunks else {}}


def hf_processor(family: str, folder: Path) -> Any:
    """Return transformers' processor of a folder.

    For ``internvl_chat`` it is that of an ``internvl`` folder, with images resized by PIL as vLLM
    does it there: torchvision rounds some pixels otherwise.
    """
    processor = tf.AutoProcessor.from_pretrained(folder)
    if family == "internvl_chat":
        processor.image_processor = tf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def hf_inputs(
    family: str,
    processor: Any,
    kinds: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[NDArray[np.uint8]] = (),
    words: int = 3,
    called_with: dict[str, Any] | None = None,
) -> Any:
    """Return the same request as inputs of the transformers model.

    Parameters
    ----------
    family, kinds, words
        See `prompt`.
    processor
        What `hf_processor` returns, or the folder.
    images, videos
        As many as `kinds` has.
    called_with
        What else the processor is called with.

    Returns
    -------
    transformers.BatchFeature
        A batch of one.
    """
    if isinstance(processor, Path):
        processor = hf_processor(family, processor)
    arguments: dict[str, Any] = {}
    if images:
        # Not a list per prompt: from that LLaVA-OneVision sees that images share one and crops
        # none of them, whereas vLLM crops each as if it were alone.
        arguments["images"] = list(images)
    if videos:
        arguments["videos"] = list(videos)
        arguments["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [metadata(len(frames)) for frames in videos],
        }
    text = prompt(_in_transformers(family), kinds, words)
    arguments.update(CALLED_WITH.get(family, {}) if images else {})
    arguments |= called_with or {}
    if family in OTHER_TYPES:
        arguments |= OTHER_TYPES[family].called_with
        for in_vllm, here in OTHER_TYPES[family].spelled.items():
            text = text.replace(in_vllm, here)
    inputs = processor(text=[text], return_tensors="pt", **arguments)
    if family in ("idefics3", "smolvlm") and images:
        inputs["video_frames"] = [1] * inputs["pixel_values"].shape[1]  # tiles, and no video's
    if family.startswith("internvl"):
        # transformers gives this model a video as images; it has to be told.
        own_images, own_videos = iter(images), iter(videos)
        inputs["video_frames"] = []
        for kind in kinds:
            if kind == "i":
                tiles = processor.image_processor([next(own_images)], return_tensors="pt")
                inputs["video_frames"] += [1] * len(tiles["pixel_values"])
            elif kind == "v":
                inputs["video_frames"].append(len(next(own_videos)))
    return inputs
