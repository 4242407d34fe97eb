"""Families whose pictures have sides of their own, told by the inputs: Gemma 4, LFM2-VL, Mistral 3.

A tower of transformers pads its pictures to one length, one of vLLM packs them; what is projected
are the tokens of all pictures, one after the other, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family, Seen, frames_of
from tokenprune.tokens import Projector
from tokenprune.tower.attention import mean_of_blocks, packed_pictures, received
from tokenprune.tower.layouts import Medium, Segment, Sides, check_rows


class OwnSides(Family):
    """Base of these families: every picture (a frame, a tile) is a segment."""

    delimited: ClassVar[bool] = True
    label: ClassVar[str]
    """What each of several pictures is called."""

    def shapes(self, medium: Medium) -> Sequence[Sides]:
        """Return the rows and columns of patches of each picture."""
        raise NotImplementedError

    @property
    def packed(self) -> bool:
        """True: tokens of all pictures are projected as one sequence."""
        return True

    @property
    def inside(self) -> int:
        """Patches on a side of each place that the tower's last layers see."""
        return 1

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return how many places of each picture the tower's last layers see."""
        return [rows * columns // self.inside**2 for rows, columns in self.shapes(medium)]

    def row_count(self, medium: Medium) -> int | None:
        """Return the tokens of all pictures."""
        return sum(self.packed_lengths(medium)) // (self.merged // self.inside) ** 2

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return a segment for each picture."""
        sides = [
            (rows // self.merged, columns // self.merged) for rows, columns in self.shapes(medium)
        ]
        lie = ", ".join("{} x {}".format(*of_picture) for of_picture in sides)
        check_rows(medium, sum(map(math.prod, sides)), f"pictures of {lie}")
        segments = []
        start = 0
        for number, of_picture in enumerate(sides):
            end = start + math.prod(of_picture)
            label = f"{self.label} {number}" if len(sides) > 1 else ""
            segments.append(Segment(torch.arange(start, end), (1, *of_picture), label))
            start = end
        return segments

    def attention(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return what each place receives, float32 [1, H, P] of all pictures without padding."""
        lengths = [length for medium in media for length in self.packed_lengths(medium)]
        query, key = seen.query, seen.key
        if query.shape[0] == 1 and query.shape[2] == sum(lengths):
            return packed_pictures(query, key, seen.scale, lengths)[None]
        pictures = [  # padding stands behind the places, asks nothing and is not asked
            received(query[[place], :, :length], key[[place], :, :length], seen.scale)
            for place, length in enumerate(lengths)
        ]
        return torch.cat(pictures, dim=-1)

    def patches_alone(self, values: Tensor, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return values [1, X, P] of all pictures' patches, without padding."""
        lengths = [length for medium in media for length in self.packed_lengths(medium)]
        if values.shape[0] == 1 and values.shape[2] == sum(lengths):
            return values
        pictures = [values[[place], :, :length] for place, length in enumerate(lengths)]
        return torch.cat(pictures, dim=-1)

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention; the places of a token lie in raster order."""
        laid_out = super().rows_of(media, features, None)
        if attention is None:
            return laid_out
        lengths = [length for medium in media for length in self.packed_lengths(medium)]
        pictures = iter(attention[0].split(lengths, dim=-1))
        result: list[tuple[Tensor, Tensor | None]] = []
        for (of_medium, _), medium in zip(laid_out, media, strict=True):
            scores = [
                mean_of_blocks(
                    next(pictures),
                    (rows // self.inside, columns // self.inside),
                    self.merged // self.inside,
                )
                for rows, columns in self.shapes(medium)
            ]
            result.append((of_medium, torch.cat(scores, dim=-1)))
        return result


class Gemma4(OwnSides):
    """Gemma 4: average pooling, RMS norm, one linear layer; every frame of a video is a segment.

    Text (a time stamp) stands between frames, which see themselves both ways and alone, and layers
    have embeddings of their own for text: so the number of tokens that stay of each frame has to be
    known before they are chosen.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    label: ClassVar[str] = "frame"
    limits: ClassVar[Mapping[str, Sequence[int]]] = {"max_soft_tokens": (70, 140, 280, 560, 1120)}

    def images_see_all(self, sliding: bool) -> bool:
        """Say so of sliding layers, where the config asks for it."""
        text = self.config.get_text_config()
        return sliding and getattr(text, "use_bidirectional_attention", None) == "vision"

    @property
    def merged(self) -> int:
        """Patches on a side of each token, which the pooling averages."""
        return int(self.config.vision_config.pooling_kernel_size)

    def shapes(self, medium: Medium) -> Sequence[Sides]:
        """Return the rows and columns of patches of each frame."""
        frames, *sides = frames_of(medium)
        return [(sides[0], sides[1])] * frames


class Lfm2VL(OwnSides):
    """LFM2-VL: pixel unshuffle, layer norm or none, linear, GELU, linear; tiles, then the whole."""

    model_types: ClassVar[tuple[str, ...]] = ("lfm2_vl",)
    tells_images: ClassVar[bool] = False
    label: ClassVar[str] = "tile"
    whole_image_last: ClassVar[bool] = True

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.downsample_factor)

    def shapes(self, medium: Medium) -> Sequence[Sides]:
        """Return the rows and columns of patches of each tile.

        Raises
        ------
        UnsupportedModelError
            If the inputs do not tell them.
        """
        if medium.shapes is None:
            raise UnsupportedModelError(
                "the inputs do not say the sides of an image (spatial_shapes): pass on everything "
                "that the processor returned."
            )
        return medium.shapes

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention; newer transformers pad tiles before they are projected."""
        lengths = [length for medium in media for length in self.packed_lengths(medium)]
        rows = features.reshape(-1, features.shape[-1])
        if len(rows) * self.merged**2 > sum(lengths):
            tiles = rows.unflatten(0, (len(lengths), -1))
            counts = [length // self.merged**2 for length in lengths]
            rows = torch.cat([tile[:count] for tile, count in zip(tiles, counts, strict=True)])
        return super().rows_of(media, rows, attention)

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Give each token to the projector as an image of its own, whose patches it puts together.

        vLLM's takes all images end to end, and their sides.
        """
        side, rows = self.merged, features.reshape(-1, features.shape[-1])
        call: Any = run
        if hasattr(projector, "forward_from_unshuffled"):
            shapes = torch.full((len(rows), 2), side)
            projected = call(rows.view(len(rows) * side**2, -1), shapes)
        else:
            projected = call(rows.view(len(rows), side, side, -1)).flatten(0, 2)
        result: Tensor = projected.unflatten(0, features.shape[:-1])
        return result


class Mistral3(OwnSides):
    """Mistral 3: RMS norm, then one linear layer for each 2x2 patches, then linear, GELU, linear.

    The tower is Pixtral's. Rows of tokens end in a mark, which is text.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    delimited: ClassVar[bool] = False
    label: ClassVar[str] = "image"

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.spatial_merge_size)

    def shapes(self, medium: Medium) -> Sequence[Sides]:
        """Return the rows and columns of patches of an image.

        Raises
        ------
        UnsupportedModelError
            If the inputs do not tell its size.
        """
        pixels = medium.size or medium.pixels
        if pixels is None:
            raise UnsupportedModelError(
                "the inputs do not say how large an image is (image_sizes): pass on everything "
                "that the processor returned."
            )
        patch = int(self.config.vision_config.patch_size)
        return [(pixels[0] // patch, pixels[1] // patch)]

    def tokens(self, medium: Medium) -> int:
        """Return the patches of an image: the projector puts them together."""
        return sum(self.packed_lengths(medium))

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Return [rows, X * patches]: the patches of each token side by side."""
        ((rows, columns),) = self.shapes(medium)
        side = self.merged
        blocks = values[0].unflatten(0, (rows // side, side, columns // side, side))
        laid: Tensor = blocks.transpose(1, 2).flatten(0, 1).flatten(1)
        return laid

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Give each token to the projector as an image, whose patches it puts together."""
        side = self.merged
        rows = features.reshape(-1, features.shape[-1] // side**2)
        pixels = side * int(self.config.vision_config.patch_size)
        sizes = [(pixels, pixels)] * (len(rows) // side**2)
        call: Any = run
        projected: Tensor = call(rows, sizes)
        return projected.reshape(*features.shape[:-1], -1)
