"""Molmo 2: overlapping crops, of whose patches each token is pooled by attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family, sides_of
from tokenprune.families.modules import find_projector, find_tower
from tokenprune.tower.layouts import Medium, Segment, Sides, check_rows
from tokenprune.transfer import to_device


class Molmo2(Family):
    """Molmo 2: an image is two segments, the whole and its map of crops; so is a video's frame one.

    Attention pools the patches of each token, whose numbers come with the inputs; its output is the
    features. Rows are added to the embedding of the placeholder. In vLLM the marks around images
    and behind lines are rows, too, and always stay.

    Text (a time stamp) stands between frames, and what is seen sees all of it both ways: so the
    number of tokens that stay of each frame has to be known before they are chosen.
    """

    model_types: ClassVar[tuple[str, ...]] = ("molmo2",)
    delimited: ClassVar[bool] = True
    videos_as_images: ClassVar[bool] = True
    images_see_each_other: ClassVar[bool] = True

    def images_see_all(self, sliding: bool) -> bool:
        """Say that they do, in all layers."""
        return True

    @property
    def tower_config(self) -> Any:
        """The tower's config, which has another name in published checkpoints."""
        return getattr(self.config, "vit_config", None) or self.config.vision_config

    @property
    def feature_layer(self) -> Sequence[int]:
        """Return the hidden states that are pooled; the config counts layers."""
        layers: Sequence[int] = self.config.adapter_config.vision_feature_layer
        return [layer + 1 if layer >= 0 else layer for layer in layers]

    @property
    def patches_per_crop(self) -> int:
        """How many patches a crop, or a frame, has."""
        return math.prod(self.patch_sides(Medium("image", 0)))

    def patch_sides(self, medium: Medium) -> Sides:
        """Return the rows and columns of patches of a crop, all of which have one size."""
        vision = self.tower_config
        named = "image_default_input_size", "image_patch_size"
        size, patch = (getattr(vision, name, None) for name in named)
        height, width = sides_of(size or vision.image_size)
        side = int(patch or vision.patch_size)
        return height // side, width // side

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return two segments for an image, or one for each frame of a video."""
        if medium.shapes is None or medium.pooling is None:
            raise UnsupportedModelError(
                f"the inputs do not say how the tokens of a {medium.modality} lie "
                f"({medium.modality}_grids, {medium.modality}_token_pooling): pass on everything "
                "that the processor returned."
            )
        rows = torch.arange(medium.rows) if medium.holds is None else torch.tensor(medium.holds)
        lie = ", ".join("{} x {}".format(*sides) for sides in medium.shapes)
        marks = medium.rows - len(rows)
        counts = [math.prod(sides) for sides in medium.shapes]
        check_rows(medium, sum(counts) + marks, f"pictures of {lie} and {marks} marks")
        labels = ["whole image", "high resolution"]
        if medium.modality == "video":
            labels = [f"frame {number}" for number in range(len(counts))]
        return [
            Segment(of_picture, (1, *sides), label)
            for of_picture, sides, label in zip(
                rows.split(counts), medium.shapes, labels, strict=True
            )
        ]

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return what attention pooled of each token, and the mean score of its patches."""
        for medium in media:
            self.segments(medium)  # raises where they are not known
        counts = [sum(map(math.prod, medium.shapes or ())) for medium in media]
        tokens = features.reshape(sum(counts), -1).split(counts)
        scores: Sequence[Tensor | None] = [None] * len(media)
        if attention is not None:
            crops = attention.split([medium.pictures for medium in media])
            scores = [self._pooled(*part) for part in zip(media, crops, strict=True)]
        return [
            (_among_marks(medium, own), None if score is None else _among_marks(medium, score).mT)
            for medium, own, score in zip(media, tokens, scores, strict=True)
        ]

    def _pooled(self, medium: Medium, attention: Tensor) -> Tensor:
        """Return scores [tokens, H] from those of patches, [crops, H, P]."""
        patches = to_device(torch.tensor(medium.pooling, device="cpu"), attention.device)
        if medium.modality == "video":  # alike in all frames
            starts = torch.arange(medium.pictures, device=attention.device) * attention.shape[-1]
            patches = torch.where(patches < 0, -1, patches + starts[:, None, None]).flatten(0, 1)
        pooled = (patches >= 0)[..., None]
        values = attention.transpose(1, 2).flatten(0, 1)[patches.clamp(min=0)]
        return (values * pooled).sum(dim=1) / pooled.sum(dim=1)

    # What the inputs say ---------------------------------------------------------------------

    def medium_of_ids(self, modality: str, ids: Tensor, pooling: Tensor, crops: int) -> Medium:
        """Return one image or video by the ids that stand for it, marks included.

        Parameters
        ----------
        modality
            ``"image"`` or ``"video"``.
        ids
            LongTensor [rows].
        pooling, crops
            See `medium_of_tokens`.
        """
        is_token = ids == int(self.config.image_patch_id)
        names = "image_end_token_id", "frame_end_token_id"
        ends = torch.tensor([int(getattr(self.config, name)) for name in names])
        behind = torch.isin(ids, ends).nonzero()[:, 0] + 1
        shapes: list[Sides] = []
        first = 0
        for start, end in itertools.pairwise([0, *behind.tolist()]):
            kinds, counts = torch.unique_consecutive(is_token[start:end], return_counts=True)
            lines = counts[kinds].tolist()
            tokens = sum(lines)
            if len(lines) == 1:
                shapes.append(self._sides_by_patches(pooling[first : first + tokens]))
            else:  # a mark ends each line
                shapes.append((len(lines), lines[0]))
            first += tokens
        holds = is_token.nonzero()[:, 0].tolist()
        return medium_of_tokens(modality, len(ids), pooling, shapes, crops, holds=holds)

    def _sides_by_patches(self, pooling: Tensor) -> Sides:
        """Return the rows and columns of tokens, by the patches of one crop that each has.

        Raises
        ------
        UnsupportedModelError
            If they are patches of several crops.
        """
        last = pooling.amax(dim=1)
        if len((last // self.patches_per_crop).unique()) > 1:
            raise UnsupportedModelError(
                "the prompt does not say where the lines of an image's crops end: tokenprune does "
                "not know how its tokens lie. Use a processor with image_use_col_tokens=true, as "
                "published ones have it."
            )
        columns = self.patch_sides(Medium("image", 0))[1]
        rows = len((last % self.patches_per_crop // columns).unique())
        return rows, len(last) // rows

    # Where things are --------------------------------------------------------------------------

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the vision encoder."""
        backbone = getattr(model, "vision_backbone", None)  # vLLM's
        module: nn.Module = find_tower(model) if backbone is None else backbone.image_vit
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return what stands behind the pooling."""
        holder: Any = getattr(model, "vision_backbone", None) or find_projector(model)
        module: nn.Module = holder.image_projector
        return module


def _among_marks(medium: Medium, values: Tensor) -> Tensor:
    """Put values of tokens [n, X] where the encoder puts its rows, [rows, X]."""
    if medium.holds is None:
        return values
    laid_out = values.new_zeros(medium.rows, values.shape[1])
    holds = torch.tensor(medium.holds, device="cpu")
    laid_out[to_device(holds, values.device)] = values
    return laid_out


def pooled_media(
    modality: str, grids: Sequence[Sequence[int]], pooling: Tensor, per_crop: int, crops: int
) -> list[Medium]:
    """Return images or videos, by what Molmo 2's processor says of their tokens.

    Parameters
    ----------
    modality
        ``"image"`` or ``"video"``.
    grids
        Of each image rows and columns of the whole and of its map, or of each video frames, rows
        and columns of tokens.
    pooling
        LongTensor [tokens, k], the patches of each token, counted over all crops; -1 is none.
    per_crop
        Patches of a crop.
    crops
        Of all images, or frames of all videos.
    """
    shapes = [
        [(grid[1], grid[2])] * grid[0]
        if len(grid) == 3
        else [(grid[0], grid[1]), (grid[2], grid[3])]
        for grid in grids
    ]
    parts = pooling.cpu().split([sum(map(math.prod, of_medium)) for of_medium in shapes])
    # The first token of each is one of its first crop's, the whole image's or the first frame's.
    starts = [int(part[0].max()) // per_crop for part in parts]
    return [
        medium_of_tokens(modality, 0, part, of_medium, end - start, start * per_crop)
        for part, of_medium, (start, end) in zip(
            parts, shapes, itertools.pairwise([*starts, crops]), strict=True
        )
    ]


def medium_of_tokens(
    modality: str,
    rows: int,
    pooling: Tensor,
    shapes: Sequence[Sides],
    crops: int,
    first: int = 0,
    holds: Sequence[int] | None = None,
) -> Medium:
    """Return one image or video.

    Parameters
    ----------
    modality, rows, shapes, holds
        See `Medium`.
    pooling
        LongTensor [tokens, k], the patches of each token; -1 is none.
    crops
        How many it has, or frames.
    first
        The number of its first patch.
    """
    if modality == "video":
        pooling = pooling[: math.prod(shapes[0])]
    patches = torch.where(pooling < 0, -1, pooling - first).tolist()
    return Medium(
        modality,
        rows,
        crops,
        shapes=tuple(shapes),
        pooling=tuple(map(tuple, patches)),
        holds=None if holds is None else tuple(holds),
    )
