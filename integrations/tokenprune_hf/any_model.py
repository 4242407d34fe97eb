"""Models of any type: pruned without a family of their own, by what transformers says of all.

Every model whose forward takes ``mm_encoder_outputs`` can be handed the rows that stay, and counts
its own positions on the unpruned prompt. How rows lie in a picture is not known, nor where the
tower and the projector are. So an item is what the encoder returns as one entry (an image, a tile,
or all images of a prompt), it is no picture, and methods that look at embeddings or at nothing run.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.config import Positions
from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.families.any import AnyFamily, has_mrope
from tokenprune.selectors.base import Selector
from tokenprune.tokens import VisualTokens
from tokenprune.tower.structure import of_noise, same
from tokenprune_hf.attached import ThreadState
from tokenprune_hf.encoder_inputs import EncoderInputs
from tokenprune_hf.vision import (
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
        taken = inspect.signature(type(model).forward).parameters
        # A model that is told which tokens are an image's may let them see each other both ways.
        causal = not {"token_type_ids", "mm_token_type_ids"} & set(taken)
        # Positions on three axes are asked of the model, and nothing here counts them.
        causal = causal and not has_mrope(model.config)
        super().__init__(model, AnyFamily(model.config, causal=causal))
        self._pictures_of: dict[bytes, list[Tensor]] = {}
        self._expected = _Expected()
        self._arrived = False

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

    def encode(self, inputs: EncoderInputs, needs: Sequence[str]) -> EncodedModality:
        """Run the vision encoder once; see `VisionModel.encode`."""
        output, entries = self._run(inputs.modality, inputs.arguments)
        rows = torch.cat(entries)
        sizes = [len(entry) for entry in entries]
        with torch.no_grad():
            items = [
                Item(of_picture, self._tokens(rows, of_picture, f"{inputs.modality} {number}"))
                for number, of_picture in enumerate(self._pictures(inputs, rows, sizes))
                if len(of_picture)
            ]
        layers = getattr(output, "deepstack_features", None) or []
        deepstack = [torch.cat(entries_of(layer)) for layer in layers]
        stacked = isinstance(output.pooler_output, Tensor)
        return EncodedModality(rows, sizes, stacked, deepstack, items, kind=type(output))

    def _run(self, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
        """Return what the encoder returns, and its rows [n, D] for each entry."""
        output = self.encoder(modality)(**arguments, return_dict=True)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise UnsupportedModelError(
                f"the encoder of {type(self.model).__name__} returns its rows otherwise than in "
                "pooler_output, and tokenprune does not know how the model reads them."
            )
        entries = entries_of(pooled)
        if not entries:
            raise PromptError(f"the vision encoder was given no {modality}.")
        return output, entries

    def _tokens(self, rows: Tensor, of_picture: Tensor, label: str) -> VisualTokens:
        grid = (1, 1, len(of_picture))
        return VisualTokens(grid, embeddings=rows[of_picture], is_picture=False, label=label)

    # Rows that are no part of a picture --------------------------------------------------------

    def _pictures(self, inputs: EncoderInputs, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return LongTensors, of each entry the rows that hold something of the pixels.

        The others (newlines, separators) are the same whatever the picture, so the encoder is run
        once more, on noise, and what it returns again is one. Which rows these are depends on the
        sizes of the images alone, and is remembered for them: not on the weights, which may be
        trained meanwhile, nor on what was encoded before.
        """
        layout = _layout(inputs, sizes)
        if layout not in self._pictures_of:
            _, others = self._run(inputs.modality, of_noise(inputs.arguments))
            holds_pixels = ~same(rows, torch.cat(others)).cpu()
            numbers = torch.arange(len(rows)).split(list(sizes))
            parts = holds_pixels.split(list(sizes))
            # At the end, so that another thread finds all of it or nothing.
            self._pictures_of[layout] = [
                in_entry[part] for in_entry, part in zip(numbers, parts, strict=True)
            ]
        return [of_picture.to(rows.device) for of_picture in self._pictures_of[layout]]


def _layout(inputs: EncoderInputs, sizes: Sequence[int]) -> bytes:
    """Return what tells how rows lie: all that an encoder is given but the pixels' values."""
    digest = hashlib.sha256(repr((inputs.modality, list(sizes))).encode())
    for name, value in sorted(inputs.arguments.items()):
        if isinstance(value, Tensor) and name.startswith("pixel_values"):
            value = value.shape
        elif isinstance(value, Tensor):
            value = (value.shape, value.cpu().numpy().tobytes())
        digest.update(repr((name, value)).encode())
    return digest.digest()


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
    if inside.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(inside).__name__} (model_type {kind!r}) has an encoder for its text, where "
            "visual tokens cannot be dropped. Use a model whose language model is a decoder alone."
        )
    if "mm_encoder_outputs" in inspect.signature(type(inside).forward).parameters:
        return AnyModel(inside)
    raise UnsupportedModelError(
        f"{type(inside).__name__} (model_type {kind!r}) cannot be pruned. Supported: "
        f"{', '.join(sorted(known))}, and any model whose forward takes mm_encoder_outputs."
    )


def check_method(selector: Selector, model: object) -> None:
    """Raise unless the method can serve a model of transformers, see `check_selector`."""
    check_selector(selector, vision_model_of_any_type(model))


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
    taken = () if found is None else inspect.signature(found.forward).parameters
    if kind in known or ("mm_encoder_outputs" in taken and not config.is_encoder_decoder):
        return
    raise UnsupportedModelError(
        f"{name} is a model of the type {kind!r}, which cannot be pruned. Supported: "
        f"{', '.join(sorted(known))}, and the other types of AutoModelForImageTextToText whose "
        "forward takes mm_encoder_outputs."
    )
