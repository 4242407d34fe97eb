"""Ovis2 to 2.6: a token is a probability of each visual word, and its embedding their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.qwen import Qwen25VL
from tokenprune.families.tiles import Tiles
from tokenprune.tower.layouts import Medium, Segment, Sides, check_rows, one_segment


class Ovis2(Tiles):
    """Ovis2: blocks of patches, linear, layer norm, softmax, then a table of visual words."""

    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.vision_config.hidden_stride)

    def projector(self, model: Any) -> nn.Module:
        """Return what stands between the tower's features and the language model."""
        tower = model.vision_tower
        table = model.visual_embeddings_table
        return _VisualWords(
            tower.head_linear, tower.head_norm, table, tower.config.tokenize_function
        )


class Ovis(Ovis2):
    """Ovis2 in its own format, and Ovis 1.6: indicators among the tiles are rows, which stay.

    One stands in front of each tile; behind the last one stand one more, or two behind an image
    that is one tile.
    """

    model_types: ClassVar[tuple[str, ...]] = ("ovis",)
    in_transformers: ClassVar[bool] = False

    @property
    def tower_config(self) -> Any:
        """The vision tower's config."""
        return self.config.visual_tokenizer_config.backbone_config

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.visual_tokenizer_config.hidden_stride)

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the rows and columns of patches of a tile."""
        vit = self.tower_config
        side = int(vit.image_size) // int(vit.patch_size)
        return side, side

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return a segment for each tile."""
        sides = self.token_sides(medium)
        step = 1 + sides[0] * sides[1]
        lie = "tiles of {} x {} and their indicators".format(*sides)
        check_rows(medium, medium.pictures * step + _behind(medium), lie)
        return [
            Segment(
                torch.arange(number * step + 1, (number + 1) * step),
                (1, *sides),
                f"tile {number}" if medium.pictures > 1 else "",
            )
            for number in range(medium.pictures)
        ]

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Put an indicator in front of each tile, and behind the last one."""
        rows = nn.functional.pad(values, (0, 0, 1, 0)).flatten(0, 1)
        return nn.functional.pad(rows, (0, 0, 0, _behind(medium)))

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the vision encoder."""
        module: nn.Module = model.visual_tokenizer.backbone
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return what stands between the tower's features and the language model."""
        linear, norm = model.visual_tokenizer.head
        how = self.config.visual_tokenizer_config.tokenize_function
        return _VisualWords(linear, norm, model.vte, how)


def _behind(medium: Medium) -> int:
    """Return how many indicators stand behind the last tile."""
    return 2 if medium.pictures == 1 else 1


class Ovis25(Qwen25VL):
    """Ovis 2.5 and 2.6: the tower works on windows, and undoes it in front of the projector.

    In front of an image or video and behind it stand indicators, which are rows and always stay.
    Positions have one axis.
    """

    model_types: ClassVar[tuple[str, ...]] = ("ovis2_5", "ovis2_6", "ovis2_6_moe")
    mrope: ClassVar[bool] = False
    in_transformers: ClassVar[bool] = False

    @property
    def tower_config(self) -> Any:
        """The vision tower's config."""
        return self.config.vit_config

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.tower_config.hidden_stride)

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return what stands between the indicators."""
        grid = self._token_grid(medium)
        segment = one_segment(grid, first=1)
        lie = "{} x {} x {} between two indicators".format(*grid)
        check_rows(medium, 1 + len(segment.rows) + 1, lie)
        return [segment]

    def row_count(self, medium: Medium) -> int | None:
        """Return the tokens of all frames, and the indicators."""
        return 1 + self.tokens(medium) + 1

    def tokens(self, medium: Medium) -> int:
        """Return how many tokens the tower makes of all frames."""
        frames, rows, columns = self._token_grid(medium)
        return frames * rows * columns

    def check_needs(self, method: str, needs: Sequence[str]) -> None:
        """Raise if a method looks at what the model does not have; see `Family.check_needs`.

        Raises
        ------
        UnsupportedModelError
            If it looks at attention, and the last layer sees windows in place of frames.
        """
        super().check_needs(method, needs)
        vit = self.tower_config
        whole = getattr(vit, "fullatt_block_indexes", None)
        last = str(int(vit.num_hidden_layers) - 1)
        if "cls_attention" in needs and whole and last not in str(whole).split("|"):
            raise UnsupportedModelError(
                f"method {method!r} looks at the attention of the tower's last layer, number "
                f"{last}, which sees windows in this model (fullatt_block_indexes={whole!r}). Use "
                "a method that needs features or embeddings (see `tokenprune methods`)."
            )

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features, which lie in raster order already, and attention, which does not."""
        tokens = [self.tokens(medium) for medium in media]
        of_features = features.reshape(sum(tokens), -1).split(tokens)
        scores: list[Tensor | None] = [None] * len(media)
        if attention is not None:
            per_token = attention.unflatten(-1, (-1, self.merged**2)).mean(dim=-1)
            parts = zip(media, per_token.split(tokens, dim=-1), strict=True)
            scores = [
                _between_indicators(self.lay_out(medium, part.mT)).mT for medium, part in parts
            ]
        return [
            (_between_indicators(of_medium), laid)
            for of_medium, laid in zip(of_features, scores, strict=True)
        ]

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the vision encoder."""
        module: nn.Module = model.visual_tokenizer.vit
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return what stands between the tower's features and the language model."""
        linear, norm = model.visual_tokenizer.head
        return _VisualWords(linear, norm, model.vte)

    def around_projector(self, projector: nn.Module, run: Any, features: Tensor) -> Tensor:
        """Call the projector on tokens, which is what it takes."""
        projected: Tensor = run(features)
        return projected


def _between_indicators(values: Tensor) -> Tensor:
    """Return [rows, X] of values [tokens, X]; what stands for the indicators is not looked at."""
    return nn.functional.pad(values, (0, 0, 1, 1))


class _VisualWords(nn.Module):
    """The parts of an Ovis that project, which its tower and the model call one by one."""

    def __init__(
        self, linear: nn.Module, norm: nn.Module, table: nn.Module, how: str = "softmax"
    ) -> None:
        super().__init__()
        self.head_linear = linear
        self.head_norm = norm
        self.table = table
        self._how = how

    def forward(self, features: Tensor) -> Tensor:
        """Project features [..., C] to [..., D].

        Raises
        ------
        UnsupportedModelError
            If one word is taken in place of the mean of all.
        """
        if self._how != "softmax":
            raise UnsupportedModelError(
                f"this Ovis2 takes one visual word for each token (tokenize_function="
                f"{self._how!r}), which has no derivative. Use a method that does not look at the "
                "projector (see `tokenprune methods`)."
            )
        words = self.head_norm(self.head_linear(features)).softmax(dim=-1)
        weights: Any = self.table.weight
        result: Tensor = torch.matmul(words, weights[: words.shape[-1]])
        return result
