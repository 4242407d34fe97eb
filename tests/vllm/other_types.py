"""Types of transformers that are of no family, as folders that both engines load.

Configs and weights are those of ``tests/hf/type_table.py``, a little wider; what is added for each
type is its processor. `tests.vllm.checkpoints` writes the folders.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from safetensors.torch import load_file, save_file

from tests.hf import small_configs, types
from tests.hf.models import END, START, Tiny
from tests.hf.type_table import TYPES
from tests.vllm import ernie

tf: Any = transformers  # its classes are not typed

WIDTH = 64

_WIDE: dict[str, Any] = {
    "vocab_size": 192,
    # vLLM's attention on a CPU takes heads of 32, 64, 80 ... and no smaller ones.
    "hidden_size": WIDTH,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    **dict.fromkeys(
        (
            "out_hidden_size",
            "text_hidden_size",
            "projection_dim",
            "projector_hidden_size",
            "projection_hidden_size",
        ),
        WIDTH,
    ),
}
"""`tests.hf.small_configs.SMALL`, where vLLM needs other numbers."""

MORE = (190, 191)
"""Token ids that are free for further special tokens."""


@contextmanager
def _wide() -> Iterator[None]:
    with mock.patch.dict(small_configs.SMALL, _WIDE):
        yield


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` on top, dicts inside dicts merged alike."""
    both = {
        name: merged(under[name], value)
        for name, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(name), dict)
    }
    return {**under, **over, **both}


@dataclasses.dataclass(frozen=True)
class OtherType:
    """What is particular to a type: see `tests.vllm.checkpoints` for what is not said here.

    Attributes
    ----------
    folder
        How its folder and prompts differ, as arguments of a family's.
    over
        Fields of its config, on top of those of `TYPES`.
    called_with
        What transformers' processor has to be told in a call.
    renamed
        Patterns of names of weights, and what published checkpoints, which vLLM reads, say.
    copied_to
        The folder inside in which vLLM looks for weights.
    architecture
        What vLLM calls it, where that is not the name of transformers' class.
    publish
        Lets a folder that transformers saved be as a published one, whose code vLLM is told to
        trust.
    spelled
        What vLLM calls in a prompt, and transformers' processor otherwise.
    served_with
        Settings of the engine.
    """

    folder: dict[str, Any]
    over: dict[str, Any] = dataclasses.field(default_factory=dict)
    called_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    copied_to: str | None = None
    architecture: str | None = None
    publish: Callable[[Path], None] | None = None
    spelled: dict[str, str] = dataclasses.field(default_factory=dict)
    served_with: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tiny(self, kind: str) -> Tiny:
        """Return how its model is made."""

        def build() -> Any:
            with _wide():
                return small_configs.small_config(kind, merged(TYPES[kind].over, self.over))

        return Tiny(build, types.architecture_of(kind))

    def place(self, folder: Path, weights: Path) -> None:
        """Give weights the names, and the place, in which vLLM looks for them."""
        tensors = load_file(weights)
        for pattern, name in self.renamed.items():
            tensors = {re.sub(pattern, name, own): tensor for own, tensor in tensors.items()}
        if self.architecture is not None:
            config = json.loads((folder / "config.json").read_text())
            config["architectures"] = [self.architecture]
            (folder / "config.json").write_text(json.dumps(config))
        if self.copied_to is not None:
            (folder / self.copied_to).mkdir()
            weights = folder / self.copied_to / weights.name
        if self.renamed or self.copied_to is not None:
            save_file(tensors, weights, {"format": "pt"})

    def finish(self, folder: Path) -> None:
        """Do what has to be done once all files are there."""
        if self.publish is not None:
            self.publish(folder)


def _folder(
    processor: Callable[[Any, Any], Any],
    image: str,
    tokens: tuple[str, str, str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return what a family's folder is made with; by default `image` is the placeholder itself."""
    tokens = tokens or (image, "<|video|>", "<|start|>", "<|end|>")
    return {"processor": processor, "image": image, "tokens": tokens, **more}


# Packed patches of any size ----------------------------------------------------------------------


def grids(
    name: str, images: str = "Qwen2VL", videos: str = "Qwen2VL", *, video: Any = None, **more: Any
) -> Callable[[Any, Any], Any]:
    """Return what makes the processor `name` with image and video processors of these names."""

    def make(tokenizer: Any, config: Any) -> Any:
        vision = config.vision_config
        merge = getattr(vision, "spatial_merge_size", 2)
        token = (vision.patch_size * merge) ** 2
        arguments = {
            "size": {"shortest_edge": 4 * token, "longest_edge": 256 * token},
            "patch_size": vision.patch_size,
            "temporal_patch_size": getattr(vision, "temporal_patch_size", 1),
            "merge_size": merge,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            **more,
        }
        return getattr(tf, f"{name}Processor")(
            image_processor=getattr(tf, f"{images}ImageProcessor")(**arguments),
            tokenizer=tokenizer,
            video_processor=getattr(tf, f"{videos}VideoProcessor")(
                **{**arguments, **(video or {})}
            ),
        )

    return make


PADS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
ONE_PAD = "<|vision_start|><|image_pad|><|vision_end|>"


# Images of one size ------------------------------------------------------------------------------


def _size(config: Any) -> dict[str, int]:
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    return {"height": side, "width": side}


_TOWER = {r"^(model\.)?vision_tower\.": r"\1vision_tower.vision_model."}
"""transformers leaves a part of the name out that vLLM, like the published checkpoints, has."""


def _aria(tokenizer: Any, config: Any) -> Any:
    side = config.vision_config.image_size  # one of two that it knows
    images = tf.AriaImageProcessor(max_image_size=side, min_image_size=side, split_image=False)
    return tf.AriaProcessor(images, tokenizer, size_conversion={side: 16})


def _ernie(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    size = {"shortest_edge": 4 * token, "longest_edge": 256 * token}
    images = tf.Ernie4_5_VLMoeImageProcessor(size=size, patch_size=vision.patch_size)
    videos = tf.Ernie4_5_VLMoeVideoProcessor(
        size=size, patch_size=vision.patch_size, draw_on_frames=False
    )
    return tf.Ernie4_5_VLMoeProcessor(images, tokenizer, videos)


def _aya_vision(tokenizer: Any, config: Any) -> Any:
    images = tf.GotOcr2ImageProcessor(
        size=_size(config), crop_to_patches=True, min_patches=1, max_patches=1
    )
    vision = config.vision_config
    return tf.AyaVisionProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        img_size=vision.image_size,
        downsample_factor=config.downsample_factor,
    )


def _lighton_ocr(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    patch = {"height": vision.patch_size, "width": vision.patch_size}
    images = tf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch)
    return tf.LightOnOcrProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        spatial_merge_size=config.spatial_merge_size,
    )


def _gemma4_unified(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size}
    return tf.Gemma4UnifiedProcessor(
        tf.Gemma4UnifiedAudioFeatureExtractor(),
        tf.Gemma4UnifiedImageProcessor(max_soft_tokens=vision.num_soft_tokens, **sizes),
        tokenizer,
        tf.Gemma4UnifiedVideoProcessor(do_sample_frames=False, **sizes),
        image_seq_length=vision.num_soft_tokens,
    )


def _paligemma(tokenizer: Any, config: Any) -> Any:
    images = tf.SiglipImageProcessor(size=_size(config))
    side = config.vision_config.image_size // config.vision_config.patch_size
    images.image_seq_length = side**2
    return tf.PaliGemmaProcessor(images, tokenizer)


def _granite4_vision(tokenizer: Any, config: Any) -> Any:
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return tf.Granite4VisionProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        downsample_rate=config.downsample_rate,
    )


def _perception_lm(tokenizer: Any, config: Any) -> Any:
    vision = config.vision_config.model_args
    (side, _), patch = vision["img_size"], vision["patch_size"]
    # One tile: in transformers every tile of an unknown model is an item of its own.
    images = tf.PerceptionLMImageProcessor(
        tile_size=side, max_num_tiles=1, vision_input_type="vanilla"
    )
    videos = tf.PerceptionLMVideoProcessor(size={"height": side, "width": side})
    return tf.PerceptionLMProcessor(
        videos, images, tokenizer, patch, pooling_ratio=config.projector_pooling_ratio
    )


ONE_IMAGE = ("video_llama_3",)
"""Types of which vLLM runs one image at a time: it hands the encoder what is said of all images
together with the pixels of one."""

OTHER_TYPES: dict[str, OtherType] = {
    "cosmos3_omni": OtherType(
        _folder(grids("Qwen3VL", videos="Qwen3VL"), ONE_PAD, PADS),
        {
            "text_config": {
                # transformers interleaves whatever the config says, vLLM when it says so.
                "rope_parameters": {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
            }
        },
        renamed={r"^model\.(language_model|visual)\.": ""},
        copied_to="transformer",
        architecture="Cosmos3ForConditionalGeneration",
    ),
    "hyperclovax_vision_v2": OtherType(_folder(grids("HyperCLOVAXVisionV2"), ONE_PAD, PADS)),
    "video_llama_3": OtherType(
        _folder(grids("VideoLlama3", "VideoLlama3", "VideoLlama3"), ONE_PAD, PADS)
    ),
    "glmga": OtherType(
        _folder(
            grids("Glm46V", "Glm46V", "Glm46V"),
            "<|begin_of_image|><|image|><|end_of_image|>",
            ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
            more=dict(zip(MORE, ("<|begin_of_video|>", "<|end_of_video|>"), strict=True)),
        ),
        {
            "text_config": {
                "rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
            }
        },
    ),
    "aya_vision": OtherType(
        _folder(
            _aya_vision,
            "<image>",
            ("<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"),
            more=dict(zip(MORE, ("TILE", "TILE_GLOBAL"), strict=True)),
        )
    ),
    "lighton_ocr": OtherType(
        _folder(
            _lighton_ocr,
            "<image>",
            ("<image>", "<|video|>", "<break>", "<end>"),
            named={
                "image_token": "<image>",
                "image_break_token": "<break>",
                "image_end_token": "<end>",
            },
        )
    ),
    "granite4_vision": OtherType(
        _folder(_granite4_vision, "<image>"),
        {"qformer_config": {"intermediate_size": 3072, "num_hidden_layers": 1}},
        renamed=_TOWER,
    ),
    "gemma4_unified": OtherType(
        _folder(
            _gemma4_unified,
            "<|image|>",
            ("<|image|>", "<|video|>", "<|image>", "<image|>"),
            named={
                "image_token": "<|image|>",
                "boi_token": "<|image>",
                "eoi_token": "<image|>",
                "audio_token": "<|audio|>",
                "boa_token": "<|audio>",
                "eoa_token": "<audio|>",
            },
            more=dict(enumerate(("<|audio|>", "<|audio>", "<audio|>"), MORE[0])),
        ),
        {
            "boi_token_id": START,
            "eoi_token_id": END,
            # With the table of its input a random model says again what was said last.
            "tie_word_embeddings": False,
            "text_config": {
                "tie_word_embeddings": False,
                "global_head_dim": 32,
                "vocab_size": MORE[0] + 3,
                "hidden_size_per_layer_input": 0,  # it has none, whatever is said
            },
            # The fewest tokens that its image processor knows.
            "vision_config": {"num_soft_tokens": 70, "mm_posemb_size": 64},
        },
    ),
    "paligemma": OtherType(
        # Both engines put the image in front, wherever it is asked for.
        _folder(
            _paligemma,
            "",
            ("<image>", "<|video|>", "<|start|>", "<|end|>"),
            named={"image_token": "<image>"},
            # The one id that is free below others: the processor adds tokens behind them, counted.
            more={95: "\n"},
        ),
        renamed=_TOWER,
    ),
    "hunyuan_vl": OtherType(
        _folder(
            grids("HunYuanVL", "HunYuanVL", video={}),
            "<start><image><end>",
            ("<image>", "<video>", "<start>", "<end>"),
            named={
                "image_token": "<image>",
                "image_start_token": "<start>",
                "image_end_token": "<end>",
            },
        ),
        {"text_config": {"head_dim": 32, "rope_parameters": {"mrope_section": [4, 4, 4, 4]}}},
    ),
    "ernie4_5_vl_moe": OtherType(
        _folder(
            _ernie,
            "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>",
            (
                *("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"),
                *("<|IMAGE_START|>", "<|IMAGE_END|>"),
            ),
            named={
                "image_token": "<|IMAGE_PLACEHOLDER|>",
                "image_start_token": "<|IMAGE_START|>",
                "image_end_token": "<|IMAGE_END|>",
                "video_token": "<|VIDEO_PLACEHOLDER|>",
                "video_start_token": "<|VIDEO_START|>",
                "video_end_token": "<|VIDEO_END|>",
            },
            more=dict(
                enumerate(
                    (
                        *("<|image@placeholder|>", "<|video@placeholder|>"),
                        *("<|VIDEO_START|>", "<|VIDEO_END|>"),
                    ),
                    MORE[0],
                )
            ),
        ),
        {
            "text_config": {
                "vocab_size": 194,
                # All of them: of a few tokens the engines ask different ones, pruned or not.
                "moe_k": 4,
                "rope_parameters": {"mrope_section": [6, 6, 4]},
            },
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": MORE[0] + 2,
            "video_end_token_id": MORE[0] + 3,
        },
        renamed={r"^model\.vision_model\.": "vision_model."},
        publish=ernie.publish,
        spelled={"<|image@placeholder|>": "<|IMAGE_PLACEHOLDER|>"},
        # Which tokens are for the experts of images vLLM tells in a step that has rows: a mark
        # that comes in a step of its own is read by the experts of text.
        served_with={"max_num_batched_tokens": 512, "enable_prefix_caching": False},
    ),
    # vLLM runs it by its class of transformers.
    "perception_lm": OtherType(
        _folder(
            _perception_lm,
            "<|image|>",
            ("<|image|>", "<|video|>", "<|start|>", "<|end|>"),
            named={"image_token": "<|image|>", "video_token": "<|video|>"},
        ),
        {
            "text_config": {"tie_word_embeddings": False},
            "vision_config": {"model_args": {"patch_size": 4, "ref_feat_shape": [8, 8]}},
        },
    ),
    "aria": OtherType(
        _folder(_aria, "<image>", named={"image_token": "<image>"}),
        {
            "vision_config": {"image_size": 980, "patch_size": 140},
            "projector_patch_to_query_dict": {49: 16},
            "max_value_projector_patch_to_query_dict": 16,
        },
    ),
}
"""Type -> what is particular to it; their layouts, positions and attention are those of others."""
