"""What stands behind the rows of a model of no family, found while its own encoder runs on noise.

`tokenprune.tower.tracing` follows values from the rows back to the tower; here the modules of
transformers are watched for it, for one set of image sizes after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenprune.errors import reason_of
from tokenprune.tower.any_attention import (
    Pictures,
    check_attention,
    check_scored,
    has_cls,
    mean_of_tokens,
    scores_of,
)
from tokenprune.tower.tracing import (
    Call,
    Layer,
    NotFoundError,
    Places,
    Way,
    find_way,
    is_attention,
    layers_that_attend,
    to_watch,
    watch_calls,
)
from tokenprune_hf.attention import SeenAttention, watch_runs


@dataclass(frozen=True, eq=False)
class Behind:
    """What stands behind the rows of images of the same sizes.

    Attributes
    ----------
    way
        From tower to rows.
    places
        Of each row.
    pictures
        Of each run of the scoring layer, which tokens see each other.
    lengths
        LongTensor [n], of each token how many see it.
    has_cls
        Whether the first token of each picture is a CLS token.
    unscored
        Why attention is not known; empty where it is.
    """

    way: Way
    places: Places
    pictures: Sequence[Pictures] = ()
    lengths: Tensor | None = None
    has_cls: bool = False
    unscored: str = ""


@dataclass
class Seen:
    """What hooks saw while the encoder ran once."""

    calls: list[Call] = field(default_factory=list)
    runs: list[SeenAttention] = field(default_factory=list)


class Tracer:
    """Finds what stands behind the rows of one model.

    Parameters
    ----------
    model
        The module that holds tower, projector and language model.
    decoder
        The language model.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self._model = model
        self._besides: Collection[nn.Module] = (decoder,)
        self.layers: list[Layer] = layers_that_attend(model, is_attention, self._besides)
        self._last: Way | None = None

    def behind(self, run: Callable[[], Tensor]) -> tuple[Behind, Tensor]:
        """Return what stands behind the rows of an encoder that is run on noise, and these rows.

        Parameters
        ----------
        run
            Runs it, and returns its rows [R, D].

        Raises
        ------
        NotFoundError
            Saying what could not be found.
        """
        way = self._last
        if way is not None:
            try:
                return self._on(way, run)
            except NotFoundError:
                pass  # a call may ask for another layer's features
        with watch_calls(to_watch(self._model, self.layers, self._besides)) as calls:
            rows = run()
        way = find_way(calls, rows, self.layers)
        del calls[:]  # all that the encoder made
        found = self._on(way, run)
        self._last = way
        return found

    def _on(self, way: Way, run: Callable[[], Tensor]) -> tuple[Behind, Tensor]:
        """Return what stands behind the rows on a way that is known."""
        with watching(way, attention=True, checked=True) as seen:
            rows = run()
        places = way.places(seen.calls, rows)
        cls = has_cls(self._model, way.layer.stack)
        try:
            pictures = [_checked(one) for one in seen.runs]
            shapes = [(one.query.shape[0], one.query.shape[2]) for one in seen.runs]
            runs = list(zip(shapes, pictures, strict=True))
            check_scored(runs, way.returned(seen.calls), places.tokens, cls)
        except NotFoundError as error:
            return Behind(way, places, unscored=str(error)), rows
        lengths = torch.cat([of_run.lengths_of(shape) for shape, of_run in runs])
        return Behind(way, places, pictures, lengths, cls), rows


@contextmanager
def watching(way: Way, attention: bool, checked: bool = False) -> Iterator[Seen]:
    """Collect what `looked_at` needs while the encoder runs in the block."""
    with ExitStack() as stack:
        calls = stack.enter_context(watch_calls(way.watched()))
        runs = []
        if attention:
            runs = stack.enter_context(watch_runs(way.layer.attention, checked))
        yield Seen(calls, runs)


def looked_at(behind: Behind, seen: Seen, needs: Collection[str]) -> Mapping[str, Tensor]:
    """Return what selectors look at of each row: ``features`` [R, C], ``cls_attention`` [H, R].

    Parameters
    ----------
    behind, seen
        Of one run of the encoder; `behind` of a run on noise of the same sizes.
    needs
        What is looked at.
    """
    found = {"features": behind.way.features(seen.calls, behind.places)}
    if "cls_attention" in needs:
        scores = [
            scores_of(one.query, one.key, one.scale, pictures, behind.has_cls)
            for one, pictures in zip(seen.runs, behind.pictures, strict=True)
        ]
        tokens = behind.places.tokens.to(found["features"].device)
        found["cls_attention"] = mean_of_tokens(torch.cat(scores, dim=-1), tokens)
    return found


def _checked(seen: SeenAttention) -> Pictures:
    """Return which tokens of a run see each other, if its output is what q and k say."""
    try:
        query = seen.query
        shape = query.shape[0], query.shape[2]
        pictures = Pictures.of(seen.mask, seen.arguments.get("cu_seqlens"), shape)
        output = seen.projected["output"]
        check_attention(query, seen.key, seen.value, output, seen.scale, pictures)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise NotFoundError(
            f"q and k of its tower's {type(seen.module).__name__} are not where they are known to "
            f"be ({reason_of(error)})"
        ) from error
    return pictures
