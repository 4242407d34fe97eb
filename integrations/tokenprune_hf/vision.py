"""A vision-language model of transformers, and the run of its encoder that all families share.

How a family's rows lie in items is said in `tokenprune.families`; here the encoder runs, and what
selectors look at is watched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Budget
from tokenprune.config import Positions
from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.families.any import rope_axes
from tokenprune.families.base import MIDDLE, SCORING, Family
from tokenprune.families.modules import entrance_of, layers_of
from tokenprune.families.registry import FAMILIES, attending_layers
from tokenprune.question.prompt import Marks
from tokenprune.scope import Joined
from tokenprune.selectors.base import Selector
from tokenprune.tokens import Projector, VisualTokens, tokens_at
from tokenprune.tower.layouts import Grid, Medium, places_on
from tokenprune.tower.model_projector import ModelProjector
from tokenprune_hf.attention import layer_count, layer_number, scoring_layer, watch_attention
from tokenprune_hf.encoder_inputs import VIDEO_FRAMES, EncoderInputs, media_of
from tokenprune_hf.engine import encoder_arguments, encoder_names, rows_per_picture
from tokenprune_hf.indicators import READS_INDICATORS, give_indicators
from tokenprune_hf.placing import PLACES_ROWS_IN_BLOCKS, place_kept_rows
from tokenprune_hf.watching import watch_input
from tokenprune_hf.wrappers import model_inside

ENCODED = ("features", "embeddings", *SCORING, *MIDDLE, "projector")
"""What a run of the vision encoder can give to selectors."""


@dataclass(frozen=True)
class Item:
    """One image, video or crop that a selector prunes.

    Attributes
    ----------
    rows
        LongTensor [N] on the CPU, ascending: the item's rows among all rows the encoder returned
        for the modality. Rows that belong to no item (newline tokens, a CLS token) always stay.
    tokens
        What the selector may look at.
    medium
        Which image or video of the modality it is of, from 0.
    joined
        The crops that it was made of, where they are chosen from together.
    """

    rows: Tensor
    tokens: VisualTokens
    medium: int = 0
    joined: Joined | None = None

    def count(self, budget: Budget) -> int:
        """Return how many of its tokens stay."""
        return budget.count(self.tokens.total) if self.joined is None else self.joined.count(budget)


@dataclass(frozen=True)
class Container:
    """Where the output of an encoder has its rows.

    Attributes
    ----------
    kind
        The output's class; None for that of most models.
    field
        The attribute that holds the rows.
    layers
        The decoder's layers that deepstack features are for, where the output names them.
    """

    kind: type[Any] | None = None
    field: str = "pooler_output"
    layers: tuple[int, ...] = ()

    def output(self, rows: Any, deepstack: list[Any]) -> Any:
        """Return an output of the encoder with these rows and these features for deeper layers."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        kind: type[Any] = self.kind or BaseModelOutputWithPooling
        # Some outputs cannot be made without what a forward does not read.
        required = [each.name for each in fields(kind) if each.default is MISSING]
        output = kind(**dict.fromkeys(required), **{self.field: rows})
        if self.layers:
            deepstack = list(zip(self.layers, deepstack, strict=True))
        if deepstack or hasattr(output, "deepstack_features"):
            # An attribute and not a field: the class without deepstack has no such field.
            output.deepstack_features = deepstack
        return output


ROWS_ELSEWHERE = {
    "fuyu": Container(field="last_hidden_state"),
    "llama4": Container(field="last_hidden_state"),
}
"""Types whose forward reads another field of the encoder's output than ``pooler_output``."""

PROJECTED_LATER = {"llama4": "multi_modal_projector"}
"""Types whose forward projects the rows, and the module that does."""


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
    container
        Where the encoder's output has its rows.
    """

    rows: Tensor
    sizes: list[int]
    stacked: bool
    deepstack: list[Tensor]
    items: list[Item]
    videos_told: bool = True
    container: Container = Container()


def placeholder_id(config: Any, family: Family, modality: str) -> int:
    """Return the id of the placeholder token of `modality`, -1 where a model has none."""
    if family.videos_as_images:
        modality = "image"
    token_id: int | None = getattr(config, f"{modality}_token_id", None)
    if token_id is None:
        token_id = getattr(config, f"{modality}_token_index", -1)
    return int(token_id)


class VisionModel:
    """A vision-language model of transformers, with what its family says about it.

    Parameters
    ----------
    model
        The whole model, with its language model head.
    family
        Its family.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model: Any = model
        self.inner: Any = getattr(model, "model", model)
        self.family = family
        self._projectors: dict[str, ModelProjector] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what runs this model's own modules: a copy makes it of its own."""
        return {**self.__dict__, "_projectors": {}}

    @property
    def mrope(self) -> bool:
        """Whether positions have three axes (time, row, column)."""
        return self.family.mrope

    # Modules -----------------------------------------------------------------------------------

    def tower(self, modality: str) -> nn.Module:
        """Return the vision encoder of `modality`."""
        return self.family.tower(self.inner, modality)

    def projector(self, modality: str) -> ModelProjector:
        """Return the projector, one for all items, as a callable of features [..., C].

        Nothing of it is read before a method asks.
        """
        if modality not in self._projectors:
            module = self.family.projector(self.inner)

            def around(run: Projector, features: Tensor) -> Tensor:
                return self.family.around_projector(module, run, features)

            self._projectors[modality] = ModelProjector(module, lambda: layers_of(module), around)
        return self._projectors[modality]

    def check_projector(self, selector: Selector) -> None:
        """Raise if a method does not work with the projector; see `Selector.check_projector`."""
        selector.check_projector(self.projector("image"))

    def scoring_layer(self, inputs: EncoderInputs) -> nn.Module:
        """Return the attention module of the layer whose output is the feature.

        Raises
        ------
        UnsupportedModelError
            If it cannot be watched.
        """
        chosen: int | Sequence[int] | None = inputs.arguments.get("vision_feature_layer")
        if chosen is None:
            chosen = self.family.feature_layer
        return scoring_layer(self.tower(inputs.modality), chosen, type(self.model).__name__)

    def middle_layer(self, inputs: EncoderInputs, has_cls: bool) -> nn.Module:
        """Return the attention module of a layer in the middle of the tower; see `Family`.

        Raises
        ------
        UnsupportedModelError
            If it cannot be watched.
        """
        tower = self.tower(inputs.modality)
        number = self.family.middle_layer(has_cls, layer_count(tower))
        return layer_number(tower, number, type(self.model).__name__)

    def language_model(self) -> Any:
        """Return the language model without its head: embeddings, layers, norm.

        Raises
        ------
        UnsupportedModelError
            If its first layers cannot be run on a prompt as if it was causal.
        """
        why = self.family.why_unread()
        if why is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} {why}, and flexselect does not read that. Use "
                "flexselect-lite, or a method that needs no language model (see `tokenprune "
                "methods`)."
            )
        return self.decoder()

    def decoder(self) -> Any:
        """Return the language model without its head, whatever its attention looks like."""
        found = getattr(self.inner, "language_model", getattr(self.inner, "text_model", None))
        return getattr(found, "model", found)  # Llama 4's and Nemotron VL's have a head

    def marks(self) -> Marks:
        """Return the ids that are no words of a user."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return Marks.of(self.model.config, ends)

    def embedded(self, ids: Tensor) -> Tensor:
        """Return [Q, D], the language model's input embeddings of a text [Q]."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids[None])[0]
        return embeddings

    def as_read(self, rows: Any) -> Any:
        """Return an encoder's rows as the language model reads them, which few models make late."""
        later = PROJECTED_LATER.get(self.model.config.model_type)
        return rows if later is None else getattr(self.inner, later)(rows)

    def hooks(self) -> list[RemovableHandle]:
        """Put on the model what its own forward needs to take pruned prompts; most need nothing."""
        if self.model.config.model_type in PLACES_ROWS_IN_BLOCKS:
            return [place_kept_rows(self.inner, self.token_id("image"))]
        if self.model.config.model_type in READS_INDICATORS:
            return [give_indicators(self.inner)]
        return []

    # The prompt --------------------------------------------------------------------------------

    def frame_interval(self, modality: str) -> int:
        """Return how many steps of the first axis lie between frames whose times are not known."""
        return self.family.frame_interval(modality)

    def interval_read(
        self, modality: str, grid: Grid, unpruned: Callable[[], tuple[Tensor, Tensor]]
    ) -> int | None:
        """Return how far apart frames are counted where a set of them is read with the question.

        Parameters
        ----------
        modality, grid
            Of an item.
        unpruned
            Returns what `tokenprune.question.prompt.counted_interval` takes of the unpruned prompt.
            Families need not be asked.

        Returns
        -------
        int or None
            None for models with ordinary RoPE.
        """
        return self.frame_interval(modality) if self.mrope else None

    def has_masks_axis(self, positions: Tensor) -> bool:
        """Say whether positions [..., B, L] have an axis more, in front, than heads are turned by.

        transformers puts the number of each token in front of time, row and column.
        """
        return positions.ndim == 3 and len(positions) > (rope_axes(self.model.config) or 3)

    def check_videos_told(self, media: EncodedModality, places: Tensor) -> None:
        """Raise where a method ranks whole videos and nobody said which pictures make one.

        Parameters
        ----------
        media
            What the encoder returned.
        places
            LongTensor [R, 2] on the CPU: prompt and column of each row.

        Raises
        ------
        PromptError
            If pictures stand apart in one prompt, as a video's frames do.
        """
        if media.videos_told or len(media.items) < 2:
            return
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
        return placeholder_id(self.model.config, self.family, modality)

    def encoder_inputs(self, arguments: dict[str, Any]) -> list[EncoderInputs]:
        """Return the modalities whose pixels are among a call's arguments."""
        inputs = []
        for modality in ("image", "video"):
            function = self.encoder(modality)
            if function is None:
                continue
            given = encoder_arguments(function, arguments)
            if given is not None:
                told = None if self.family.tells_videos else arguments.get(VIDEO_FRAMES)
                inputs.append(EncoderInputs(modality, given, told))
        return inputs

    def encoder(self, modality: str) -> Any:
        """Return the method that encodes a modality; None where the model does not take it."""
        if modality == "video" and self.family.videos_by_image_encoder:
            return self._encode_video
        name = f"get_{modality}_features"
        # Some models have it beside their head and not inside.
        return getattr(self.inner, name, None) or getattr(self.model, name, None)

    def _encode_video(self, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """Encode videos with the method for images."""
        return self.encoder("image")(pixel_values_videos, **kwargs)

    def will_read(self, positions: Tensor | None) -> None:
        """Take note of the positions with which a short prompt is read next in this thread.

        None once the call is over, whether it read them or not.
        """

    def check_reading(
        self, positions: Positions, hides: bool, proportional_attention: bool
    ) -> None:
        """Raise if this model cannot read its tokens so; most of a family can.

        Parameters
        ----------
        positions, proportional_attention
            See `tokenprune_hf.prune`.
        hides
            Whether tokens stay in the prompt and are hidden (``apply="mask"``).

        Raises
        ------
        UnsupportedModelError
            Saying why.
        """
        text = self.model.config.get_text_config()
        without = int(text.num_hidden_layers) - len(attending_layers(text))
        if not without:
            return
        name = (
            f"{without} of the {text.num_hidden_layers} layers of {type(self.model).__name__}'s "
            "language model do not attend to tokens, but keep a state of all that they were given"
        )
        if hides:
            raise UnsupportedModelError(
                f"{name}: no attention mask hides a token from them. Use apply='drop'."
            )
        if proportional_attention:
            raise UnsupportedModelError(
                f"{name}: a token cannot count for several there, and proportional attention "
                "would hold in the other layers alone. Leave it out."
            )

    def encoder_arguments(self) -> set[str]:
        """Return the names of all arguments that only the vision encoders read."""
        names: set[str] = set() if self.family.tells_videos else {VIDEO_FRAMES}
        for modality in ("image", "video"):
            function = self.encoder(modality)
            if function is not None:
                names.update(encoder_names(function))
        return names - {"return_dict"}

    def encode(self, inputs: EncoderInputs, needs: Sequence[str]) -> EncodedModality:
        """Run the vision encoder once and collect what `needs` names.

        Parameters
        ----------
        inputs
            The modality and the encoder's arguments.
        needs
            Names out of `tokenprune.tokens.INPUTS`.

        Returns
        -------
        EncodedModality
            All rows and the items in them.

        Raises
        ------
        UnsupportedModelError
            If the scoring layer's attention is needed and cannot be watched.
        """
        captured: list[Tensor] = []

        def keep_input(args: tuple[Any, ...], _kwargs: object) -> None:
            captured.append(args[0])

        # Features are seen as they enter the projector: what the tower returns may have rows that
        # the model drops (CLS) or merges (pixel shuffle), each family in its way.
        entrance = entrance_of(self.family.projector(self.inner))
        with ExitStack() as stack:
            has_cls = self.family.has_cls(self.tower(inputs.modality))
            probe = middle = None
            if set(SCORING) & set(needs):
                probe = stack.enter_context(watch_attention(self.scoring_layer(inputs)))
            if set(MIDDLE) & set(needs):
                middle = stack.enter_context(watch_attention(self.middle_layer(inputs, has_cls)))
            stack.enter_context(watch_input(entrance, keep_input))
            # As the model's own forward calls it, once for all images of the batch.
            output = self.encoder(inputs.modality)(**inputs.arguments, return_dict=True)
            container = self.container(output)
            pooled = getattr(output, container.field)
            with torch.no_grad():
                read = self.as_read(pooled)
        if not captured:
            raise PromptError(f"the vision encoder was given no {inputs.modality}.")
        parts = entries_of(pooled)
        rows = torch.cat(parts)
        layers = getattr(output, "deepstack_features", None) or []
        deepstack = [torch.cat(entries_of(layer)) for layer in layers]
        with torch.no_grad():
            features = captured[0]
            if self.family.packed and len(captured) > 1:  # one picture after the other
                features = torch.cat([one.flatten(0, -2) for one in captured])
            sizes = [len(part) for part in parts]
            if not self.family.tells_videos:
                sizes = rows_per_picture(sizes, features)
            media = media_of(self.family, inputs, sizes)
            looked_at = self.family.looked_at(needs, probe, middle, media, has_cls)
            heads = 0 if probe is None else probe.key.shape[1]
            embeddings = rows if read is pooled else torch.cat(entries_of(read))
            laid_out = self.family.rows_of_all(media, features, looked_at, heads)
            items = self._items(inputs, media, embeddings, laid_out)
        told = self.family.tells_videos or inputs.video_frames is not None
        stacked = isinstance(pooled, Tensor)
        return EncodedModality(rows, sizes, stacked, deepstack, items, told, container)

    def container(self, output: Any) -> Container:
        """Return where an output of the encoder has the rows that the model reads."""
        known = ROWS_ELSEWHERE.get(self.model.config.model_type)
        return Container() if known is None else replace(known, kind=type(output))

    def _items(
        self,
        inputs: EncoderInputs,
        media: Sequence[Medium],
        rows: Tensor,
        laid_out: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    ) -> list[Item]:
        """Return the items of all images or videos, in prompt order."""
        items = []
        start = 0
        segments = [self.family.segments(medium) for medium in media]
        places = iter(places_on([one.rows for of_one in segments for one in of_one], rows.device))
        for number, (medium, of_medium) in enumerate(zip(media, laid_out, strict=True)):
            features_of_medium, looked_at = of_medium
            for segment in segments[number]:
                # Segments count from their medium's first row, items from the modality's.
                place = next(places)
                label = f"{medium.modality} {number}"
                of_rows = rows[start : start + medium.rows]
                items.append(
                    Item(
                        segment.rows + start,
                        VisualTokens(
                            grid=segment.grid or (1, 1, len(segment.rows)),
                            is_picture=segment.grid is not None,
                            features=features_of_medium[place],
                            embeddings=of_rows[place],
                            projector=self.projector(inputs.modality),
                            label=f"{label}, {segment.label}" if segment.label else label,
                            **tokens_at(looked_at, place),
                        ),
                        number,
                    )
                )
            start += medium.rows
        return items


def first_places(media: EncodedModality, places: Tensor) -> list[list[int]]:
    """Return prompt and column of each item's first row, which is where the item stands.

    Parameters
    ----------
    media
        What the encoder returned.
    places
        LongTensor [R, 2] on the CPU: prompt and column of each row.
    """
    return [places[item.rows[0]].tolist() for item in media.items]


def items_in_prompt(
    modalities: Mapping[str, EncodedModality], placeholders: Mapping[str, Tensor]
) -> list[tuple[str, int]]:
    """Return modality and number of every item, in prompt order.

    Items come by modality, and a prompt may have its images and videos in any order. An item stands
    where its first row does: prompt, then column.

    Parameters
    ----------
    modalities
        What the encoder returned.
    placeholders
        Modality -> LongTensor [R, 2] on the CPU: prompt and column of each row.
    """
    first_row = {
        (modality, index): place
        for modality, media in modalities.items()
        for index, place in enumerate(first_places(media, placeholders[modality]))
    }
    return sorted(first_row, key=first_row.__getitem__)


def entries_of(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the rows [n, D] of each entry of whatever container an encoder returns."""
    entries = value[None] if isinstance(value, Tensor) and value.ndim == 2 else value
    return [entry.reshape(-1, entry.shape[-1]) for entry in entries]


def supported_models() -> dict[str, type[Family]]:
    """Return `config.model_type` -> family, for every model that can be pruned."""
    return {name: family for name, family in FAMILIES.items() if family.in_transformers}


def vision_model(model: object) -> VisionModel:
    """Return a model of transformers, or the one inside a wrapper, with its family.

    Raises
    ------
    UnsupportedModelError
        If it is no model with a language model head and `generate`, or of no known family.
    """
    known = supported_models()
    inside = whole_model(model)
    kind = inside.config.model_type
    if kind not in known:
        raise UnsupportedModelError(
            f"{type(inside).__name__} (model_type {kind!r}) is of no family that can be used here. "
            f"Supported: {', '.join(sorted(known))}."
        )
    return VisionModel(inside, known[kind](inside.config))


def whole_model(model: object) -> Any:
    """Return a model of transformers, or the one inside a wrapper.

    Raises
    ------
    UnsupportedModelError
        If it is no model with a language model head and `generate`.
    """
    from transformers import PreTrainedModel

    inside = model_inside(model)
    # Whatever else has a config and generates may run something else than its own modules.
    whole = isinstance(inside, PreTrainedModel) and hasattr(inside, "generate")
    if getattr(getattr(inside, "config", None), "model_type", None) is None or not whole:
        raise UnsupportedModelError(
            f"{type(inside).__name__} is no vision-language model of transformers with `generate`. "
            "Pass the whole model, for example what "
            "AutoModelForImageTextToText.from_pretrained returned."
        )
    return inside


USUAL = ("features", "embeddings", "cls_attention", "projector")
"""What most methods look at; the rest of `ENCODED` may take more room than the image."""


def check_selector(selector: Selector, vision: VisionModel) -> None:
    """Raise unless a selector can serve a model.

    Raises
    ------
    UnsupportedModelError
        Saying why it cannot.
    OptionError
        If an option asks for what this model's projector does not allow.
    """
    vision.family.check_selector(selector)
    selector.check_model(vision.model.config)
    if selector.merges and vision.model.config.model_type in PROJECTED_LATER:
        raise UnsupportedModelError(
            f"method {selector.name!r} adds tokens up, and {type(vision.model).__name__} sends "
            "what its encoder returns through another layer, which would be given the sums. Use a "
            "method that merges nothing (see `tokenprune methods`)."
        )
    if "projector" in selector.needs:
        vision.check_projector(selector)
