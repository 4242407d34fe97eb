"""Models of any type: pruned without a family of their own, by what transformers says of all.

Every model whose forward takes ``mm_encoder_outputs`` can be handed the rows that stay, and counts
its own positions on the unpruned prompt. Nobody said how rows lie in a picture, unless the inputs
tell a grid, so an item is what the encoder returns as one entry (an image, a tile, or all images of
a prompt). Methods that look at embeddings or at nothing run, and those that read the question where
the decoder can be read. What else they look at, features, attention and projector, is found by
running the encoder on noise (`tokenprune_hf.tracing`), or refused with the reason.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Budget
from tokenprune.config import Positions
from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.families.any import (
    TRACED,
    USE_ANOTHER,
    AnyFamily,
    found_projector,
    has_mrope,
    not_counted,
    told_grid,
)
from tokenprune.inside.base import InsideMethod
from tokenprune.question.prompt import counted_interval
from tokenprune.remembered import Remembered
from tokenprune.selectors.base import Selector
from tokenprune.tokens import VisualTokens
from tokenprune.tower.any_attention import check_lengths
from tokenprune.tower.layouts import Grid, places_on
from tokenprune.tower.model_projector import ModelProjector
from tokenprune.tower.structure import of_noise, same
from tokenprune.tower.tracing import NotFoundError, Way
from tokenprune_hf.attached import ThreadState
from tokenprune_hf.encoder_inputs import EncoderInputs
from tokenprune_hf.inside.layers import InsideLayers
from tokenprune_hf.prefix import can_be_read
from tokenprune_hf.tracing import Behind, Tracer, looked_at, watching
from tokenprune_hf.vision import (
    PROJECTED_LATER,
    ROWS_ELSEWHERE,
    Container,
    EncodedModality,
    Item,
    VisionModel,
    check_selector,
    entries_of,
    supported_models,
    vision_model,
    whole_model,
)

COMPACT_ONLY = {
    "minimax_m3_vl": "it looks up blocks of columns by a token's position",
}
"""Types whose tokens cannot keep the positions of the unpruned prompt, and why."""

_OWN_GENERATE = (
    "its `generate` encodes the images itself and hands neither rows nor positions on; an image is "
    "32 tokens as it is"
)
REFUSED = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _OWN_GENERATE),
    "diffusion_gemma": "it writes blocks of text at once, with a `generate` of its own",
}
"""Types that take rows and cannot be pruned all the same, and why."""

Layout = tuple[bytes, tuple[int, ...]]
"""What tells how rows lie (`_layout`), and the rows of each item."""

LINE_ENDS = {"apertus1p5": None, "chameleon": None, "emu3": "<|extra_200|>"}
"""Types whose rows are embeddings of codes, and the token that ends a line, in `vocabulary_map`.

Noise may have the codes of a picture, so it does not tell which rows are structure.
"""


_PATCHES = "image_patches"
"""What Fuyu's pixel values were called until transformers 5.23."""


class _Expected(ThreadState):
    """The positions of the short prompt that this thread's call reads next, until it does."""

    positions: Tensor | None = None


class AnyModel(VisionModel):
    """A model of transformers whose type has no family.

    Parameters
    ----------
    model
        The whole model, with its language model head.
    """

    def __init__(self, model: Any) -> None:
        # A model whose images' tokens see each other both ways makes its masks itself, and says so
        # here for `generate` with static caches.
        causal = not hasattr(type(model), "create_masks_for_generate")
        # Positions are the model's own, and never counted anew as those of families with M-RoPE.
        family = AnyFamily(model.config, causal=causal and can_be_read(model.get_decoder()))
        super().__init__(model, family)
        self._tracer = Tracer(model, model.get_decoder())
        if self._tracer.layers and model.config.model_type not in (*LINE_ENDS, *PROJECTED_LATER):
            family.given |= TRACED
        self._pictures_of: Remembered[Layout, list[Tensor]] = Remembered()
        self._behind_of: Remembered[bytes, Behind] = Remembered()
        self._sound: Remembered[tuple[Layout, bool], bool] = Remembered()
        self._found_projectors: dict[str, tuple[Way, ModelProjector]] = {}
        self._expected = _Expected()
        self._arrived = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what knows this model's own modules: a copy finds it in its own."""
        tracer = Tracer(self.model, self.model.get_decoder())
        own: dict[str, Any] = {
            "_behind_of": Remembered(),
            "_found_projectors": {},
            "_sound": Remembered(),
        }
        return {**super().__getstate__(), "_tracer": tracer, **own}

    # Positions ---------------------------------------------------------------------------------

    def check_reading(
        self, positions: Positions, hides: bool, proportional_attention: bool
    ) -> None:
        """Raise if this model cannot read its tokens so.

        Raises
        ------
        UnsupportedModelError
            Saying why.
        """
        kind = self.model.config.model_type
        if positions == "original" and kind in COMPACT_ONLY:
            raise UnsupportedModelError(
                f"a model of the type {kind!r} cannot keep tokens at their own positions: "
                f"{COMPACT_ONLY[kind]}. Use positions='compact'."
            )
        if hides:
            raise UnsupportedModelError(
                f"a model of the type {kind!r} may have layers that look past the attention mask, "
                "and tokens would not be hidden from them. Use apply='drop'."
            )
        if proportional_attention:
            raise UnsupportedModelError(
                f"a model of the type {kind!r} may have layers that do not attend, and "
                "proportional attention would count tokens in the others alone. Leave it out."
            )

    def decoder(self) -> Any:
        """Return the language model without its head; see `VisionModel.decoder`."""
        found = self.model.get_decoder()
        return found if hasattr(found, "layers") else getattr(found, "model", found)

    def interval_read(
        self, modality: str, grid: Grid, unpruned: Callable[[], tuple[Tensor, Tensor]]
    ) -> int | None:
        """Return how far apart the model counts frames; see `VisionModel.interval_read`."""
        if not has_mrope(self.model.config):
            return None
        positions, is_visual = unpruned()
        if len(positions) == 1:  # a config may have sections and the model count on one axis
            return None
        interval = counted_interval(positions, is_visual, grid)
        if interval is None:
            raise not_counted(type(self.model).__name__)
        return interval

    def will_read(self, positions: Tensor | None) -> None:
        """Take note of the positions with which a short prompt is read next in this thread."""
        self._expected.positions = positions

    def hooks(self) -> list[RemovableHandle]:
        """Watch that the language model is given the positions that its short prompt has."""
        decoder: nn.Module = self.model.get_decoder()
        hook = decoder.register_forward_pre_hook(self._check_arrived, with_kwargs=True)
        return [*super().hooks(), hook]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check_arrived(
        self, _decoder: nn.Module, _args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise if the model counts positions itself, whatever it is told.

        Raises
        ------
        UnsupportedModelError
            Saying what to do.
        """
        expected, self._expected.positions = self._expected.positions, None
        if expected is None or self._arrived:  # looked at once: on a GPU it waits for the device
            return
        given = kwargs.get("position_ids")
        # Of several axes the last one tells, and of a batch, the last prompt. Some models count
        # from 1, which moves all tokens alike.
        told = None if given is None else given.reshape(-1, given.shape[-1])[-1]
        wanted = expected.reshape(-1, expected.shape[-1])[-1]
        if told is None or told.shape != wanted.shape or bool((told - wanted).unique().numel() > 1):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} counts positions itself and does not take those of "
                "the unpruned prompt. Use positions='compact'."
            )
        self._arrived = True

    # Items -------------------------------------------------------------------------------------

    def encoder_inputs(self, arguments: dict[str, Any]) -> list[EncoderInputs]:
        """Return the modalities whose pixels are among a call's arguments.

        Raises
        ------
        UnsupportedModelError
            If images are given under a name that is not known, and would be read unpruned.
        """
        if arguments.get(_PATCHES) is not None:
            arguments = {**arguments, "pixel_values": arguments[_PATCHES]}
        found = super().encoder_inputs(arguments)
        input_ids: Tensor | None = arguments.get("input_ids")
        for inputs in found:
            if input_ids is not None:
                inputs.placeholders = input_ids == self.token_id(inputs.modality)
        unknown = [name for name, value in arguments.items() if _may_be_pixels(name, value)]
        if not found and unknown:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is given {', '.join(unknown)}, and tokenprune does "
                "not know which encoder reads that."
            )
        return found

    def encoder_arguments(self) -> set[str]:
        """Return the names of all arguments that only the vision encoders read."""
        return super().encoder_arguments() | {_PATCHES}

    def encode(self, inputs: EncoderInputs, needs: Sequence[str]) -> EncodedModality:
        """Run the vision encoder once; see `VisionModel.encode`."""
        traced = TRACED & set(needs)
        layout = _layout(inputs)
        behind = self._behind(inputs, layout, traced) if traced else None
        with ExitStack() as stack:
            seen = None
            if behind is not None:
                seen = stack.enter_context(watching(behind.way, "cls_attention" in traced))
            output, entries = self._run(inputs.modality, inputs.arguments)
        rows = torch.cat(entries)
        container = self.container(output)
        sizes = self._sizes(inputs, entries)
        with torch.no_grad():
            grids = self._grids(inputs, sizes)
            pictures = self._pictures(inputs, layout, rows, sizes)
            more: Mapping[str, Any] = {}
            if behind is not None and seen is not None:
                self._check_found(behind, (layout, tuple(sizes)), pictures, traced)
                more = looked_at(behind, seen, traced)
            found = [one for one in enumerate(zip(pictures, grids, strict=True)) if len(one[1][0])]
            places = places_on([own for _, (own, _) in found], rows.device)
            items = [
                Item(
                    own,
                    self._tokens(rows, len(own), place, grid, f"{inputs.modality} {number}", more),
                    number,
                )
                for (number, (own, grid)), place in zip(found, places, strict=True)
            ]
            if behind is not None and "projector" in traced:
                projector = self._found_projector(inputs.modality, behind)
                items = [
                    replace(item, tokens=replace(item.tokens, projector=projector))
                    for item in items
                ]
        if not items:
            raise UnsupportedModelError(
                f"the encoder of {type(self.model).__name__} returns the same {len(rows)} rows for "
                "any picture, and none of them may be dropped. Load its trained weights."
            )
        layers = getattr(output, "deepstack_features", None) or []
        if container.layers:
            layers = [features for _, features in layers]
        deepstack = [torch.cat(entries_of(layer)) for layer in layers]
        stacked = isinstance(_rows_in(output, container), Tensor)
        return EncodedModality(rows, sizes, stacked, deepstack, items, container=container)

    # What stands behind rows --------------------------------------------------------------------

    def _behind(self, inputs: EncoderInputs, layout: bytes, needs: Collection[str]) -> Behind:
        """Return what stands behind the rows of images of these sizes.

        Raises
        ------
        UnsupportedModelError
            If what is needed could not be found.
        """

        def run() -> Tensor:
            return torch.cat(self._run(inputs.modality, of_noise(inputs.arguments))[1])

        try:
            with torch.no_grad():
                behind = self._behind_of.made(layout, lambda: self._tracer.behind(run)[0])
        except NotFoundError as error:
            raise self._not_found(needs, str(error)) from error
        if "cls_attention" in needs and behind.unscored:
            raise self._not_found(["cls_attention"], behind.unscored)
        return behind

    def _check_found(
        self,
        behind: Behind,
        layout: Layout,
        pictures: Sequence[Tensor],
        needs: Collection[str],
    ) -> None:
        """Raise unless tokens were found behind every row that holds something of the pixels."""
        scored = "cls_attention" in needs
        if self._sound.get((layout, scored)):
            return  # to look at it waits for the device
        if bool((behind.places.tokens[torch.cat(list(pictures))] < 0).any()):
            raise self._not_found(
                needs, "some rows are made otherwise than by the projector that was found"
            )
        if scored and behind.lengths is not None:
            try:
                for of_picture in pictures:
                    check_lengths(behind.lengths, behind.places.tokens[of_picture])
            except NotFoundError as error:
                raise self._not_found(["cls_attention"], str(error)) from error
        self._sound.put((layout, scored), True)

    def _not_found(self, needs: Collection[str], why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"this method looks at {', '.join(sorted(needs))}, which tokenprune did not find in "
            f"{type(self.model).__name__}: {why}. {USE_ANOTHER}"
        )

    def check_projector(self, selector: Selector) -> None:
        """Leave the projector to the first call, which finds it."""

    def _found_projector(self, modality: str, behind: Behind) -> ModelProjector:
        way, known = self._found_projectors.get(modality, (None, None))
        if known is None or way is not behind.way:
            known = found_projector(behind.way)
            self._found_projectors[modality] = behind.way, known
        return known

    def _run(self, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
        """Return what the encoder returns, and its rows [n, D] for each entry."""
        output = self.encoder(modality)(**arguments, return_dict=True)
        entries = entries_of(_rows_in(output, self.container(output)))
        if not entries:
            raise PromptError(f"the vision encoder was given no {modality}.")
        return output, entries

    def container(self, output: Any) -> Container:
        """Return where an output of the encoder has the rows that the model reads.

        Raises
        ------
        UnsupportedModelError
            If that is not known.
        """
        if self.model.config.model_type in ROWS_ELSEWHERE:
            return super().container(output)
        if getattr(output, "pooler_output", None) is not None:
            return Container(type(output))
        layers = getattr(output, "deepstack_features", None)
        if layers and all(isinstance(layer, tuple) for layer in layers):
            # Rows for several layers of the decoder, the first of which reads them as its tokens.
            return Container(type(output), layers=tuple(number for number, _ in layers))
        raise UnsupportedModelError(
            f"the encoder of {type(self.model).__name__} returns its rows otherwise than in "
            "pooler_output, and tokenprune does not know how the model reads them."
        )

    def _sizes(self, inputs: EncoderInputs, entries: Sequence[Tensor]) -> list[int]:
        """Return the rows of each item: of an entry or, where an entry is one row, of an image.

        Raises
        ------
        PromptError
            If the prompt is not there to say which rows are an image's.
        """
        sizes = [len(entry) for entry in entries]
        total = sum(sizes)
        places = inputs.placeholders
        if set(sizes) == {1}:
            found = [] if places is None else _runs(places)
            if sum(found) != total:
                raise PromptError(
                    f"{type(self.model).__name__} does not say which rows are one "
                    f"{inputs.modality}'s, and the prompt has {sum(found)} placeholders for "
                    f"{total} rows. Pass input_ids and pixel values of one and the same processor "
                    "call."
                )
            return found
        # An entry may hold the images of several prompts, and what stays of one would hang on the
        # others.
        edges = {0, *itertools.accumulate(sizes)}
        if places is not None and len(places) > 1:
            ends = places.sum(dim=1).cumsum(0).tolist()
            edges.update(ends if ends[-1] == total else [])
        return [end - start for start, end in itertools.pairwise(sorted(edges))]

    def _grids(self, inputs: EncoderInputs, sizes: Sequence[int]) -> list[Grid | None]:
        """Return frames, rows and columns of each entry's tokens, where the inputs tell them."""
        told: Tensor | None = inputs.told.get(f"{inputs.modality}_grid_thw")
        if told is None or len(told) != len(sizes):
            return [None] * len(sizes)
        return [
            told_grid(self.model.config, patches, size)
            for patches, size in zip(told.tolist(), sizes, strict=True)
        ]

    def _tokens(
        self,
        rows: Tensor,
        size: int,
        of_picture: slice | Tensor,
        grid: Grid | None,
        label: str,
        more: Mapping[str, Any],
    ) -> VisualTokens:
        if grid is not None and math.prod(grid) != size:
            grid = None  # some rows are structure
        return VisualTokens(
            grid or (1, 1, size),
            embeddings=self.as_read(rows[of_picture]),
            is_picture=grid is not None,
            label=label,
            # The heads come first, and rows last.
            **{
                name: value[of_picture] if name == "features" else value[:, of_picture]
                for name, value in more.items()
            },
        )

    # Rows that are no part of a picture --------------------------------------------------------

    def _pictures(
        self, inputs: EncoderInputs, layout: bytes, rows: Tensor, sizes: Sequence[int]
    ) -> list[Tensor]:
        """Return LongTensors on the CPU, of each entry the rows that hold something of the pixels.

        The others (newlines, separators) are the same whatever the picture, so the encoder is run
        once more, on noise, and what it returns again is one. Which rows these are depends on the
        sizes of the images alone, and is remembered for them: not on the weights, which may be
        trained meanwhile, nor on what was encoded before.
        """
        numbers = torch.arange(len(rows)).split(list(sizes))
        kind = self.model.config.model_type

        def find() -> list[Tensor]:
            if kind in LINE_ENDS:
                holds_pixels = ~self._ends_line(rows, LINE_ENDS[kind]).cpu()
            else:
                _, others = self._run(inputs.modality, of_noise(inputs.arguments))
                holds_pixels = ~same(rows, torch.cat(others)).cpu()
            parts = holds_pixels.split(list(sizes))
            return [in_entry[part] for in_entry, part in zip(numbers, parts, strict=True)]

        return self._pictures_of.made((layout, tuple(sizes)), find)

    def _ends_line(self, rows: Tensor, token: str | None) -> Tensor:
        """Return BoolTensor [R], where rows are the embedding of the token that ends a line."""
        if token is None:
            return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        token_id = self.model.config.vocabulary_map[token]
        ids = torch.tensor(token_id, device=rows.device)
        line_end: Tensor = self.model.get_input_embeddings()(ids)
        return (rows == line_end).all(dim=-1)


def _may_be_pixels(name: str, value: object) -> bool:
    """Say whether an argument of a call seems to be an image or a video."""
    numbers = isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point()
    return numbers and any(word in name for word in ("image", "pixel", "video"))


def _rows_in(output: Any, container: Container) -> Any:
    """Return what holds the rows that the decoder's first layer reads."""
    if container.layers:
        return output.deepstack_features[0][1]
    return getattr(output, container.field)


def _runs(placeholders: Tensor) -> list[int]:
    """Return how many True stand side by side in BoolTensor [B, L], row by row."""
    apart = nn.functional.pad(placeholders, (0, 1)).flatten()
    ones, counts = torch.unique_consecutive(apart, return_counts=True)
    runs: list[int] = counts[ones].tolist()
    return runs


def _layout(inputs: EncoderInputs) -> bytes:
    """Return what tells how rows lie: all that an encoder is given but the pixels' values."""
    digest = hashlib.sha256(inputs.modality.encode())
    for name, value in sorted(inputs.told.items()):
        if isinstance(value, Tensor) and name.startswith("pixel_values"):
            value = value.shape
        elif isinstance(value, Tensor):
            value = (value.shape, value.cpu().numpy().tobytes())
        digest.update(repr((name, value)).encode())
    return digest.digest()


def why_refused(architecture: type, config: Any) -> str | None:
    """Return why models of a class without a family cannot be pruned; None where they can.

    Parameters
    ----------
    architecture
        A class of transformers.
    config
        A config of its kind.
    """
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    forward: Any = architecture.forward  # type: ignore[attr-defined]
    takes_rows = "mm_encoder_outputs" in inspect.signature(forward).parameters
    said = getattr(architecture, "input_modalities", ())
    reads = (said,) if isinstance(said, str) else tuple(said)
    # A class that does not say what it reads says text.
    sees = bool({"image", "video"} & set(reads)) or hasattr(config, "vision_config")
    if reads and not sees and not takes_rows:
        return f"it reads {' and '.join(reads)} and no images"
    if config.is_encoder_decoder:
        return "it has an encoder for its text, where visual tokens cannot be dropped"
    if hasattr(config, "thinker_config"):
        return "it is several models in one. Pass the one that reads images, its `thinker`"
    if not takes_rows:
        return "its forward takes no rows of an encoder (mm_encoder_outputs)"
    return None


def vision_model_of_any_type(model: object) -> VisionModel:
    """Return a model of transformers with its family or, where its type has none, without one.

    Raises
    ------
    UnsupportedModelError
        If it is no model with a language model head and `generate`, or cannot be handed the rows
        that its encoder returned.
    """
    inside = whole_model(model)
    kind = inside.config.model_type
    known = supported_models()
    if kind in known:
        return vision_model(inside)
    reason = why_refused(type(inside), inside.config)
    if reason is None:
        return AnyModel(inside)
    raise UnsupportedModelError(
        f"{type(inside).__name__} (model_type {kind!r}) cannot be pruned: {reason}. Supported: "
        f"{', '.join(sorted(known))}, and any model with a decoder alone whose forward takes "
        "mm_encoder_outputs."
    )


def check_method(method: Selector | InsideMethod, model: object) -> None:
    """Raise unless a method can serve a model of transformers; see `check_selector`.

    For a method inside the language model see `tokenprune_hf.inside.layers.InsideLayers`.
    """
    vision = vision_model_of_any_type(model)
    if isinstance(method, InsideMethod):
        InsideLayers(vision, method, Budget.of(1.0))
    else:
        check_selector(method, vision)


def check_type(config: Any, name: str) -> None:
    """Raise unless models of a config's type can be pruned, before their weights are read.

    Parameters
    ----------
    config
        As transformers read it.
    name
        What to call the model in the error.

    Raises
    ------
    UnsupportedModelError
        If they cannot.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as CLASSES

    kind = config.model_type
    known = supported_models()
    found: Any = CLASSES.get(type(config), None)
    if found is None:
        reason: str | None = "it is no model of images and text that transformers knows"
    else:
        reason = why_refused(found, config)
    if kind in known or reason is None:
        return
    raise UnsupportedModelError(
        f"{name} is a model of the type {kind!r}, which cannot be pruned: {reason}. Supported: "
        f"{', '.join(sorted(known))}, and the other types of AutoModelForImageTextToText whose "
        "forward takes mm_encoder_outputs."
    )
