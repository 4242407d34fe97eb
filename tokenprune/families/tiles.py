"""Families whose projector merges neighbouring patches, as InternVL's and Gemma 3's do.

A picture is a grid of tokens, each of them several patches. Large images are cut into tiles, and
every tile is a segment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenprune.families.base import Family, Seen, sides_of
from tokenprune.tokens import Projector
from tokenprune.tower.attention import cls_row, mean_of_blocks
from tokenprune.tower.layouts import Medium, Segment, Sides, check_rows, one_segment, per_picture


class Tiles(Family):
    """Every tile of an image is a segment of its own; a video, where one is told, is one."""

    tells_videos: ClassVar[bool] = False
    tells_images: ClassVar[bool] = False
    delimited: ClassVar[bool] = True

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return one segment for each tile of an image, or one for a video."""
        sides = self.token_sides(medium)
        rows = medium.pictures * math.prod(sides)
        check_rows(medium, rows, "pictures of {} x {}".format(*sides))
        if medium.modality == "video" or medium.pictures == 1:
            return [one_segment((medium.pictures, *sides))]
        return per_picture(medium, sides, "tile")


class InternVL(Tiles):
    """InternVL: pixel shuffle, then layer norm, linear, GELU, linear. Video frames are tiles."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    crops_touch: ClassVar[bool] = True
    whole_image_last: ClassVar[bool] = True
    takes_smaller_tiles: ClassVar[bool] = True
    reference_layers: ClassVar[Mapping[tuple[int, int], int]] = {
        (32, 4096): 15,  # InternVL2.5-8B
    }

    @property
    def merged(self) -> int:
        """Patches on a side of each token, by the pixel shuffle's ratio."""
        return round(1 / float(self.config.downsample_ratio))


class InternVLChat(InternVL):
    """InternVL in its own format."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl_chat",)
    in_transformers: ClassVar[bool] = False
    takes_smaller_tiles: ClassVar[bool] = False

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the rows and columns of patches of a tile, whose size the config may force."""
        forced = getattr(self.config, "force_image_size", None)
        if not forced:
            return super().patch_sides(medium)
        patch = sides_of(self.config.vision_config.patch_size)
        return int(forced) // patch[0], int(forced) // patch[1]

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention; the first version of the shuffle turns tiles over."""
        if attention is not None and getattr(self.config, "ps_version", "v2") == "v1":
            # Tiles are square, so turning the scores over is turning the tokens over.
            side = math.isqrt(attention.shape[-1])
            attention = attention.unflatten(-1, (side, side)).mT.flatten(-2)
        return super().rows_of(media, features, attention)


class Idefics3(Tiles):
    """Idefics3 and SmolVLM: pixel shuffle, then one linear layer."""

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    whole_image_last: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.scale_factor)


class CohereVision(Tiles):
    """Aya Vision and Cohere2 Vision: pixel shuffle, layer norm or none, linear, SwiGLU, linear."""

    model_types: ClassVar[tuple[str, ...]] = ("aya_vision", "cohere2_vision")
    whole_image_last: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.downsample_factor)

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention; behind the shuffle tokens lie in rows and columns."""
        return super().rows_of(media, features.flatten(1, -2), attention)

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Give each token to the projector as an image of its own, whose patches it shuffles."""
        tokens = features.reshape(-1, features.shape[-1])
        projected = run(tokens.unflatten(-1, (self.merged**2, -1)))
        result: Tensor = projected.flatten(0, -2).unflatten(0, features.shape[:-1])
        return result


class PerceptionLM(Tiles):
    """PerceptionLM: linear, GELU, linear, then average pooling; the tower is one of timm."""

    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    tells_videos: ClassVar[bool] = True
    tells_images: ClassVar[bool] = True
    videos_by_image_encoder: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token, which the pooling averages."""
        return int(self.config.projector_pooling_ratio)

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the rows and columns of patches of a tile.

        A config says the size of a patch where it is not that of timm's name of the tower.
        """
        vision = self.config.vision_config
        named = re.search(r"patch(\d+)", vision.architecture)
        patch = (vision.model_args or {}).get("patch_size", named and int(named[1]))
        if patch is None or medium.pixels is None:
            return None
        (height, width), (rows, columns) = medium.pixels, sides_of(patch)
        return height // rows, width // columns

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention; features are averaged as the model averages behind."""
        sides = self.patch_sides(media[0])
        if self.merged > 1 and sides is not None:
            features = mean_of_blocks(features.mT, sides, self.merged).mT
        return super().rows_of(media, features, attention)

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Give each token to the projector as an image of its own, of equal patches."""
        tokens = features.reshape(-1, 1, features.shape[-1])
        projected = run(tokens.expand(-1, self.merged**2, -1))
        result: Tensor = projected[:, 0].unflatten(0, features.shape[:-1])
        return result


class Llama4(Tiles):
    """Llama 4: pixel shuffle and an MLP at the end of the tower, then one linear layer."""

    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    whole_image_last: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token, by the pixel shuffle's ratio."""
        return round(1 / float(self.config.vision_config.pixel_shuffle_ratio))

    def attention(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return what the CLS token pays to each patch; it stands behind them."""
        last = seen.query.shape[2] - 1
        return cls_row(seen.query, seen.key, seen.scale, seen.mask, last)[..., :last]

    def patches_alone(self, values: Tensor, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return values [..., P] without that of the CLS token, which stands last."""
        return values[..., :-1]

    def why_unread(self) -> str | None:
        """Say that most layers see a part of a prompt."""
        return "attends to one chunk of the prompt in most of its layers"


class Gemma3(Tiles):
    """Gemma 3: average pooling, then RMS norm, then one linear layer."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    def images_see_all(self, sliding: bool) -> bool:
        """Say that they do, in all layers."""
        return True

    @property
    def merged(self) -> int:
        """Patches on a side of each token, which the pooling averages."""
        vision = self.config.vision_config
        patches = int(vision.image_size) // int(vision.patch_size)
        return patches // math.isqrt(int(self.config.mm_tokens_per_image))

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Give each token's features to all patches that its pooling averages.

        So that the projector is called whole, pooling included.
        """
        side, kernel = int(projector.tokens_per_side), int(projector.kernel_size)
        rows = features.reshape(-1, features.shape[-1])
        missing = -len(rows) % side**2
        images = nn.functional.pad(rows, (0, 0, 0, missing)).view(-1, side, side, rows.shape[-1])
        patches = images.repeat_interleave(kernel, 1).repeat_interleave(kernel, 2).flatten(1, 2)
        projected = run(patches).flatten(0, 1)[: len(rows)]
        result: Tensor = projected.unflatten(0, features.shape[:-1])
        return result


class Gemma3n(Tiles):
    """Gemma 3n: RMS norm, one linear layer, RMS norm; the tower is one of timm that convolves.

    Layers have embeddings of their own for text, and that of padding for the tokens of an image.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3n",)
    tells_images: ClassVar[bool] = True  # which are never cut
    attends: ClassVar[bool] = False

    def token_sides(self, medium: Medium) -> Sides:
        """Return the rows and columns of tokens, as many of each for every image."""
        side = math.isqrt(int(self.config.vision_soft_tokens_per_image))
        return side, side

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Call the projector by name, as it takes ids of tokens, too."""
        call: Any = run
        projected: Tensor = call(inputs_embeds=features)
        return projected

    def why_unread(self) -> str | None:
        """Say that layers pass on several versions of each token (AltUp)."""
        return "passes on several versions of each token from layer to layer"
