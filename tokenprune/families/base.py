"""What a family of vision-language models says about itself; most of it has a default that fits.

A family is told apart by its config's `model_type`. It knows how the rows that its encoder returns
lie in pictures (`segments`), how values per patch become values per row (`lay_out`), and where its
tower and its projector are. It runs nothing: the adapters of the engines do, and ask it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.modules import find_projector, find_tower
from tokenprune.selectors.base import Selector
from tokenprune.tokens import FROM_CALLER, Projector
from tokenprune.tower.attention import mean_of_blocks, packed_pictures, received, whole_pictures
from tokenprune.tower.layouts import Grid, Medium, Segment, Sides, check_rows, one_segment

SCORING = ("cls_attention", "received_attention", "wide_attention", "keys")
"""What selectors look at of q and k of the tower's scoring layer."""

MIDDLE = ("middle_attention",)
"""Likewise, of a layer in its middle."""


class ModelConfig(Protocol):
    """What is read of a model's config; transformers' and vLLM's are of one kind."""

    @property
    def model_type(self) -> str:
        """Which family it is."""

    @property
    def vision_config(self) -> Any:
        """The tower's config: patch_size, image_size, heads, and what a family reads besides."""

    def get_text_config(self) -> Any:
        """Return the language model's config."""


class Seen(Protocol):
    """q and k of a tower's scoring layer, as an adapter saw them pass."""

    @property
    def query(self) -> Tensor:
        """[B, H, P, d], behind norms and rotary positions."""

    @property
    def key(self) -> Tensor:
        """[B, H, P, d], likewise."""

    @property
    def scale(self) -> float:
        """The factor on q kᵀ."""

    @property
    def mask(self) -> Tensor | None:
        """What `tokenprune.tower.attention.received` takes, or None."""


@dataclass(frozen=True)
class _Wide:
    """q and k of a layer as if it had one head of its full width."""

    seen: Seen

    @property
    def query(self) -> Tensor:
        """[B, 1, P, C]."""
        return self.seen.query.transpose(1, 2).flatten(2)[:, None]

    @property
    def key(self) -> Tensor:
        """[B, 1, P, C]."""
        return self.seen.key.transpose(1, 2).flatten(2)[:, None]

    @property
    def scale(self) -> float:
        """1 / sqrt(C)."""
        return float((self.seen.query.shape[1] * self.seen.query.shape[-1]) ** -0.5)

    @property
    def mask(self) -> Tensor | None:
        """The layer's."""
        return self.seen.mask


class Family:
    """Base of the families; the defaults fit a tower that encodes whole pictures (CLIP, SigLIP).

    Parameters
    ----------
    config
        The model's.
    """

    model_types: ClassVar[tuple[str, ...]]
    """The `config.model_type` of the models that belong to the family."""

    mrope: ClassVar[bool] = False
    """Whether positions have three axes (time, row, column)."""

    text_behind_items: ClassVar[bool] = True
    """Whether all text behind an image or video is behind all of its positions, and none is among
    them; of families with `mrope`."""

    tells_videos: ClassVar[bool] = True
    """Whether the model's inputs tell the frames of a video from images."""

    delimited: ClassVar[bool] = False
    """Whether text stands around every image, so that images never touch in a prompt."""

    videos_by_frame: ClassVar[bool] = False
    """Whether the encoder returns frames and does not say which of them are one video's."""

    videos_as_images: ClassVar[bool] = False
    """Whether a video's frames have an image's placeholders in the prompt."""

    videos_marked: ClassVar[bool] = False
    """Whether marks around a video (``video_start_token_id``, ``video_end_token_id``) tell its
    placeholders, which are an image's, from those of images."""

    videos_by_image_encoder: ClassVar[bool] = False
    """Whether the model's method that encodes images encodes videos too, and has no other."""

    whole_image_last: ClassVar[bool] = False
    """Whether an image that is cut into tiles comes whole and small behind them, not in front."""

    tells_images: ClassVar[bool] = True
    """Whether the inputs of transformers tell which pictures are the crops of one image; in vLLM
    they always do."""

    crops_touch: ClassVar[bool] = False
    """Whether the crops of an image stand side by side in the prompt, so that this tells it; of
    families that are `delimited`."""

    attends: ClassVar[bool] = True
    """Whether the last layers of the tower attend, so that tokens have an attention score."""

    images_see_each_other: ClassVar[bool] = False
    """Whether all images of a prompt, and the marks around them, see each other."""

    takes_smaller_tiles: ClassVar[bool] = False
    """Whether transformers' tower takes square tiles smaller than its config says, for which it
    resamples its table of positions, and the processor says ``image_seq_length`` tokens of each."""

    limits: ClassVar[Mapping[str, Sequence[int]]] = {}
    """Limits on an image's tokens that a processor takes (by the name of its argument), and the
    values that it allows, ascending, where it allows some only."""

    known: ClassVar[bool] = True
    """Whether it is said here how rows lie, and where tower and projector are."""

    in_transformers: ClassVar[bool] = True
    """Whether transformers has the model's class, and not the checkpoint alone."""

    reference_layers: ClassVar[Mapping[tuple[int, int], int]] = {}
    """(decoder layers, hidden size) -> the layer, from 0, with which FlexSelect's released scripts
    rank visual tokens; see `tokenprune.families.registry.reference_layer`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config: Any = config

    @property
    def taps(self) -> int:
        """Deepstack taps of the tower: layers whose tokens the language model is given besides."""
        vision = getattr(self.config, "vision_config", None)
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def check_selector(self, selector: Selector) -> None:
        """Raise if a method looks at what is not known of the model, or at what it has not.

        Parameters
        ----------
        selector
            The method with its options.

        Raises
        ------
        UnsupportedModelError
            Naming what it needs.
        """
        tap, taps = selector.tap, self.taps
        if tap is not None and tap >= taps:
            there = f"has deepstack-0 to deepstack-{taps - 1}" if taps else "has no deepstack tap"
            raise UnsupportedModelError(
                f"method {selector.name!r} takes tokens at deepstack-{tap}, and the vision tower "
                f"of this {self.config.model_type} {there}. Use taken='before' or taken='after' "
                "the projector, which every tower has."
            )
        self.check_needs(selector.name, selector.gathers)

    def check_needs(self, method: str, needs: Sequence[str]) -> None:
        """Raise if a method looks at what is not known of the model.

        Parameters
        ----------
        method
            Its name.
        needs
            What it looks at, out of `tokenprune.tokens.INPUTS`.

        Raises
        ------
        UnsupportedModelError
            Naming what it needs.
        """
        check_adapters_gather(method, needs)
        self.check_attends(method, needs)

    @classmethod
    def check_attends(cls, method: str, needs: Sequence[str]) -> None:
        """Raise if a method looks at attention that the family's towers do not have.

        Parameters
        ----------
        method, needs
            See `check_needs`; no config is looked at.

        Raises
        ------
        UnsupportedModelError
            Saying so.
        """
        if {*SCORING, *MIDDLE} & set(needs) and not cls.attends:
            raise UnsupportedModelError(
                f"method {method!r} looks at the attention of the vision tower, and that of a "
                f"{', '.join(cls.model_types)} ends in convolutions, in which no token attends to "
                "another. Use a method that needs features or embeddings, such as information or "
                "zeroth-order (see `tokenprune methods`)."
            )

    # How rows lie ------------------------------------------------------------------------------

    def images_see_all(self, sliding: bool) -> bool:
        """Say whether an image's tokens see the whole of it, also what comes behind them.

        Parameters
        ----------
        sliding
            In layers of the language model that see a window of tokens, or in the others.
        """
        return False

    def why_unread(self) -> str | None:
        """Say what the language model does that reading its first layers alone leaves out.

        As a part of a sentence; None where they are read together with the question.
        """
        if self.images_see_all(True):
            return "lets an image's tokens see each other in both directions"
        return None

    @property
    def tower_config(self) -> Any:
        """The vision tower's config."""
        return self.config.vision_config

    @property
    def feature_layer(self) -> int | Sequence[int]:
        """The tower's hidden states that are projected: an index, or several."""
        chosen: int | Sequence[int] = getattr(self.config, "vision_feature_layer", -1)
        return chosen

    @property
    def packed(self) -> bool:
        """Whether the tower packs pictures of any size into one sequence."""
        return False

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return 1

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the rows and columns of patches of each picture; None where they are not known."""
        vision = self.config.vision_config
        patch = getattr(vision, "patch_size", None)
        pixels = medium.pixels or getattr(vision, "image_size", None)
        if patch is None or pixels is None:
            return None
        (height, width), (rows, columns) = sides_of(pixels), sides_of(patch)
        return height // rows, width // columns

    def token_sides(self, medium: Medium) -> Sides:
        """Return the rows and columns of tokens that each picture becomes.

        Raises
        ------
        UnsupportedModelError
            If they are not known.
        """
        patches = self.patch_sides(medium)
        if patches is None:
            raise UnsupportedModelError(
                f"the config of this {self.config.model_type} says no patch_size of its vision "
                "tower: tokenprune does not know how its tokens lie. Load the model with its own "
                "config."
            )
        return patches[0] // self.merged, patches[1] // self.merged

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return what may be dropped of one image or video; what is in no segment always stays.

        Raises
        ------
        UnsupportedModelError
            If the rows lie otherwise than the config says.
        """
        sides = self.token_sides(medium)
        segment = one_segment((medium.pictures, *sides))
        check_rows(medium, len(segment.rows), "{} x {}".format(*sides))
        return [segment]

    def row_count(self, medium: Medium) -> int | None:
        """Return how many rows the encoder will return; None: as many for each picture.

        Parameters
        ----------
        medium
            One image or video; its `rows` are not known yet.
        """
        return None

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Put values of the tower's tokens where the encoder puts the rows made of them.

        Parameters
        ----------
        medium
            One image or video.
        values
            [pictures, tokens of each, X]; [1, tokens, X] where the tower packs pictures.

        Returns
        -------
        Tensor
            [rows, X]; rows that are in no segment may hold anything.
        """
        return values.flatten(0, 1)

    def tokens(self, medium: Medium) -> int:
        """Return how many tokens a packed tower has for one image or video."""
        return medium.rows

    # What selectors look at --------------------------------------------------------------------

    def attention(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return the attention score of each patch.

        Parameters
        ----------
        seen
            Of one run of the encoder.
        media
            What was encoded, in order.
        has_cls
            Whether the tower puts a CLS token in front of its patches.

        Returns
        -------
        Tensor
            float32 [pictures, H, P] without the CLS token; [1, H, P] where the tower packs them.
        """
        if not self.packed:
            return whole_pictures(seen.query, seen.key, seen.scale, has_cls, seen.mask)
        lengths = [length for medium in media for length in self.packed_lengths(medium)]
        return packed_pictures(seen.query, seen.key, seen.scale, lengths)[None]

    def middle_layer(self, has_cls: bool, built: int = 0) -> int:
        """Return the tower's layer, from 0, whose attention is ``middle_attention``.

        Source: HiPrune's released code (arXiv 2508.00553) takes the 9th of CLIP-L's 24 layers and
        the 16th of Qwen2.5-VL's 32; towers of other depths get the same shares.

        Parameters
        ----------
        has_cls
            Whether the tower puts a CLS token in front of its patches.
        built
            How many layers the tower has in the engine, where the config does not say.
        """
        tower = self.tower_config
        named = (getattr(tower, name, None) for name in ("num_hidden_layers", "depth"))
        layers = next((int(count) for count in named if count), built)
        return max(0, math.ceil(layers * (3 / 8 if has_cls else 1 / 2)) - 1)

    def looked_at(
        self,
        needs: Sequence[str],
        seen: Seen | None,
        middle: Seen | None,
        media: Sequence[Medium],
        has_cls: bool,
    ) -> dict[str, Tensor]:
        """Return what selectors look at of the tower's q and k.

        Parameters
        ----------
        needs
            Of all that is in `SCORING` and `MIDDLE`, what is wanted.
        seen, middle
            Of one run of the encoder, the scoring layer and the one in the middle, if asked for.
        media, has_cls
            As for `attention`.

        Returns
        -------
        dict
            Name -> float32 [pictures, X, P] without the CLS token, [1, X, P] where the tower packs
            pictures; X is the heads, 1 for ``wide_attention``, and H * d for ``keys``.
        """
        found: dict[str, Tensor] = {}
        if seen is not None:
            if "cls_attention" in needs:
                found["cls_attention"] = self.attention(seen, media, has_cls)
            if "received_attention" in needs:
                found["received_attention"] = self._received(seen, media, has_cls)
            if "wide_attention" in needs:
                found["wide_attention"] = self.attention(_Wide(seen), media, has_cls)
            if "keys" in needs:
                keys = seen.key.float().transpose(2, 3).flatten(1, 2)
                found["keys"] = self.patches_alone(keys, media, has_cls)
        if middle is not None and "middle_attention" in needs:
            found["middle_attention"] = self._received(middle, media, has_cls)
        return found

    def _received(self, seen: Seen, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return the attention that each patch receives, of all queries."""
        if self.packed:  # whose attention is that already
            return self.attention(seen, media, has_cls)
        of_all = received(seen.query, seen.key, seen.scale, seen.mask)
        return self.patches_alone(of_all, media, has_cls)

    def patches_alone(self, values: Tensor, media: Sequence[Medium], has_cls: bool) -> Tensor:
        """Return values [..., P] without those of tokens that are no patches, of all in a tower."""
        return values[..., 1:] if has_cls else values

    def rows_of_all(
        self, media: Sequence[Medium], features: Tensor, looked_at: Mapping[str, Tensor], heads: int
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return what the tower made of each image or video, one entry for each row.

        Parameters
        ----------
        media, features
            As for `rows_of`.
        looked_at
            What `looked_at` returned.
        heads
            H, of the scoring layer.

        Returns
        -------
        list of tuple
            Features [rows, C'], and by name what `tokenprune.VisualTokens` takes of them, of which
            the patches of a token are averaged.
        """
        together = next(iter(looked_at.values()), None)
        if len(looked_at) > 1:  # one alone, as is usual, needs no copy
            together = torch.cat(list(looked_at.values()), dim=1)
        widths = [values.shape[1] for values in looked_at.values()]
        result = []
        for of_features, values in self.rows_of(media, features, together):
            parts = () if values is None else values.split(widths)
            named = dict(zip(looked_at, parts, strict=True))
            if "wide_attention" in named:
                named["wide_attention"] = named["wide_attention"][0]
            if "keys" in named:
                named["keys"] = named["keys"].unflatten(0, (heads, -1)).mT
            result.append((of_features, named))
        return result

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return the patches of each picture or frame, inside which a packed tower attends."""
        raise NotImplementedError

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return what the tower made of each image or video, one entry for each row.

        Parameters
        ----------
        media
            What was encoded, in order.
        features
            The projector's input: of whole pictures [pictures, tokens, C]; of packed ones any shape
            with C numbers for each patch.
        attention
            What `attention` returned, of all heads, or None.

        Returns
        -------
        list of tuple
            Features [rows, C'] (the patches of a token side by side) and attention float32
            [H, rows] or None.
        """
        scores = None
        if self.packed:
            features = features.reshape(1, sum(map(self.tokens, media)), -1)
            if attention is not None:
                # The patches of a token stand one after another in a packed sequence.
                scores = attention.unflatten(-1, (-1, self.merged**2)).mean(dim=-1).mT
        elif attention is not None:
            scores = self._per_token(media[0], attention, features.shape[1]).mT
        found = []
        start = 0
        for medium in media:
            if self.packed:
                end = start + self.tokens(medium)
                own = (slice(None), slice(start, end))
            else:
                end = start + medium.pictures
                own = (slice(start, end), slice(None))
            start = end
            laid = None if scores is None else self.lay_out(medium, scores[own]).mT
            found.append((self.lay_out(medium, features[own]), laid))
        return found

    def _per_token(self, medium: Medium, attention: Tensor, tokens: int) -> Tensor:
        """Return [B, H, tokens] of patch scores [B, H, P], all pictures being of one size."""
        sides = self.patch_sides(medium)
        if self.merged > 1 and sides is not None:
            attention = mean_of_blocks(attention, sides, self.merged)
        missing = tokens - attention.shape[-1]
        if missing > 0:  # a CLS token among the features, which has no score
            return nn.functional.pad(attention, (missing, 0))
        # Tokens that the model dropped in front have scores too.
        return attention[..., -missing:]

    # Where things are in the model -------------------------------------------------------------

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the vision encoder.

        Parameters
        ----------
        model
            The module that holds tower, projector and language model.
        modality
            ``"image"`` or ``"video"``.
        """
        return find_tower(model)

    def projector(self, model: Any) -> nn.Module:
        """Return the module that the model calls to project."""
        return find_projector(model)

    def around_projector(self, projector: nn.Module, run: Projector, features: Tensor) -> Tensor:
        """Send features [..., C] through `run`, which is called as the model calls its projector.

        Returns
        -------
        Tensor
            [..., D].
        """
        return run(features)

    def has_cls(self, tower: nn.Module) -> bool:
        """Say whether the tower puts a CLS token in front of its patches."""
        return any(
            name.rpartition(".")[2] in ("class_embedding", "cls_token")
            for name, _ in tower.named_parameters()
        )

    # Positions ---------------------------------------------------------------------------------

    def frame_interval(self, modality: str) -> int:
        """Return how many steps of the first axis lie between frames whose times are not known.

        Only families with `mrope` are asked.
        """
        return 1


def check_adapters_gather(method: str, needs: Sequence[str]) -> None:
    """Raise UnsupportedModelError if a method looks at what models do not compute."""
    missing = [need for need in needs if need in FROM_CALLER]
    if missing:
        raise UnsupportedModelError(
            f"method {method!r} looks at {', '.join(missing)}, which vision-language models do not "
            "compute. Call tokenprune.select(tokenprune.VisualTokens("
            f"{'=..., '.join(missing)}=..., ...), {method!r}, keep) with what another model made "
            "of them, or choose another method (see `tokenprune methods`)."
        )


def sides_of(side: Any) -> Sides:
    """Return height and width of what a config gives as one number or as two."""
    if isinstance(side, int):
        return side, side
    height, width = side
    return int(height), int(width)


def frames_of(medium: Medium) -> Grid:
    """Return the grid of patches that the inputs told.

    Raises
    ------
    UnsupportedModelError
        If they told none.
    """
    if medium.grid is None:
        raise UnsupportedModelError(
            f"the inputs do not say the grid of a {medium.modality} ({medium.modality}_grid_thw): "
            "pass on everything that the processor returned."
        )
    return medium.grid
