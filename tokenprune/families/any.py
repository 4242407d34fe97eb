"""AnyFamily: models whose type has no family; an engine says of them what it says of all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family, ModelConfig, check_adapters_gather
from tokenprune.families.modules import Plain, layers_in_a_row, layers_of
from tokenprune.tower.layouts import Grid, Medium, Segment
from tokenprune.tower.model_projector import ModelProjector
from tokenprune.tower.projectors import MLPProjector
from tokenprune.tower.tracing import Chain, Way


def rope_axes(config: Any) -> int:
    """Return on how many axes a model counts positions, by the rotary embeddings' parameters.

    0 where they do not say, which is one axis.

    Parameters
    ----------
    config
        Of transformers' kind; what stands beside those parameters is not looked at.
    """
    of = {"whole": config, "text": config.get_text_config()}
    parameters = {name: getattr(one, "rope_parameters", None) for name, one in of.items()}
    return max(map(len, rope_sections(parameters)), default=0)


def rope_sections(values: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """Yield how rotary embeddings share their parts among axes, wherever a config says it.

    Parameters
    ----------
    values
        Of a config, mappings inside mappings; some have one for each kind of layer.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from rope_sections(value)
        elif name in ("mrope_section", "xdrope_section") and value:
            yield value


def has_mrope(config: Any) -> bool:
    """Say whether a model counts positions on several axes; see `rope_axes`."""
    return rope_axes(config) > 1


def can_be_counted(config: Any) -> bool:
    """Say whether prompts of a model may be counted as `positions_on_axes` does, or token by token.

    On several axes each item is compared with what the model itself counts; see `counted_interval`.
    """
    return rope_axes(config) in (0, 1, 3)


def not_counted(model: str) -> UnsupportedModelError:
    """Return the error for an item that is not counted as `counted_interval` knows it.

    Parameters
    ----------
    model
        What to call the model.
    """
    return UnsupportedModelError(
        f"this method reads tokens together with the question, and {model} counts the positions of "
        "this image or video otherwise than frame by frame, row by row and column by column. "
        f"{USE_ANOTHER}"
    )


TRACED = frozenset({"features", "cls_attention", "projector"})
"""What selectors look at that has to be found behind the rows; see `tokenprune.tower.tracing`."""

USE_ANOTHER = (
    "Use a method that needs embeddings or nothing, such as information, divprune or uniform (see "
    "`tokenprune methods`)."
)
"""What to do where a method looks at what is not known."""


def check_given(method: str, needs: Sequence[str], given: Collection[str], model: str) -> None:
    """Raise if a method looks at what is not given.

    Parameters
    ----------
    method, needs
        See `Family.check_needs`.
    given
        What there is to look at.
    model
        What to call the model in the error.

    Raises
    ------
    UnsupportedModelError
        Naming what the method needs.
    """
    unknown = [need for need in needs if need not in given]
    if unknown:
        raise UnsupportedModelError(
            f"method {method!r} looks at {', '.join(unknown)}, and tokenprune does not know where "
            f"{model} has that. {USE_ANOTHER}"
        )


def found_projector(way: Way, plain: Plain = lambda layer: layer) -> ModelProjector:
    """Return a projector that was found, which selectors can call and read.

    Parameters
    ----------
    way
        From tower to rows.
    plain
        See `tokenprune.families.modules.Plain`.
    """
    module = way.module()

    def read() -> MLPProjector:
        if isinstance(module, Chain):
            return layers_in_a_row(list(module.parts), plain)
        mlp = layers_of(module, plain)
        if mlp.first.weight.shape[1] != way.width:
            raise LookupError("its first layer is given a part of what makes a token")
        return mlp

    return ModelProjector(module, read, way.around)


def told_grid(config: Any, patches: Sequence[int], rows: int) -> Grid | None:
    """Return frames, rows and columns of a picture's tokens, by those of its patches.

    Parameters
    ----------
    config
        The model's.
    patches
        Frames, and rows and columns of patches, as processors say them (``image_grid_thw``).
    rows
        How many the encoder returns for it. Where it returns others besides, or fewer (frames that
        were averaged), they lie in a way not told, and there is no grid.
    """
    merge: int | None = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if merge is None:
        return None
    frames, height, width = patches
    # Some put the frames of a video together two by two, and an image is a frame by itself.
    together = getattr(config.vision_config, "temporal_merge_size", 1) if frames > 1 else 1
    grid = frames // together, height // merge, width // merge
    whole = (grid[0] * together, grid[1] * merge, grid[2] * merge) == (frames, height, width)
    return grid if whole and math.prod(grid) == rows else None


class AnyFamily(Family):
    """A model whose rows are known, and seldom how they lie, nor what they were made of.

    Parameters
    ----------
    config
        The model's.
    mrope
        Whether the model itself counts positions on three axes.
    causal
        Whether each of its tokens sees the tokens in front of it and no others, images' too, and
        its first layers can be run on a prompt.

    Attributes
    ----------
    given
        What there is for selectors to look at.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, mrope: bool = False, causal: bool = False) -> None:
        super().__init__(config)
        # Of a family, all models count alike; here each is asked.
        self.mrope = mrope  # type: ignore[misc]
        self.given = {"embeddings", "question", "question_embeddings"}  # engines add what they find
        if self.taps:
            self.given.add("deepstack")
        if causal and can_be_counted(config):
            self.given.add("query_attention")

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return all rows of an image or video together, with a grid where the inputs tell one."""
        grid = medium.grid and told_grid(self.config, medium.grid, medium.rows)
        return [Segment(torch.arange(medium.rows), grid)]

    def check_needs(self, method: str, needs: Sequence[str]) -> None:
        """Raise if a method looks at what is not known of the model; see `Family.check_needs`."""
        check_adapters_gather(method, needs)
        check_given(method, needs, self.given, f"a model of the type {self.config.model_type!r}")
