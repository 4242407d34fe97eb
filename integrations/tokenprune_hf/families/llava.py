"""LLaVA-1.5 (Pixtral towers too), LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune_hf.attention import packed_rows_attention
from tokenprune_hf.families.base import Captured, Family, Item, Media


class Llava(Family):
    """LLaVA-1.5: one image, one grid of patches, each a token.

    A Pixtral tower packs images of any sizes into one sequence; their sizes come with the pixels.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return one item per image; a CLS token among the features ("full") always stays."""
        if self.packs_images(media.modality):
            return self._packed_items(media, rows, captured)
        attention = self.patch_attention(captured, media.modality)
        pixels = next(value for name, value in media.arguments.items() if name.startswith("pixel"))
        patches = self.patch_grid(media.modality, pixels)
        items = []
        start = 0
        for index, size in enumerate(sizes):
            first, grid = self._layout(media, patches, size)
            scores = None if attention is None else attention[index]
            items.append(
                self.item(
                    media,
                    f"{media.modality} {index}",
                    grid,
                    torch.arange(start + first, start + size, device=rows.device),
                    rows,
                    captured.features[index][first:],
                    # Tokens that the model dropped in front have scores too.
                    None if scores is None else scores[:, first - size :],
                )
            )
            start += size
        return items

    def _layout(
        self, media: Media, patches: tuple[int, int] | None, size: int
    ) -> tuple[int, tuple[int, int, int] | None]:
        """Return how many tokens stand in front of an image's patches, and how the patches lie."""
        if patches is not None:
            cls = size == math.prod(patches) + 1 and self.has_cls(media.modality)
            if cls or size == math.prod(patches):
                return int(cls), (1, *patches)
        return 0, None

    def packs_images(self, modality: str) -> bool:
        """Say whether the tower packs images of any sizes into one sequence (Pixtral)."""
        return getattr(self.tower(modality).config, "model_type", None) == "pixtral"

    def _packed_items(self, media: Media, rows: Tensor, captured: Captured) -> list[Item]:
        """Return one item per image of a tower that packs images."""
        grids = self.image_grids(media)
        sizes = [math.prod(grid) for grid in grids]
        attention = None
        if captured.attention_module is not None and captured.attention is not None:
            attention = packed_rows_attention(captured.attention_module, captured.attention, sizes)
        edges = itertools.pairwise([0, *itertools.accumulate(sizes)])
        return [
            self.item(
                media,
                f"{media.modality} {index}",
                (1, *grid),
                torch.arange(start, end, device=rows.device),
                rows,
                captured.features[0, start:end],
                None if attention is None else attention[:, start:end],
            )
            for index, (grid, (start, end)) in enumerate(zip(grids, edges, strict=True))
        ]

    def image_grids(self, media: Media) -> list[tuple[int, int]]:
        """Return rows and columns of patches of each image, as a Pixtral tower cuts them."""
        side = int(self.tower(media.modality).patch_size)
        pixels, given = media.arguments["pixel_values"], media.arguments.get("image_sizes")
        sizes = [pixels.shape[-2:]] * len(pixels) if given is None else given
        return [(int(height) // side, int(width) // side) for height, width in sizes]


class VideoLlava(Llava):
    """Video-LLaVA: images as in LLaVA-1.5; a video's frames each bring a CLS token, which stays."""

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)

    def tower(self, modality: str) -> Any:
        """Return the image or the video tower."""
        return self.inner.video_tower if modality == "video" else self.inner.image_tower

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return one item per image, or one per video over all its frames."""
        if media.modality == "image":
            return super().items(media, rows, sizes, captured)
        frames = media.arguments["pixel_values_videos"].shape[1]
        videos = len(sizes) // frames
        per_frame = sizes[0]
        pixels = media.arguments["pixel_values_videos"]
        grid = self.pictures_grid("video", pixels, per_frame - 1)  # a CLS token in front
        grid_rows = torch.arange(len(rows), device=rows.device).view(videos, frames, per_frame)
        features = captured.features.view(videos, frames, per_frame, -1)[:, :, 1:]
        attention = self.patch_attention(captured, "video")
        return [
            self.item(
                media,
                f"video {index}",
                (frames, *grid),
                grid_rows[index, :, 1:].flatten(),
                rows,
                features[index].flatten(0, 1),
                None
                if attention is None
                else frames_side_by_side(attention.unflatten(0, (videos, frames))[index]),
            )
            for index in range(videos)
        ]


def frames_side_by_side(attention: Tensor) -> Tensor:
    """[T, H, P] -> [H, T * P], so that one item's tokens run over its frames."""
    return attention.transpose(0, 1).flatten(1)


class LlavaNext(Llava):
    """LLaVA-NeXT: every crop is an item with a budget of its own; newline tokens always stay.

    The engine's own packing is run on the patches' coordinates, so unpadding is never repeated
    here.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return one item per crop, the whole image at low resolution first."""
        attention = self.patch_attention(captured, "image")
        crops, patches = captured.features.shape[:2]
        crop = torch.arange(crops, device=rows.device)[:, None].expand(-1, patches)
        patch = torch.arange(patches, device=rows.device).expand(crops, -1)
        packed = self._pack(media, torch.stack([crop, patch], dim=-1).double())
        _, side = self.pictures_grid("image", media.arguments["pixel_values"], patches)
        items = []
        start = 0
        for index, (size, where) in enumerate(zip(sizes, packed, strict=True)):
            crop_of_row, patch_of_row = where.long().unbind(-1)
            for number in crop_of_row[crop_of_row >= 0].unique().tolist():
                mine = (crop_of_row == number).nonzero()[:, 0]
                in_crop = patch_of_row[mine]
                height = len((in_crop // side).unique())
                items.append(
                    self.item(
                        media,
                        f"image {index}, crop {number - int(crop_of_row[0])}",
                        (1, height, len(mine) // height),
                        mine + start,
                        rows,
                        captured.features[number, in_crop],
                        None if attention is None else attention[number][:, in_crop],
                    )
                )
            start += size
        return items

    def _pack(self, media: Media, values: Tensor) -> list[Tensor]:
        """Run the model's packing on values [crops, P, X]; return [rows, X] per image, -1 newline.

        The newline is looked for as NaN-free -1, so `values` must not be negative.
        """
        packed, _ = self.inner.pack_image_features(
            torch.split(values, self._crops_per_image(media)),
            media.arguments["image_sizes"],
            image_newline=values.new_full((values.shape[-1],), -1.0),
            **self._packing_options(media),
        )
        result: list[Tensor] = list(packed)
        return result

    def _packing_options(self, media: Media) -> dict[str, Any]:
        strategy = media.arguments.get("vision_feature_select_strategy")
        return {
            "vision_feature_select_strategy": strategy
            or self.model.config.vision_feature_select_strategy
        }

    def _crops_per_image(self, media: Media) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return [
            int(
                image_size_to_num_patches(
                    size, config.image_grid_pinpoints, config.vision_config.image_size
                )
            )
            for size in media.arguments["image_sizes"]
        ]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: the whole image and its high-resolution map are two items; videos one.

    The high-resolution map may be resampled over crop borders, so crops are no items here. Frames
    of a video are pooled after the projector; features and attention are pooled alike.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return two items per image (one where it is a single crop), or one per video."""
        attention = self.patch_attention(captured, media.modality)
        if media.modality == "video":
            return self._videos(media, rows, sizes, captured.features, attention)
        patches = captured.features.shape[1]
        rows_of_crop, _ = self.pictures_grid("image", media.arguments["pixel_values"], patches)
        # Packed with a flag of 1 for patches, so that newline rows, -1, are told from them.
        flags = self._pack(media, captured.features.new_ones(*captured.features.shape[:2], 1))
        features = self._pack(media, captured.features.float())
        scores = (
            [None] * len(sizes) if attention is None else self._pack(media, attention.mT.float())
        )
        items = []
        start = 0
        for index, size in enumerate(sizes):
            is_patch = flags[index][:, 0] > 0
            parts = [(torch.arange(patches, device=rows.device), rows_of_crop)]
            high = is_patch.nonzero()[:, 0][patches:]
            if len(high):
                height = int((~is_patch).sum())  # one newline ends each row of the map
                parts.append((high, height))
            score = scores[index]
            for number, (mine, height) in enumerate(parts):
                items.append(
                    self.item(
                        media,
                        f"image {index}, {('whole image', 'high resolution')[number]}",
                        (1, height, len(mine) // height),
                        mine + start,
                        rows,
                        features[index][mine],
                        None if score is None else score[mine].mT,
                    )
                )
            start += size
        return items

    def _videos(
        self,
        media: Media,
        rows: Tensor,
        sizes: list[int],
        features: Tensor,
        attention: Tensor | None,
    ) -> list[Item]:
        pixels = media.arguments["pixel_values_videos"]
        frames = pixels.shape[1]
        pooled = self.inner.apply_pooling(features.float()).unflatten(0, (-1, frames))
        scores = (
            None
            if attention is None
            else self.inner.apply_pooling(attention.mT).unflatten(0, (-1, frames))
        )
        patches = self.pictures_grid("video", pixels, features.shape[1])
        # The engine pools two by two and keeps what is left over.
        grid = (frames, *(math.ceil(side / 2) for side in patches))
        known = math.prod(grid) == frames * pooled.shape[2]
        items = []
        start = 0
        for index, size in enumerate(sizes):
            items.append(
                self.item(
                    media,
                    f"video {index}",
                    grid if known else None,
                    torch.arange(start, start + size - 1, device=rows.device),  # last is newline
                    rows,
                    pooled[index].flatten(0, 1),
                    None if scores is None else scores[index].flatten(0, 1).mT,
                )
            )
            start += size
        return items

    def _packing_options(self, media: Media) -> dict[str, Any]:
        ratio = media.arguments.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": ratio or self.model.config.vision_aspect_ratio}

    def _crops_per_image(self, media: Media) -> list[int]:
        per_sample = media.arguments.get("batch_num_images")
        counts = super()._crops_per_image(media)
        if per_sample is None:
            return counts
        # Several images in one prompt are not cut into crops.
        alone = [int(n) == 1 for n in per_sample for _ in range(int(n))]
        return [count if single else 1 for count, single in zip(counts, alone, strict=True)]
