"""Families whose projector merges neighbouring patches: InternVL, Idefics3, SmolVLM, Gemma 3."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.projectors import MLPProjector
from tokenprune.tokens import Projector
from tokenprune_hf.attached import named_arguments
from tokenprune_hf.engine import rows_per_picture
from tokenprune_hf.families.base import Captured, Family, Item, Media
from tokenprune_hf.families.llava import frames_side_by_side


class MergedTiles(Family):
    """A tile is a square of tokens, each of them several patches; every tile is an item.

    The processors of these models turn a video into pictures. With the argument ``video_frames``,
    as many pictures as it says are one item.
    """

    tells_videos: ClassVar[bool] = False

    def sizes(self, sizes: list[int], captured: Captured) -> list[int]:
        """Return the rows of each tile."""
        return rows_per_picture(sizes, captured.features)

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return one item per tile or, where the caller told them, per video."""
        attention = self.patch_attention(captured, media.modality)
        tokens = sizes[0]
        pixels = media.arguments["pixel_values"]
        grid = self.pictures_grid(media.modality, pixels, tokens, self.tokens_per_patch())
        patches = self.patch_grid(media.modality, pixels)
        scores = None if attention is None or patches is None else self.merge(attention, patches)
        counts = self._pictures(media, len(sizes))
        items = []
        first = 0
        for index, count in enumerate(counts):
            mine = slice(first, first + count)
            items.append(
                self.item(
                    media,
                    f"{'video' if count > 1 else 'image'} {index}",
                    (count, *grid),
                    torch.arange(first * tokens, (first + count) * tokens, device=rows.device),
                    rows,
                    captured.features[mine].flatten(0, 1),
                    None if scores is None else frames_side_by_side(scores[mine]),
                )
            )
            first += count
        return items

    def _pictures(self, media: Media, total: int) -> list[int]:
        """Return how many pictures each item has.

        Raises
        ------
        PromptError
            If ``video_frames`` does not add up.
        """
        told = media.video_frames
        if told is None:
            return [1] * total
        counts = [int(count) for count in told]
        if sum(counts) != total or min(counts, default=0) < 1:
            raise PromptError(
                f"video_frames={list(told)} adds up to {sum(counts)} pictures and the processor "
                f"made {total}. Give the number of frames of each video and a 1 for each picture "
                "of an image, in the order of the prompt."
            )
        return counts

    def tokens_per_patch(self) -> float:
        """Return how many tokens there are on a side of a tile for each patch on it."""
        raise NotImplementedError

    def merge(self, attention: Tensor, patches: tuple[int, int]) -> Tensor:
        """Return [B, H, N] of patch scores [B, H, P]: the mean over the patches of each token.

        `patches` are the rows and columns of patches, P in all.
        """
        raise NotImplementedError


class InternVL(MergedTiles):
    """InternVL: pixel shuffle, then layer norm, linear, GELU, linear. Video frames are tiles."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def build_projector(self, modality: str) -> MLPProjector:
        """Return the projector on the pixel-shuffled features."""
        module: Any = self.inner.multi_modal_projector
        return MLPProjector(
            first=module.linear_1,
            activation=module.act,
            second=module.linear_2,
            norm=module.layer_norm,
        )

    def tokens_per_patch(self) -> float:
        """Return the ratio of the pixel shuffle."""
        return float(self.model.config.downsample_ratio)

    def merge(self, attention: Tensor, patches: tuple[int, int]) -> Tensor:
        """Send the scores through the model's own pixel shuffle, and average what it lays aside."""
        heads = attention.shape[1]
        maps = attention.mT.unflatten(1, patches)
        shuffled = self.inner.pixel_shuffle(
            maps.contiguous(), scale_factor=self.model.config.downsample_ratio
        )
        merged: Tensor = shuffled.flatten(1, 2).unflatten(-1, (-1, heads)).mean(dim=2).mT
        return merged


class Idefics3(MergedTiles):
    """Idefics3: pixel shuffle, then one linear layer. Every tile is an item."""

    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)

    def tower(self, modality: str) -> Any:
        """Return the SigLIP-like encoder."""
        return self.inner.vision_model

    def language_model(self) -> Any:
        """Return the language model without its head."""
        return self.inner.text_model

    def projector_module(self, modality: str) -> nn.Module:
        """Return the linear layer behind the pixel shuffle."""
        module: nn.Module = self.inner.connector.modality_projection
        return module

    def build_projector(self, modality: str) -> MLPProjector:
        """Return the linear layer."""
        return MLPProjector(first=self.inner.connector.modality_projection.proj)

    def has_cls(self, modality: str) -> bool:
        """Return False: the encoder has no CLS token."""
        return False

    def tokens_per_patch(self) -> float:
        """Return the ratio of the pixel shuffle."""
        return 1 / int(self.inner.connector.scale_factor)

    def merge(self, attention: Tensor, patches: tuple[int, int]) -> Tensor:
        """Send the scores through the model's own pixel shuffle, and average what it lays aside."""
        heads = attention.shape[1]
        connector = self.inner.connector
        shuffled = connector.pixel_shuffle(attention.mT.contiguous(), connector.scale_factor)
        merged: Tensor = shuffled.unflatten(-1, (-1, heads)).mean(dim=2).mT
        return merged


class SmolVLM(Idefics3):
    """SmolVLM: as Idefics3, but its forward takes rows in blocks of one size only."""

    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)

    def hooks(self) -> list[RemovableHandle]:
        """Put kept rows into the prompt ourselves: the forward would cut them into equal blocks.

        Until transformers 5.19 a block is the first entry of the rows, later a patch's side; what
        stays of an image or a video is no multiple of either.
        """
        hook = self.inner.register_forward_pre_hook(self._place_rows, with_kwargs=True)
        return [hook]

    def _place_rows(
        self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the inner model embeddings in place of ids and rows."""
        named = named_arguments(inner, args, kwargs)
        image = (named.get("mm_encoder_outputs") or {}).get("image")
        if image is None or named.get("input_ids") is None:
            return None
        input_ids = named.pop("input_ids")
        embeddings = inner.get_input_embeddings()(input_ids)
        rows = torch.cat(list(image.pooler_output)).to(embeddings)
        places = (input_ids == self.token_id("image"))[..., None].to(embeddings.device)
        embeddings = embeddings.masked_scatter(places, rows)
        return (), {**named, "inputs_embeds": embeddings, "mm_encoder_outputs": None}


class Gemma3(MergedTiles):
    """Gemma 3: average pooling, then RMS norm, then one linear layer."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    def language_model(self) -> Any:
        """Refuse: an image's tokens see each other there, which a prefix run would have to copy.

        Raises
        ------
        UnsupportedModelError
            Always.
        """
        raise UnsupportedModelError(
            "Gemma 3 lets an image's tokens see each other in both directions and slides its "
            "attention window; flexselect does not read it. Use flexselect-lite, or a method that "
            "needs no language model (see `tokenprune methods`)."
        )

    def entrance(self, modality: str) -> nn.Module:
        """Return the norm, whose input is the pooled features."""
        module: nn.Module = self.inner.multi_modal_projector.mm_soft_emb_norm
        return module

    def build_projector(self, modality: str) -> MLPProjector:
        """Return norm and linear layer, which here is a bare parameter."""
        module: Any = self.inner.multi_modal_projector
        linear: Any = SimpleNamespace(weight=module.mm_input_projection_weight.mT, bias=None)
        return MLPProjector(first=linear, norm=module.mm_soft_emb_norm)

    def around_projector(self, run: Projector, features: Tensor) -> Tensor:
        """Give each token's features to all patches that its pooling averages.

        So that the projector is called whole, pooling included.
        """
        module: Any = self.inner.multi_modal_projector
        side, kernel = int(module.tokens_per_side), int(module.kernel_size)
        rows = features.reshape(-1, features.shape[-1])
        missing = -len(rows) % side**2
        images = nn.functional.pad(rows, (0, 0, 0, missing)).view(-1, side, side, rows.shape[-1])
        patches = images.repeat_interleave(kernel, 1).repeat_interleave(kernel, 2).flatten(1, 2)
        projected = run(patches).flatten(0, 1)[: len(rows)]
        result: Tensor = projected.unflatten(0, features.shape[:-1])
        return result

    def tokens_per_patch(self) -> float:
        """Return the ratio of the pooling."""
        return 1 / int(self.inner.multi_modal_projector.kernel_size)

    def merge(self, attention: Tensor, patches: tuple[int, int]) -> Tensor:
        """Pool the scores as the features are pooled."""
        module: Any = self.inner.multi_modal_projector
        maps = attention.unflatten(-1, patches)
        pooled: Tensor = module.avg_pool(maps).flatten(2)
        return pooled
