"""What stands behind the rows of a model of no family, found in vLLM's own modules.

`tokenprune.tower.tracing` follows values from the rows back to the tower: once on noise, before the
first images, and then in each call, whose images may be of any sizes. Following them waits for the
device again and again. So sizes that come a second time are followed on noise and remembered: on
images, rows that happen to be equal could be taken for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.any import USE_ANOTHER
from tokenprune.remembered import Remembered
from tokenprune.tower.any_attention import (
    Pictures,
    check_attention,
    check_lengths,
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
from tokenprune_vllm.scoring import all_heads


def decoder_of(model: Any) -> nn.Module:
    """Return the language model of a vision-language model, without its tower."""
    if isinstance(model, MultiModalMixin):  # a class of transformers, all of which it says it is
        decoder: nn.Module = model.model.get_decoder()
    else:
        decoder = model.get_language_model()
    return decoder


@dataclass
class _Run:
    """One run of the scoring layer: q, k, v and its output, this rank's heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float
    edges: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Pictures, or 1, and tokens."""
        return self.query.shape[0], self.query.shape[2]

    def pictures(self) -> Pictures:
        """Return which tokens see each other."""
        return Pictures.of(None, self.edges, self.shape)


Layout = tuple[tuple[str, str], ...]
"""Modality and `tokenprune_vllm.processor.Ticket.layout` of each item that is encoded together."""


@dataclass(frozen=True)
class _Known:
    """What holds for all calls of one layout.

    Attributes
    ----------
    places
        What stands behind each row.
    pictures
        Of each run of the scoring layer, which tokens see each other.
    """

    places: Places
    pictures: Sequence[Pictures]


@dataclass
class Seen:
    """What hooks saw while the encoder ran once."""

    calls: list[Call] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)


class Tracer:
    """Finds what stands behind the rows of one model.

    Parameters
    ----------
    model
        vLLM's.
    needs
        What of `tokenprune.families.any.TRACED` is looked at.
    config
        The model's.

    Attributes
    ----------
    way
        From tower to rows, once it was found.
    """

    def __init__(self, model: Any, needs: Collection[str], config: Any) -> None:
        self._model = model
        self._needs = needs
        self._config = config
        self._besides = (decoder_of(model),)
        layers = layers_that_attend(model, _attends, self._besides)
        self.layers = [Layer(one.stack, one.module, _inside(one)) for one in layers]
        self.way: Way | None = None
        self._has_cls = False
        self._known: Remembered[Layout, _Known] = Remembered()
        self._met: Remembered[Layout, bool] = Remembered()

    def find(self, run: Callable[[], Tensor]) -> None:
        """Find the way, by an encoder that is run on noise.

        Parameters
        ----------
        run
            Runs it, and returns its rows [R, D].

        Raises
        ------
        UnsupportedModelError
            If what is needed could not be found.
        """
        if self.way is not None:
            return
        try:
            with watch_calls(to_watch(self._model, self.layers, self._besides)) as calls:
                rows = run()
            way = find_way(calls, rows, self.layers)
            del calls[:]
            with self._watching(way) as seen:
                rows = run()
            places = self._places(way, seen, rows)
            if "cls_attention" in self._needs:
                self._has_cls = has_cls(self._model, way.layer.stack)
                self._check(way, seen, places)
        except NotFoundError as error:
            raise self._refusal(error) from error
        self.way = way

    def remember(self, run: Callable[[], list[Tensor]], layout: Layout) -> None:
        """Find what holds for a layout that is met for the second time, on noise.

        Those that never come again cost nothing so.

        Parameters
        ----------
        run
            Encodes noise of these sizes, and returns its rows [n, D] item by item.
        layout
            Of the call.
        """
        if self.way is None or self._known.get(layout) is not None:
            return
        met = self._met.get(layout)
        self._met.put(layout, met is None)
        if not met:  # the first time; or it was tried, and is followed in each call
            return
        with self._watching(self.way) as seen:
            rows = run()
        try:
            found = self._followed(self.way, seen, rows)
        except NotFoundError:
            return  # images tell, or raise
        device = rows[0].device
        places = Places(found.places.features.to(device), found.places.tokens.to(device))
        self._known.put(layout, _Known(places, found.pictures))

    def _followed(self, way: Way, seen: Seen, rows: Sequence[Tensor]) -> _Known:
        """Return what one call says of its layout.

        Raises
        ------
        NotFoundError
            If it is not what it was on the way that was found.
        """
        places = self._places(way, seen, torch.cat(list(rows)))
        if "cls_attention" not in self._needs:
            return _Known(places, ())
        pictures = [run.pictures() for run in seen.runs]
        lengths = _lengths(seen, pictures)
        for tokens in places.tokens.split(list(map(len, rows))):
            check_lengths(lengths, tokens)
        return _Known(places, pictures)

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Collect what `looked_at` needs while the encoder runs in the block."""
        if self.way is None:
            yield Seen()
            return
        with self._watching(self.way) as seen:
            yield seen

    @contextmanager
    def _watching(self, way: Way) -> Iterator[Seen]:
        with ExitStack() as stack:
            calls = stack.enter_context(watch_calls(way.watched()))
            runs: list[_Run] = []
            if "cls_attention" in self._needs and isinstance(way.layer.attention, _KNOWN):
                runs = stack.enter_context(_watch_runs(way.layer.attention))
            yield Seen(calls, runs)

    def looked_at(
        self, seen: Seen, rows: Sequence[Tensor], width: int, layout: Layout
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return features [rows, C] and attention [H, rows] of each item of one call.

        Parameters
        ----------
        seen
            In that call.
        rows
            [n, D] of each item.
        width
            Behind the first so many numbers of a row comes what goes into deeper layers.
        layout
            Of the call.

        Raises
        ------
        UnsupportedModelError
            If they are not what they were on the way that was found.
        """
        if self.way is None:
            raise RuntimeError("the way from tower to rows was not looked for")
        counts = [len(of_item) for of_item in rows]
        try:
            known = self._known.get(layout)
            if known is None or len(known.places.tokens) != sum(counts):
                known = self._followed(self.way, seen, [of_item[:, :width] for of_item in rows])
            features = self.way.features(seen.calls, known.places).split(counts)
        except NotFoundError as error:
            raise self._refusal(error) from error
        if "cls_attention" not in self._needs:
            return [(of_item, None) for of_item in features]
        scores = [
            scores_of(run.query, run.key, run.scale, of_run, self._has_cls)
            for run, of_run in zip(seen.runs, known.pictures, strict=True)
        ]
        of_rows = mean_of_tokens(torch.cat(scores, dim=-1), known.places.tokens)
        if get_tensor_model_parallel_world_size() > 1:
            (of_rows,) = all_heads(of_rows[None], self._config.vision_config)
        return list(zip(features, of_rows.split(counts, dim=1), strict=True))

    def _places(self, way: Way, seen: Seen, rows: Tensor) -> Places:
        places = way.places(seen.calls, rows)
        if bool((places.tokens < 0).any()):
            raise NotFoundError("some rows are made otherwise than by the projector that was found")
        return places

    def _check(self, way: Way, seen: Seen, places: Places) -> None:
        """Raise unless the attention that was seen is what makes the tower's tokens."""
        if not isinstance(way.layer.attention, _KNOWN):
            raise NotFoundError("its tower computes its attention where tokenprune does not look")
        for run in seen.runs:
            check_attention(run.query, run.key, run.value, run.output, run.scale, run.pictures())
        runs = [(run.shape, run.pictures()) for run in seen.runs]
        check_scored(runs, way.returned(seen.calls), places.tokens, self._has_cls)

    def _refusal(self, error: NotFoundError) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"a method of this server looks at {', '.join(sorted(self._needs))}, which tokenprune "
            f"did not find in {type(self._model).__name__}: {error}. {USE_ANOTHER}"
        )


_KNOWN = MMEncoderAttention


def _attends(module: nn.Module) -> bool:
    return isinstance(module, _KNOWN) or is_attention(module)


def _inside(layer: Layer) -> nn.Module:
    """Return the module of a layer that is called with q and k, where vLLM has one."""
    found = (one for one in layer.module.modules() if isinstance(one, _KNOWN))
    return next(found, layer.attention)


def _lengths(seen: Seen, pictures: Sequence[Pictures]) -> Tensor:
    if not seen.runs:
        raise NotFoundError("its tower's attention did not run")
    both = zip(pictures, seen.runs, strict=True)
    return torch.cat([of_run.lengths_of(run.shape) for of_run, run in both])


@contextmanager
def _watch_runs(attention: Any) -> Iterator[list[_Run]]:
    """Collect the runs of one of vLLM's attentions while the block runs."""
    runs: list[_Run] = []

    def see(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        # Towers call it by position or by name, with heads apart or in one dimension.
        names = ("query", "key", "value", "cu_seqlens")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        heads = (-1, module.head_size)
        query, key, value = (
            (one if one.ndim == 4 else one.unflatten(-1, heads)).transpose(1, 2)
            for one in (given[name] for name in names[:3])
        )
        edges = given.get("cu_seqlens")
        runs.append(_Run(query, key, value, output, float(module.scale), edges))

    handle = attention.register_forward_hook(see, with_kwargs=True)
    try:
        yield runs
    finally:
        handle.remove()
