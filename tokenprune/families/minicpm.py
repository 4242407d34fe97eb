"""MiniCPM-V 4.6: a packed tower that merges patches half-way, and a projector that merges again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenprune.families.base import Seen, frames_of
from tokenprune.families.qwen import Qwen2VL
from tokenprune.tokens import Projector
from tokenprune.tower.layouts import Medium, order_of_windows


class MiniCPMV46(Qwen2VL):
    """MiniCPM-V 4.6: each token is a 2x2 group of patches or, as is the default, a 4x4 group.

    The tower's last layers see the patches that were merged half-way. Slices of an image, and
    frames of a video, are pictures of their own.
    """

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6",)
    mrope: ClassVar[bool] = False

    @property
    def inside(self) -> int:
        """Patches on a side of what the tower's last layers see."""
        return 1 if self.config.downsample_mode == "4x" else 2

    @property
    def last(self) -> int:
        """How many of these are on a side of each token."""
        return int(self.config.merge_kernel_size[0])

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return self.inside * self.last

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return how many places of the picture the tower's last layers see."""
        return [length // self.inside**2 for length in super().packed_lengths(medium)]

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

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return the projector's input of each token, and the mean attention of its places."""
        rows = [medium.rows for medium in media]
        of_features = features.reshape(sum(rows), -1).split(rows)
        scores: list[Tensor | None] = [None] * len(media)
        if attention is not None:
            lengths = [length for medium in media for length in self.packed_lengths(medium)]
            parts = attention[0].split(lengths, dim=-1)
            scores = [self._per_token_of(*part) for part in zip(media, parts, strict=True)]
        return list(zip(of_features, scores, strict=True))

    def _per_token_of(self, medium: Medium, attention: Tensor) -> Tensor:
        frames, rows, columns = frames_of(medium)
        places = frames, rows // self.inside, columns // self.inside
        order = order_of_windows(places, self.last).to(attention.device)
        scores: Tensor = attention[..., order].unflatten(-1, (-1, self.last**2)).mean(dim=-1)
        return scores

    def projector(self, model: Any) -> nn.Module:
        """Return the last part of the merger, which is all of it in published models."""
        module: nn.Module = model.merger.mlp[-1]
        return module

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Call the projector on tokens, which come out in one dimension."""
        projected: Tensor = run(features).unflatten(0, features.shape[:-1])
        return projected
