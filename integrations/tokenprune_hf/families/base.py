"""What a family has to say, and the run of the vision encoder that all families share.

A family is told apart by its config's `model_type`. It says which module projects, which layer
scores, and how the rows that the encoder returns are laid out in items; the rest is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.model_projector import ModelProjector
from tokenprune.projectors import MLPProjector
from tokenprune.tokens import Projector, VisualTokens
from tokenprune_hf.attention import AttentionProbe, grid_attention, probe
from tokenprune_hf.engine import encoder_arguments, encoder_names
from tokenprune_hf.watching import watch_input

ENCODED = ("features", "embeddings", "cls_attention", "projector")
"""What a run of the vision encoder can give to selectors."""

PROVIDED = (*ENCODED, "query_attention", "question")
"""What this adapter can hand to a selector; the last two come from the prompt."""


VIDEO_FRAMES = "video_frames"
"""The argument in which a caller says which pictures are the frames of one video."""


@dataclass(frozen=True)
class Item:
    """One image, video or crop that a selector prunes.

    Attributes
    ----------
    rows
        LongTensor [N], the item's rows among all rows the encoder returned for the modality.
        Rows that belong to no item (newline tokens, a CLS token) always stay.
    tokens
        What the selector may look at.
    """

    rows: Tensor
    tokens: VisualTokens


@dataclass(frozen=True)
class EncodedModality:
    """What the encoder returned for all images, or all videos, of a batch of prompts.

    Attributes
    ----------
    rows
        [R, D], everything the language model would read, in prompt order.
    sizes
        Rows of each picture, or of each tensor the encoder returned; they add up to R.
    stacked
        Whether the encoder returned one tensor [n, R / n, D] and not a list.
    deepstack
        Further features of the same rows for deeper layers, each [R, D] (Qwen3-VL).
    items
        The images or videos, in prompt order.
    videos_told
        Whether it is sure which pictures are the frames of one video.
    """

    rows: Tensor
    sizes: list[int]
    stacked: bool
    deepstack: list[Tensor]
    items: list[Item]
    videos_told: bool = True


@dataclass
class Captured:
    """What the hooks saw while the encoder ran.

    Attributes
    ----------
    features
        The projector's input, as it was passed.
    attention_module, attention
        The scoring layer's module and what was seen of it; None where no method asked.
    """

    features: Tensor
    attention_module: nn.Module | None = None
    attention: AttentionProbe | None = None


@dataclass
class Media:
    """The arguments with which the encoder of one modality is called.

    Attributes
    ----------
    modality
        ``"image"`` or ``"video"``.
    arguments
        Arguments of ``get_image_features`` or ``get_video_features``.
    video_frames
        How many of the pictures, in order, make one video each; see `Family.tells_videos`.
    """

    modality: str
    arguments: dict[str, Any] = field(default_factory=dict)
    video_frames: list[int] | None = None


class Family:
    """Base of the families; the defaults fit a tower that encodes whole images (CLIP, SigLIP)."""

    model_types: ClassVar[tuple[str, ...]]
    """The `config.model_type` of the models that belong to the family."""

    mrope: ClassVar[bool] = False
    """Whether positions have three axes (time, row, column)."""

    tells_videos: ClassVar[bool] = True
    """Whether the model's inputs tell the frames of a video from images. Where they do not, the
    caller may say so in the argument ``video_frames``."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.inner: Any = getattr(model, "model", model)
        self._projectors: dict[str, ModelProjector] = {}

    # What a family says about itself -----------------------------------------------------------

    def tower(self, modality: str) -> Any:
        """Return the vision encoder of `modality`."""
        return self.inner.vision_tower

    def projector_module(self, modality: str) -> nn.Module:
        """Return the module that the model calls to project."""
        module: nn.Module = self.inner.multi_modal_projector
        return module

    def entrance(self, modality: str) -> nn.Module:
        """Return the module whose input is the tokens' features: the projector, or a part of it."""
        return self.projector_module(modality)

    def around_projector(self, run: Projector, features: Tensor) -> Tensor:
        """Send features [..., C] through `run`, which is called as the model calls its projector.

        Returns
        -------
        Tensor
            [..., D].
        """
        return run(features)

    def build_projector(self, modality: str) -> MLPProjector:
        """Return the layers of the projector as they are now; only where a method asks.

        Raises
        ------
        UnsupportedModelError
            If their weights are not what they compute with.
        """
        module: Any = self.inner.multi_modal_projector
        return MLPProjector(first=module.linear_1, activation=module.act, second=module.linear_2)

    def sizes(self, sizes: list[int], captured: Captured) -> list[int]:
        """Return the rows of each picture, given those of each entry the encoder returned."""
        return sizes

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Cut the rows into items, with features and attention per token."""
        raise NotImplementedError

    # What follows from it ----------------------------------------------------------------------

    def projector(self, modality: str) -> ModelProjector:
        """Return the projector, one for all items, as a callable of features [..., C].

        Nothing of it is read before a method asks.
        """
        if modality not in self._projectors:
            self._projectors[modality] = ModelProjector(
                self.projector_module(modality),
                lambda: self.build_projector(modality),
                self.around_projector,
            )
        return self._projectors[modality]

    def scoring_layer(self, media: Media) -> nn.Module:
        """Return the attention module of the layer whose output is the feature."""
        layers = _encoder_layers(self.tower(media.modality))
        chosen: Any = media.arguments.get("vision_feature_layer")
        if chosen is None:
            chosen = getattr(self.model.config, "vision_feature_layer", -1)
        if not isinstance(chosen, int):
            chosen = max(chosen, key=lambda index: index % (len(layers) + 1))
        # hidden_states has one entry more than there are layers: entry 0 is the embedding.
        layer = layers[chosen % (len(layers) + 1) - 1]
        attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
        if attention is None or not hasattr(attention, "q_proj"):
            raise UnsupportedModelError(
                f"the vision tower {type(self.tower(media.modality)).__name__} of "
                f"{type(self.model).__name__} has no q_proj and k_proj to watch, so methods that "
                "need attention cannot serve it. Use one that needs features or embeddings only "
                "(see `tokenprune methods`)."
            )
        module: nn.Module = attention
        return module

    def has_cls(self, modality: str) -> bool:
        """Say whether the tower puts a CLS token in front of its patches."""
        embeddings = getattr(self.tower(modality), "embeddings", None)
        return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")

    def language_model(self) -> Any:
        """Return the language model without its head: embeddings, layers, norm."""
        return self.inner.language_model

    def hooks(self) -> list[RemovableHandle]:
        """Put on the model what its own forward needs to take pruned prompts; most need nothing."""
        return []

    def frame_interval(self, modality: str) -> int:
        """Return how many steps of the first axis lie between frames whose times are not known.

        Only families with `mrope` are asked.
        """
        return 1

    def check_videos_told(self, media: EncodedModality, places: Tensor) -> None:
        """Raise where a method ranks whole videos and nobody said which pictures make one.

        Parameters
        ----------
        media
            What the encoder returned.
        places
            LongTensor [R, 2]: prompt and column of each row.

        Raises
        ------
        PromptError
            If pictures stand apart in one prompt, as a video's frames do.
        """
        if media.videos_told or len(media.items) < 2:
            return
        places = places.cpu()
        apart = (places[1:, 0] == places[:-1, 0]) & (places[1:, 1] != places[:-1, 1] + 1)
        if bool(apart.any()):
            raise PromptError(
                f"{type(self.model).__name__} is given videos as images, and this method ranks a "
                "video as a whole. Pass video_frames along with the processor's inputs: how many "
                f"of the {len(media.items)} pictures make one video, and 1 for each picture of an "
                f"image; for one video video_frames=[{len(media.items)}]."
            )

    def token_id(self, modality: str) -> int:
        """Return the id of the placeholder token of `modality`."""
        token_id: Any = getattr(self.model.config, f"{modality}_token_id", None)
        if token_id is None:
            token_id = getattr(self.model.config, f"{modality}_token_index", -1)
        return int(token_id)

    def patch_attention(self, captured: Captured, modality: str) -> Tensor | None:
        """Return float32 [B, H, P], the attention score of each patch, if it was asked for."""
        if captured.attention_module is None or captured.attention is None:
            return None
        return grid_attention(captured.attention_module, captured.attention, self.has_cls(modality))

    def patch_grid(self, modality: str, pixels: Tensor) -> tuple[int, int] | None:
        """Return the rows and columns of patches of a picture, or None where they are not known.

        Parameters
        ----------
        modality
            Its modality.
        pixels
            [..., height, width], as the tower is given it.
        """
        size = getattr(self.tower(modality).config, "patch_size", None)
        if size is None:
            return None
        rows, columns = (size, size) if isinstance(size, int) else size
        return pixels.shape[-2] // int(rows), pixels.shape[-1] // int(columns)

    def pictures_grid(
        self, modality: str, pixels: Tensor, count: int, factor: float = 1
    ) -> tuple[int, int]:
        """Return rows and columns of `count` tokens that a picture must have become.

        Parameters
        ----------
        modality, pixels
            See `patch_grid`.
        count
            How many tokens there are.
        factor
            Tokens on a side for each patch on it.

        Raises
        ------
        UnsupportedModelError
            If it is not known, or is not what the model made.
        """
        patches = self.patch_grid(modality, pixels)
        grid = None if patches is None else tuple(round(side * factor) for side in patches)
        if grid is None or math.prod(grid) != count:
            said = "says no patch_size" if grid is None else f"makes {grid[0]} x {grid[1]} of it"
            raise UnsupportedModelError(
                f"the encoder of {type(self.model).__name__} returned {count} tokens for a picture "
                f"of {pixels.shape[-2]} x {pixels.shape[-1]} pixels, and its config {said}: "
                "tokenprune does not know how they lie. Load the model with its own config."
            )
        rows, columns = grid
        return rows, columns

    def item(
        self,
        media: Media,
        label: str,
        grid: tuple[int, int, int] | None,
        rows: Tensor,
        all_rows: Tensor,
        features: Tensor,
        attention: Tensor | None,
    ) -> Item:
        """Build one item.

        Parameters
        ----------
        media
            Its modality's arguments.
        label
            What to call it in an error.
        grid
            (frames, rows, columns), or None where it is not known how the tokens lie.
        rows
            LongTensor [N] into `all_rows`.
        all_rows
            [R, D].
        features
            [N, C].
        attention
            [H, N] or None.
        """
        return Item(
            rows,
            VisualTokens(
                grid=(1, 1, len(rows)) if grid is None else grid,
                is_picture=grid is not None,
                features=features,
                embeddings=all_rows[rows],
                cls_attention=attention,
                projector=self.projector(media.modality),
                label=label,
            ),
        )

    def media(self, arguments: dict[str, Any]) -> list[Media]:
        """Return the modalities whose pixels are among a call's arguments."""
        found = []
        for modality in ("image", "video"):
            function = getattr(self.inner, f"get_{modality}_features", None)
            if function is None:
                continue
            given = encoder_arguments(function, arguments)
            if given is not None:
                told = None if self.tells_videos else arguments.get(VIDEO_FRAMES)
                found.append(Media(modality, given, told))
        return found

    def encoder_arguments(self) -> set[str]:
        """Return the names of all arguments that only the vision encoders read."""
        names: set[str] = set() if self.tells_videos else {VIDEO_FRAMES}
        for modality in ("image", "video"):
            function = getattr(self.inner, f"get_{modality}_features", None)
            if function is not None:
                names.update(encoder_names(function))
        return names - {"return_dict"}

    def encode(self, media: Media, needs: Sequence[str]) -> EncodedModality:
        """Run the vision encoder once and collect what `needs` names.

        Parameters
        ----------
        media
            The modality and the encoder's arguments.
        needs
            Names out of `PROVIDED`.

        Returns
        -------
        EncodedModality
            All rows and the items in them.

        Raises
        ------
        UnsupportedModelError
            If the scoring layer's attention is needed and cannot be watched.
        """
        captured_features: list[Tensor] = []

        def keep_input(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            captured_features.append(args[0])

        with ExitStack() as stack:
            attention_module = attention = None
            if "cls_attention" in needs:
                attention_module = self.scoring_layer(media)
                attention = stack.enter_context(probe(attention_module))
            stack.enter_context(watch_input(self.entrance(media.modality), keep_input))
            function = getattr(self.inner, f"get_{media.modality}_features")
            output = function(**media.arguments, return_dict=True)
        if not captured_features:
            raise PromptError(f"the vision encoder was given no {media.modality}.")
        pooled = output.pooler_output
        parts = list(pooled)
        rows = torch.cat(parts)
        deepstack = [
            torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", None) or []
        ]
        with torch.no_grad():
            captured = Captured(captured_features[0], attention_module, attention)
            sizes = self.sizes([len(part) for part in parts], captured)
            items = self.items(media, rows, sizes, captured)
        told = self.tells_videos or media.video_frames is not None
        return EncodedModality(rows, sizes, isinstance(pooled, Tensor), deepstack, items, told)


def _encoder_layers(tower: Any) -> Sequence[Any]:
    """Return a vision tower's layers."""
    encoder = (
        getattr(tower, "encoder", None)
        or getattr(getattr(tower, "vision_model", None), "encoder", None)
        or getattr(tower, "transformer", None)
    )
    for name in ("layers", "layer"):
        layers = getattr(encoder, name, None)
        if layers is not None:
            return list(layers)
    raise UnsupportedModelError(
        f"the vision tower {type(tower).__name__} keeps its layers where tokenprune does not look, "
        "so methods that need attention cannot serve it. Use one that needs features or embeddings "
        "only (see `tokenprune methods`)."
    )
