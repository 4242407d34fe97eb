"""MiniCPM-V 4.6, 4.7 and Nemotron VL: towers in raster order, projectors that are given tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Seen, frames_of
from tokenprune.families.modules import find_projector
from tokenprune.families.own_sides import OwnSides
from tokenprune.families.qwen import Qwen2VL
from tokenprune.tokens import Projector
from tokenprune.tower.attention import packed_pictures
from tokenprune.tower.layouts import Medium, Sides, order_of_windows
from tokenprune.transfer import to_device


class ProjectedTokens(Qwen2VL):
    """Base of these families: the projector is given tokens, the tower patches in raster order."""

    model_types: ClassVar[tuple[str, ...]] = ()
    mrope: ClassVar[bool] = False

    @property
    def inside(self) -> int:
        """Patches on a side of what the tower's last layers see."""
        return 1

    @property
    def last(self) -> int:
        """How many of these are on a side of each token."""
        return self.merged // self.inside

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return how many places of each picture the tower's last layers see."""
        return [length // self.inside**2 for length in super().packed_lengths(medium)]

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return the projector's input of each token, and the mean attention of its places."""
        rows = [medium.rows for medium in media]
        of_features = features.reshape(sum(rows), -1).split(rows)
        scores: list[Tensor | None] = [None] * len(media)
        if attention is not None:
            lengths = [sum(self.packed_lengths(medium)) for medium in media]
            parts = attention[0].split(lengths, dim=-1)
            scores = [self._per_token_of(*part) for part in zip(media, parts, strict=True)]
        return list(zip(of_features, scores, strict=True))

    def _per_token_of(self, medium: Medium, attention: Tensor) -> Tensor:
        frames, rows, columns = frames_of(medium)
        places = frames, rows // self.inside, columns // self.inside
        order = to_device(order_of_windows(places, self.last), attention.device)
        scores: Tensor = attention[..., order].unflatten(-1, (-1, self.last**2)).mean(dim=-1)
        return scores


class MiniCPMV46(OwnSides):
    """MiniCPM-V 4.6: each token is a 2x2 group of patches or, as is the default, a 4x4 group.

    The tower's last layers see the patches that were merged half-way. Slices of an image, and
    frames of a video, are pictures of their own.
    """

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6",)
    tells_images: ClassVar[bool] = False
    label: ClassVar[str] = "slice"

    @property
    def inside(self) -> int:
        """Patches on a side of each place that the tower's last layers see."""
        return 1 if self.config.downsample_mode == "4x" else 2

    def middle_layer(self, has_cls: bool, built: int = 0) -> int:
        """Return the layer nearest to the middle that sees the places of the last layers."""
        first = 0 if self.inside == 1 else int(self.config.insert_layer_id) + 1
        return max(first, super().middle_layer(has_cls, built))

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return self.inside * int(self.config.merge_kernel_size[0])

    def shapes(self, medium: Medium) -> Sequence[Sides]:
        """Return the rows and columns of patches of each slice or frame."""
        if medium.shapes is not None:
            return medium.shapes
        _, rows, columns = frames_of(medium)
        return [(rows, columns)]

    def attention(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return the attention score of each place.

        Raises
        ------
        UnsupportedModelError
            If the call asks for another downsample_mode than the config, and so for other places.
        """
        for medium in media:
            self.segments(medium)
        return super().attention(seen, media, has_cls)

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the vision encoder, which vLLM calls ``vpm``."""
        own = getattr(model, "vpm", None)
        return super().tower(model, modality) if own is None else own

    def projector(self, model: Any) -> nn.Module:
        """Return the last part of the merger, which is all of it in published models."""
        module: nn.Module = model.merger.mlp[-1]
        return module

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Call the projector on tokens, which come in and out in one dimension."""
        tokens = features.reshape(-1, features.shape[-1])
        projected: Tensor = run(tokens).unflatten(0, features.shape[:-1])
        return projected


class MiniCPMV47(MiniCPMV46):
    """MiniCPM-V 4.7: likewise, but positions have three axes.

    An image and its slices lie on one canvas: the slices side by side, and the whole image, read
    at low resolution, stretched over them. The marks around them have places on the canvas, too.
    """

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_7",)
    mrope: ClassVar[bool] = True
    text_behind_items: ClassVar[bool] = False

    def why_unread(self) -> str:
        """Say that a set of an image's tokens has no positions of its own on the canvas."""
        return "puts an image, its slices and the marks around them on one canvas of positions"


class NemotronOmni(ProjectedTokens):
    """Nemotron 3 Nano Omni: pixel shuffle, then RMS norm, linear, squared ReLU, linear.

    The tower puts several CLS tokens and registers in front of each picture, none of which stands
    for it alone: scores are what patches receive. Two frames of a video make one picture. Most
    layers of the language model keep a state, and none looks at positions.
    """

    model_types: ClassVar[tuple[str, ...]] = ("nemotron_h_omni",)
    videos_as_images: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token, by the pixel shuffle's ratio."""
        return round(1 / float(self.config.downsample_ratio))

    def videos(self, shape: Sequence[int]) -> list[Medium]:
        """Return the videos whose pixels are of a shape.

        Parameters
        ----------
        shape
            [frames, 3, H, W] of one video, or [videos, pictures, channels, H, W], two frames in the
            channels.

        Raises
        ------
        UnsupportedModelError
            If the model prunes videos itself.
        """
        rate = float(self.config.video_pruning_rate)
        if rate > 0:
            raise UnsupportedModelError(
                f"this model drops a part of every video itself (video_pruning_rate={rate}), and "
                "would drop tokens a second time. Load it with video_pruning_rate=0.0."
            )
        if len(shape) == 4:
            videos, pictures = 1, math.ceil(shape[0] / self.config.video_temporal_patch_size)
        else:
            videos, pictures = shape[:2]
        patch = int(self.config.vision_config.patch_size)
        grid = pictures, shape[-2] // patch, shape[-1] // patch
        return [Medium("video", 0, grid=grid) for _ in range(videos)]

    def attention(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return the attention score of each patch, float32 [1, H, P] of all pictures."""
        # Images come in one sequence, and pictures of a video side by side.
        query, key = (one.transpose(0, 1).flatten(1, 2)[None] for one in (seen.query, seen.key))
        scores = packed_pictures(query, key, seen.scale, self._lengths(media))
        return self.patches_alone(scores[None], media, has_cls)

    def patches_alone(self, values: Tensor, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return values [1, X, P] of all pictures without those of what stands ahead of each."""
        lengths = self._lengths(media)
        pictures = values.transpose(0, 1).flatten(1).split(lengths, dim=-1)
        return torch.cat([picture[:, self._ahead :] for picture in pictures], dim=-1)[None]

    def _lengths(self, media: Sequence[Medium]) -> list[int]:
        """Return the tokens of each picture in the tower."""
        return [self._ahead + one for medium in media for one in self.packed_lengths(medium)]

    @property
    def _ahead(self) -> int:
        """Tokens in front of each picture's patches."""
        vision = self.config.vision_config
        return int(vision.num_cls_tokens) + int(vision.num_registers)

    def projector(self, model: Any) -> nn.Module:
        """Return the module that the model calls to project."""
        return find_projector(model)

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Call the projector on tokens, which is what it takes."""
        return run(features)
