"""What a family says about itself: how an image's rows are laid out, and where scores come from.

The first half is asked where prompts are made (the model's config is there, the model is not),
the second in the worker. The defaults fit a tower that encodes whole pictures: CLIP, SigLIP,
InternViT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.model_projector import ModelProjector
from tokenprune.projectors import MLPProjector
from tokenprune.tokens import Projector
from tokenprune_vllm.regions import Region, Segment
from tokenprune_vllm.scoring import Watched, picture_attention, plain_linear

Fields = Mapping[str, Any]
"""What vLLM's processor made of one image or video, by name: pixel_values, image_grid_thw, ..."""


class Family:
    """Base of the families.

    Parameters
    ----------
    config
        The model's config, as vLLM loads it.
    """

    mrope: ClassVar[bool] = False
    """Whether positions have three axes (time, row, column)."""

    flat_fields: ClassVar[Mapping[str, str]] = {}
    """Tensors that hold all items end to end -> the field that says how much is whose; what is
    not listed has one entry for each item. See `entries`."""

    shared_fields: ClassVar[frozenset[str]] = frozenset()
    """Values that all items share."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # Where prompts are made --------------------------------------------------------------------

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return what may be dropped of one image or video.

        Parameters
        ----------
        modality
            ``"image"`` or ``"video"``.
        rows
            How many rows the encoder will return for it.
        fields
            What vLLM's processor made of it.
        """
        raise NotImplementedError

    # In the worker -----------------------------------------------------------------------------

    def tower(self, model: Any) -> nn.Module:
        """Return the vision encoder."""
        module: nn.Module = model.vision_tower
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return the projector."""
        module: nn.Module = model.multi_modal_projector
        return module

    def entrance(self, model: Any) -> nn.Module:
        """Return the module whose input is the tokens' features: the projector, or its first part.

        It must be one that runs its hooks: vLLM's modules marked for torch.compile do not.
        """
        return self.projector(model)

    def around_projector(self, run: Projector, features: Tensor) -> Tensor:
        """Send features [..., C] through `run`, which is called as vLLM calls the projector.

        Returns
        -------
        Tensor
            [..., D].
        """
        return run(features)

    def model_projector(self, model: Any) -> ModelProjector:
        """Return the projector as a callable of features [..., C]; read only where a method asks.

        Under tensor parallelism all ranks have to call or read it together.
        """
        return ModelProjector(
            self.projector(model), lambda: self.build_projector(model), self.around_projector
        )

    def build_projector(self, model: Any) -> MLPProjector:
        """Return the layers of the projector as they are now.

        Raises
        ------
        UnsupportedModelError
            If their weights are not what they compute with (quantised).
        """
        module: Any = model.multi_modal_projector
        return MLPProjector(
            first=plain_linear(module.linear_1),
            activation=module.act,
            second=plain_linear(module.linear_2),
        )

    def tiles(self, region: Region, fields: Fields) -> int:
        """Return how many pictures the encoder was given for one item."""
        return 1

    def patch_grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture, which all are of one size."""
        vision = self.config.vision_config
        pixels, patch = (_both(getattr(vision, name)) for name in ("image_size", "patch_size"))
        return pixels[0] // patch[0], pixels[1] // patch[1]

    def entries(self, value: Any) -> int:
        """Return how many entries of a flat field belong to an item whose size field is `value`."""
        return int(value)

    def frame_interval(self, modality: str) -> int:
        """Return how many steps of the first axis lie between frames whose times are not known.

        Only families with `mrope` are asked.
        """
        return 1

    def merge(self, model: Any, attention: Tensor) -> Tensor:
        """Return [B, H, N] of patch scores [B, H, P], where several patches become one token."""
        return attention

    def tokens(
        self, model: Any, watched: Watched, regions: Sequence[Region], fields: Sequence[Fields]
    ) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Return features [N, C] and attention [H, N] or None, for each segment of each item.

        Parameters
        ----------
        model
            vLLM's.
        watched
            What was seen while the encoder ran on these items.
        regions, fields
            Of each item, in the order in which they were encoded.
        """
        attention = picture_attention(watched, self.heads, self.has_cls(model))
        if attention is not None:
            attention = self.merge(model, attention)
        found = []
        start = 0
        for region, own in zip(regions, fields, strict=True):
            parts = []
            for segment in region.segments:
                cells: Tensor | slice = slice(None) if segment.cells is None else segment.cells
                tile = start + segment.tile
                parts.append(
                    (
                        watched.features[tile, cells],
                        None if attention is None else attention[tile][:, cells],
                    )
                )
            found.append(parts)
            start += self.tiles(region, own)
        return found

    @property
    def heads(self) -> int:
        """How many attention heads the tower has."""
        return int(self.config.vision_config.num_attention_heads)

    def has_cls(self, model: Any) -> bool:
        """Say whether the tower puts a CLS token in front of its patches."""
        return any(
            name.rpartition(".")[2] in ("class_embedding", "cls_token")
            for name, _ in self.tower(model).named_parameters()
        )


def check_count(count: int, grid: tuple[int, int], what: str) -> tuple[int, int]:
    """Return a grid that has as many tokens as vLLM says that there are.

    Raises
    ------
    UnsupportedModelError
        If it has not: how the tokens lie is never guessed from their number.
    """
    rows, columns = grid
    if rows * columns != count:
        raise UnsupportedModelError(
            f"{what} has {count} tokens in vLLM, and by the model's config {rows} x {columns}: "
            "tokenprune does not know how they lie. Serve the model with its own config."
        )
    return grid


def _both(side: Any) -> tuple[int, int]:
    if isinstance(side, int):
        return side, side
    height, width = side
    return int(height), int(width)


def sizes_of(fields: Fields, name: str) -> Tensor:
    """Return a field as a tensor of whole numbers."""
    return torch.as_tensor(fields[name]).long()
