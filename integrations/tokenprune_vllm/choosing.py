"""Which rows of an encoded image or video stay: what selectors look at in vLLM, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError, TokensError, WeightsChangedError
from tokenprune.families.any import TRACED, AnyFamily, found_projector, not_counted
from tokenprune.families.base import MIDDLE, SCORING, Family
from tokenprune.families.modules import layers_of
from tokenprune.merging import Merge
from tokenprune.question.prompt import ItemPrompt, Marks, counted_interval, loose_rows
from tokenprune.question.reader import FirstLayers, PromptReader
from tokenprune.representation import tokens_represented
from tokenprune.selecting import Unchecked, select_unchecked
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.selectors.layer_reading import LayerReading
from tokenprune.tokens import Projector, VisualTokens, tokens_at
from tokenprune.tower.layouts import Grid, Medium, Segment, places_on
from tokenprune.tower.model_projector import ModelProjector
from tokenprune.transfer import to_device
from tokenprune_vllm.adapters import Adapters
from tokenprune_vllm.architectures import reads_prompt
from tokenprune_vllm.encoder_calls import Item
from tokenprune_vllm.prompt_positions import item_positions
from tokenprune_vllm.reading import Adapted, LanguageModel
from tokenprune_vllm.scoring import (
    AllHeads,
    Watched,
    all_heads,
    entrance_of,
    heads_of,
    keep_weights_plain,
    middle_layer,
    only_dtype,
    plain_linear,
    real_heads,
    scoring_layer,
    watch,
)
from tokenprune_vllm.settings import ServerSettings
from tokenprune_vllm.sharing import Sharing, sharing_of
from tokenprune_vllm.tracing import Layout, Tracer, decoder_of

logger = init_logger("vllm.tokenprune")  # vLLM shows loggers below its own name

_NUMBERS = ("features", "embeddings", "deepstack", "question_embeddings")
"""What selectors look at beside the tower's q and k, and may hold what is not finite."""


class Chooser:
    """Chooses rows by the methods that a server loads.

    Parameters
    ----------
    model
        vLLM's model.
    family
        Of that model.
    settings
        The server's.
    vllm_config
        vLLM's.
    adapters
        LoRA adapters of the language model that a method may have to read with.

    Attributes
    ----------
    attention_name
        Name of the layer whose attention is watched, ``"none"`` where no method asks for it.

    Raises
    ------
    UnsupportedModelError, OptionError, ConfigError
        If a method cannot choose for this model.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        settings: ServerSettings,
        vllm_config: Any,
        adapters: Adapters | None = None,
    ) -> None:
        self._model = model
        self._family = family
        self._adapters = adapters
        self._counted: set[str] = set()  # modalities, in a model of no family
        self._width = int(vllm_config.model_config.get_inputs_embeds_size())
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._selectors: dict[str, Selector] = {
            name: replace(settings.default, method=name, options=dict(options)).selector()
            for name, options in settings.methods.items()
        }
        needs = {need for selector in self._selectors.values() for need in selector.gathers}
        self._tracer: Tracer | None = None
        if isinstance(family, AnyFamily) and TRACED & needs:
            self._tracer = Tracer(model, TRACED & needs, family.config)
            if self._tracer.layers:
                family.given |= TRACED
        for selector in self._selectors.values():
            family.check_selector(selector)
        self.attention_name = "none"
        self._attention: nn.Module | None = None
        self._middle: nn.Module | None = None
        self._has_cls = False
        self._looked_at = [name for name in (*SCORING, *MIDDLE) if name in needs]
        if self._looked_at and family.known:
            tower = family.tower(model, "image")
            self._has_cls = family.has_cls(tower)
            last_name, last = scoring_layer(tower)
            if set(SCORING) & needs:
                self.attention_name, self._attention = last_name, last
            if set(MIDDLE) & needs:
                self._middle = middle_layer(tower, family)
        projector = family.projector(model) if family.known else None
        self._entrance = None if projector is None else entrance_of(projector)
        self._sharing: Sharing | None = None
        if self._entrance is not None:
            self._sharing = sharing_of(model, family, self._entrance, vllm_config)
        if self._sharing is not None and not (TRACED & needs or self._looked_at):
            self._entrance = None  # nothing is gathered that nobody looks at
        self._projector: ModelProjector | None = None
        if projector is not None and "projector" in needs:
            self._projector = _readable(projector, family, self._dtype)
        elif "projector" in needs:
            # Which of them is a projector is not known before weights are loaded.
            keep_weights_plain(model, besides=decoder_of(model))
        self._looks_deeper = "deepstack" in needs
        self._reads_words = "question_embeddings" in needs
        if self._reads_words:
            said = vllm_config.model_config.try_get_generation_config()
            self._marks = Marks.of(family.config, said.get("eos_token_id"))
            self._embed_text = model.get_language_model().embed_input_ids
        self._language_model: LanguageModel | None = None
        if "query_attention" in needs:
            self._language_model = LanguageModel(model, family, vllm_config)
            for selector in self._selectors.values():
                if isinstance(selector, LayerReading):
                    self._language_model.reference_layer(selector.layer)
        for selector in self._selectors.values():
            selector.check_model(family.config)
            if self._projector is not None and "projector" in selector.needs:
                selector.check_projector(self._projector)

    def find(self, run: Callable[[], list[Tensor]], items: Sequence[Item]) -> None:
        """Find, in a model of no family, what the methods look at behind the rows.

        Parameters
        ----------
        run
            Encodes noise, and returns its rows [n, D] item by item.
        items
            What is encoded next; the noise is of their sizes.

        Raises
        ------
        UnsupportedModelError, OptionError
            If it could not be found, or a method does not work with it.
        """
        if self._tracer is None:
            return

        def encoded() -> list[Tensor]:
            return [rows[:, : self._width] for rows in run()]

        if self._tracer.way is not None:
            self._tracer.remember(encoded, _layout_of(items))
            return
        self._tracer.find(lambda: torch.cat(encoded()))
        way = self._tracer.way
        readers = [one for one in self._selectors.values() if "projector" in one.gathers]
        if way is not None and readers:
            self._projector = found_projector(way, plain_linear)
            self._projector.dtype = only_dtype(self._projector.module, self._dtype)
            for selector in readers:
                selector.check_projector(self._projector)

    def watching(self) -> AbstractContextManager[Any]:
        """Collect what `choose` needs while the encoder runs in the block."""
        if self._tracer is not None:
            return self._tracer.watching()
        if self._sharing is not None:
            return self._sharing.watching(self._entrance, self._attention, self._middle)
        return watch(self._entrance, self._attention, self._middle)

    def choose(
        self, items: Sequence[Item], rows: list[Tensor], watched: Any
    ) -> list[list[Selection]]:
        """Return one selection for each segment of each item; none where the item is not pruned.

        They are on the host, which waits for the device once.

        Parameters
        ----------
        items
            What was encoded together.
        rows
            [n, D] of each item, as the encoder returned them. Rows that hold NaN or infinite
            values where the method looks at them are replaced by finite ones in this list.
        watched
            What was seen meanwhile.

        Raises
        ------
        ConfigError
            If items were prepared in a way that they cannot be told apart.
        """
        selections: list[list[Selection]] = [[] for _ in items]
        groups: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            if item.ticket.pruning is not None:
                groups.setdefault(item.ticket.pruning.to_json(), []).append(index)
        if not groups:
            return selections
        seen = self._seen(items, rows, watched)
        where = _rows_of_segments(items, rows)
        # Items of one method and budget are chosen from together, and all groups are looked at
        # only when the last one was handed to the device.
        begun = []
        for members in groups.values():
            pruning = cast(PruningConfig, items[members[0]].ticket.pruning)
            tokens = [
                self._tokens_of(
                    index, items[index], number, rows[index], where[index], *seen[index]
                )
                for index in members
                for number in range(len(items[index].ticket.region.segments))
            ]
            begun.append(
                (members, tokens, _Choice(self._selectors[pruning.method], pruning, tokens))
            )
        for members, tokens, choice in begun:
            each = [(i, n) for i in members for n in range(len(items[i].ticket.region.segments))]
            owners, numbers = [i for i, _ in each], [n for _, n in each]
            try:
                try:
                    chosen = choice.made()
                except WeightsChangedError:  # by a trainer; what they were is forgotten now
                    chosen = choice.again(tokens).made()
            except TokensError as error:
                # One image whose numbers overflowed must not end the server for everybody, nor
                # leave NaNs in its KV cache.
                logger.error("tokenprune: %s They count as 0 here.", error)
                tokens = list(map(_finite, tokens))
                chosen = choice.again(tokens).made()
                for index in members:
                    rows[index] = rows[index].nan_to_num(0.0, 0.0, 0.0)
            for index, selection, of_segment in zip(owners, chosen, tokens, strict=True):
                if items[index].ticket.counted and selection.represented is None:
                    selection = _counted(selection, of_segment)
                selections[index].append(selection)
            for index, number, selection, of_segment in zip(
                owners, numbers, chosen, tokens, strict=True
            ):
                if selection.merge is not None:
                    rows[index] = self._merged(
                        rows[index], where[index][number], selection, of_segment
                    )
        return selections

    def _merged(
        self, rows: Tensor, where: slice | Tensor, selection: Selection, tokens: VisualTokens
    ) -> Tensor:
        """Return an item's rows with those of a segment's kept tokens to which others are added."""
        own, merge = rows[where], cast(Merge, selection.merge)
        kept = to_device(selection.kept, rows.device)
        made = selection.rows(own[:, : self._width], tokens.features, tokens.projector)
        if own.shape[1] > self._width:  # what goes into deeper layers
            deeper = merge.sums(own[:, self._width :], kept).to(rows.dtype)
            made = torch.cat([made, deeper], dim=1)
        result = rows.clone()
        result[torch.arange(len(rows), device=rows.device)[where][kept]] = made
        return result

    def _seen(
        self, items: Sequence[Item], rows: Sequence[Tensor], watched: Any
    ) -> Sequence[tuple[Tensor | None, Mapping[str, Tensor]]]:
        """Return features [rows, C] of each item, and what `Family.rows_of_all` names."""
        media = [item.ticket.medium for item in items if item.ticket.medium is not None]
        if len(media) < len(items):
            raise ConfigError(
                "vLLM handed over a caller's own embeddings together with images to encode, which "
                "tokenprune cannot tell apart. Send them in requests of their own."
            )
        if self._tracer is not None:
            found = self._tracer.looked_at(watched, rows, self._width, _layout_of(items))
            return [
                (features, {} if scores is None else {"cls_attention": scores})
                for features, scores in found
            ]
        if self._entrance is None:
            return [(None, {})] * len(items)
        family, sharing = self._family, self._sharing

        def look(of: Sequence[Medium]) -> dict[str, Tensor]:
            return self._look(watched, of)

        looked_at: Mapping[str, Tensor] = {}
        if self._looked_at:
            looked_at = look(media) if sharing is None else sharing.looked_at(look, media)
        features = watched.features if sharing is None else sharing.features(watched, media)
        heads = heads_of(family.tower_config) if "keys" in looked_at else 0
        return family.rows_of_all(media, features, looked_at, heads)

    def _look(self, watched: Watched, media: Sequence[Medium]) -> dict[str, Tensor]:
        """Return what was seen of images that this rank encoded; see `Family.looked_at`."""
        family, config = self._family, self._family.tower_config
        apart = self._sharing is None  # then ranks have some of the heads of all images
        middle = None if watched.middle is None else AllHeads(watched.middle, config, apart)
        if self._looked_at == ["cls_attention"]:
            # One number a head and token is gathered, and not its q and k.
            found = family.looked_at(self._looked_at, watched, None, media, self._has_cls)
            put_together = all_heads if apart else real_heads
            return {name: put_together(values, config) for name, values in found.items()}
        seen = None if self._attention is None else AllHeads(watched, config, apart)
        return family.looked_at(self._looked_at, seen, middle, media, self._has_cls)

    def _tokens_of(
        self,
        index: int,
        item: Item,
        number: int,
        rows: Tensor,
        where: Sequence[slice | Tensor],
        features: Tensor | None,
        looked_at: Mapping[str, Tensor],
    ) -> VisualTokens:
        """Return what a selector looks at of one segment of an item.

        Parameters
        ----------
        index
            The item's among those encoded together.
        item, number
            The item, and which of its segments.
        rows
            [n, D] of the item.
        where
            Where each of its segments has its rows; see `_rows_of_segments`.
        features, looked_at
            What was seen of the item; see `_seen`.
        """
        segment, in_item = item.ticket.region.segments[number], where[number]
        tokens = VisualTokens(
            grid=segment.grid or (1, 1, len(segment.rows)),
            is_picture=segment.grid is not None,
            features=None if features is None else features[in_item],
            # Behind the first D numbers of a row comes what goes into deeper layers.
            embeddings=rows[in_item, : self._width],
            projector=self._projector,
            label=f"{item.ticket.modality} {index} {segment.label}".strip(),
            deepstack=self._deepstack(rows[in_item]) if self._looks_deeper else None,
            **tokens_at(looked_at, in_item),
        )
        pruning = item.ticket.pruning
        if pruning is not None and reads_prompt(pruning.method):
            return self._with_prompt(tokens, item, segment, rows)
        return tokens

    def _deepstack(self, rows: Tensor) -> Tensor:
        """Return what goes into deeper layers, tap by tap [L, N, D], of a segment's rows."""
        taps = rows[:, self._width :].unflatten(1, (self._family.taps, self._width))
        in_front: Tensor = taps.movedim(1, 0)
        return in_front

    def _with_prompt(
        self, tokens: VisualTokens, item: Item, segment: Segment, rows: Tensor
    ) -> VisualTokens:
        """Return a segment's tokens with the question, and what reads them together."""
        if item.before is None or item.after is None:
            raise ConfigError(
                "vLLM handed over an image without the text around it: it was prepared by another "
                "processor. Start all parts of the server with the same model and settings."
            )
        region = item.ticket.region
        ids = torch.cat([item.before, region.token_ids, item.after])
        first = len(item.before)
        is_text = torch.ones(len(ids), dtype=torch.bool)
        is_text[first : first + region.length] = ~region.is_row
        row_columns = region.is_row.nonzero()[:, 0] + first
        in_segment = torch.zeros(region.total, dtype=torch.bool)
        for other in region.segments:
            in_segment[other.rows] = True
        loose = loose_rows(row_columns, segment.rows, in_segment)
        prompt = ItemPrompt(
            ids,
            text=is_text.nonzero()[:, 0],
            columns=row_columns[segment.rows],
            loose=row_columns[loose],
            grid=tokens.grid,
            label=tokens.label,
        )
        reader = None
        if self._language_model is not None:
            interval = self._interval(item, segment, tokens.grid) if self._family.mrope else None
            order = to_device(torch.cat([segment.rows, loose]), rows.device)
            embeddings, *deeper = rows[order].split(self._language_model.width, dim=1)
            layers: FirstLayers = self._language_model
            if self._adapters is not None:
                layers = Adapted(self._language_model, self._adapters, item.adapter)
            reader = PromptReader(layers, prompt, embeddings, deeper, tokens.grid, interval)
        words = None
        if self._reads_words:
            ids = to_device(self._marks.users_text(prompt.question), rows.device)
            words = self._embed_text(ids)
        return replace(
            tokens,
            question=prompt.question,
            question_embeddings=words,
            query_attention=reader,
        )

    def _interval(self, item: Item, segment: Segment, grid: Grid) -> int:
        """Return how many steps lie between frames where a set of them is read.

        Raises
        ------
        UnsupportedModelError
            If a model of no family counts the first items otherwise than is known. These are
            vLLM's own, with which it measures memory before it serves.
        """
        modality = item.ticket.modality
        if self._family.known:
            return self._family.frame_interval(modality)
        region, engine_positions = item.ticket.region, self._model.engine_positions
        positions = item_positions(engine_positions, item.ticket, item.fields, behind=True)
        rows = region.is_row.nonzero()[:, 0][segment.rows]
        around = slice(int(rows[0]), int(rows[-1]) + 2)
        is_visual = nn.functional.pad(region.is_row, (0, 1))[around]
        interval = counted_interval(positions[:, around], is_visual, grid)
        if interval is None and modality not in self._counted:
            raise not_counted(type(self._model).__name__)
        self._counted.add(modality)
        if interval is None:
            # One image must not end the server for everybody.
            logger.error("tokenprune: %s It is read by rows and columns.", not_counted("the model"))
        return interval or 1


class _Choice:
    """A choice that the device is making.

    Parameters
    ----------
    selector, pruning
        How.
    tokens
        From what.
    """

    def __init__(
        self, selector: Selector, pruning: PruningConfig, tokens: Sequence[VisualTokens]
    ) -> None:
        self._selector, self._pruning = selector, pruning
        self._unchecked: Unchecked | None = None
        # What is known at once to be wrong with some items is told with the rest.
        self._error: TokensError | None = None
        try:
            self._unchecked = select_unchecked(tokens, selector, pruning.keep)
        except TokensError as error:
            self._error = error

    def again(self, tokens: Sequence[VisualTokens]) -> _Choice:
        """Return the same choice from other tokens."""
        return _Choice(self._selector, self._pruning, tokens)

    def made(self) -> list[Selection]:
        """Return the selections, on the host.

        Raises
        ------
        TokensError
            If numbers of the tokens are not finite.
        """
        if self._unchecked is None:
            raise cast(TokensError, self._error)
        both = zip(self._unchecked.selections, self._unchecked.on_host(), strict=True)
        return [replace(selection, kept=kept) for selection, kept in both]


def _layout_of(items: Sequence[Item]) -> Layout:
    """Return what tells apart how rows of these items may lie, together."""
    return tuple((item.ticket.modality, item.ticket.layout) for item in items)


def _rows_of_segments(items: Sequence[Item], rows: Sequence[Tensor]) -> list[list[slice | Tensor]]:
    """Return where each segment of each item has its rows [n, D]: a slice where they are one."""
    segments = [item.ticket.region.segments for item in items]
    places = places_on([one.rows for of_item in segments for one in of_item], rows[0].device)
    each = iter(places)
    return [[next(each) for _ in of_item] for of_item in segments]


def _readable(projector: nn.Module, family: Family, dtype: torch.dtype) -> ModelProjector:
    """Return a projector that selectors can call and read."""
    keep_weights_plain(projector)

    def around(run: Projector, features: Tensor) -> Tensor:
        return family.around_projector(projector, run, features)

    # Under tensor parallelism all ranks have to call or read it together.
    return ModelProjector(
        projector,
        lambda: layers_of(projector, plain_linear),
        around,
        only_dtype(projector, dtype),
    )


def _counted(selection: Selection, tokens: VisualTokens) -> Selection:
    """Return a selection that says how many tokens each kept one stands for.

    By what the language model reads, before others are added to it, whatever the selector saw.
    """
    embeddings = cast(Tensor, tokens.embeddings)
    kept = to_device(selection.kept, embeddings.device)
    counts = tokens_represented(embeddings[None], kept[None])
    return replace(selection, represented=counts[0])


def _finite(tokens: VisualTokens) -> VisualTokens:
    reader: Any = tokens.query_attention
    return replace(
        tokens,
        query_attention=None if reader is None else reader.made_finite(),
        **{
            name: value.nan_to_num(0.0, 0.0, 0.0)
            for name in (*_NUMBERS, *SCORING, *MIDDLE)
            if (value := getattr(tokens, name)) is not None
        },
    )
