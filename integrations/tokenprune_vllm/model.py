"""PrunedModel: mixed in front of vLLM's own model of each family.

It does what no family does differently: run the encoder, choose, keep the chosen rows, and see to
it that each row is read at its own position. vLLM's forward runs as it is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError, TokensError, UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.modules import layers_of
from tokenprune.model_projector import ModelProjector
from tokenprune.question.reader import PromptReader
from tokenprune.registry import find
from tokenprune.selecting import select_many
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.set_prompt import ItemPrompt, loose_rows
from tokenprune.tokens import Projector, VisualTokens
from tokenprune.tower.layouts import Segment
from tokenprune_vllm import metrics
from tokenprune_vllm.architectures import reads_prompt
from tokenprune_vllm.media import Fields, family_of
from tokenprune_vllm.positions import (
    DIGITS,
    PositionOffsets,
    from_columns,
    rope_type,
    to_columns,
)
from tokenprune_vllm.processor import (
    PROMPT,
    REGION,
    TICKET,
    Ticket,
    largest_items,
    unpack_prompt,
)
from tokenprune_vllm.reading import LanguageModel
from tokenprune_vllm.scoring import (
    all_heads,
    entrance_of,
    keep_weights_plain,
    plain_linear,
    scoring_layer,
    watch,
)
from tokenprune_vllm.settings import ServerSettings

logger = init_logger("vllm.tokenprune")  # vLLM shows loggers below its own name

_POSITION_FIELDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "timestamps")
"""What families with M-RoPE read of an item to work out positions."""


@dataclass(frozen=True)
class _Item:
    """One image or video in the worker; `before` and `after` are ids of the text around it."""

    ticket: Ticket
    fields: Fields
    before: Tensor | None = None
    after: Tensor | None = None


class PrunedModel:
    """Mixed in front of vLLM's model of a family; see the top of this file."""

    overrides: ClassVar[tuple[str, ...]] = ("embed_multimodal", "embed_input_ids", "forward")
    """Methods of vLLM's that must be there to be overridden."""

    supports_mrope: ClassVar[bool] = True
    # A captured encoder would run past `embed_multimodal`, and so unpruned.
    supports_encoder_cudagraph: ClassVar[bool] = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        settings = ServerSettings.from_config(config)
        family = family_of(config)
        _check_engine(vllm_config, settings)
        with _room_for_positions(config, settings):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._pruner = Pruner(self, family, settings, vllm_config)
        self._pruner.say(largest_items(vllm_config.model_config))

    # Rows --------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Run the encoder; return each item's kept rows, with its position columns if any."""
        return self._pruner.embed(super().embed_multimodal, kwargs)  # type: ignore[misc]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed a batch; the rows' positions are taken off and kept for `forward`."""
        rows = self._pruner.take_positions(multimodal_embeddings, is_multimodal, len(input_ids))
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, rows, is_multimodal=is_multimodal
        )
        return embedded

    # Positions ---------------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return positions [3, L] of a pruned prompt, and how far the next token is from L."""
        return self._pruner.prompt_positions(input_tokens, mm_features)

    def engine_positions(self, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
        """Return what vLLM itself would say about an unpruned prompt."""
        if self._pruner.mrope:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(  # type: ignore[misc]
                tokens, features
            )
            return found
        return torch.arange(len(tokens)).expand(3, -1), 0

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run vLLM's forward with each kept token at its own position."""
        return super().forward(  # type: ignore[misc]
            input_ids,
            self._pruner.positions(positions),
            intermediate_tensors,
            inputs_embeds,
            **kwargs,
        )


class Pruner:
    """The part of a `PrunedModel` that is no module.

    Parameters
    ----------
    model
        The model it belongs to.
    family
        Of that model.
    settings
        The server's.
    vllm_config
        vLLM's.
    """

    def __init__(
        self, model: Any, family: Family, settings: ServerSettings, vllm_config: Any
    ) -> None:
        self._model = model
        self._family = family
        self._settings = settings
        self._selectors: dict[str, Selector] = {
            name: replace(settings.default, method=name, options=dict(options)).selector()
            for name, options in settings.methods.items()
        }
        self._needs = {need for selector in self._selectors.values() for need in selector.needs}
        self._projector: ModelProjector | None = None
        self._attention: nn.Module | None = None
        self._attention_name = "none"
        if "cls_attention" in self._needs:
            self._tower = family.tower(model, "image")
            self._attention_name, self._attention = scoring_layer(self._tower)
            self._has_cls = family.has_cls(self._tower)
        projector = family.projector(model)
        self._entrance = entrance_of(projector)
        if "projector" in self._needs:
            keep_weights_plain(projector)

            def around(run: Projector, features: Tensor) -> Tensor:
                return family.around_projector(projector, run, features)

            # Under tensor parallelism all ranks have to call or read it together.
            self._projector = ModelProjector(
                projector, lambda: layers_of(projector, plain_linear), around
            )
        self._language_model: LanguageModel | None = None
        if "query_attention" in self._needs:
            self._language_model = LanguageModel(model, family, vllm_config)
        for selector in self._selectors.values():
            selector.check_model(family.config)
            if self._projector is not None and "projector" in selector.needs:
                selector.check_projector(self._projector)
        scheduler = vllm_config.scheduler_config
        self._width = int(vllm_config.model_config.get_inputs_embeds_size())
        self._most_rows = int(
            max(scheduler.max_num_batched_tokens, scheduler.max_num_encoder_input_tokens)
        )
        self._axes = 3 if family.mrope else 1
        self._offsets: PositionOffsets | None = None
        if settings.default.positions == "original":
            device = torch.get_default_device()
            self._offsets = PositionOffsets(self._axes, scheduler.max_num_batched_tokens, device)

    @property
    def mrope(self) -> bool:
        """Whether the model itself counts positions on three axes."""
        return self._family.mrope

    def say(self, largest: Mapping[str, tuple[int, int]]) -> None:
        """Say at the start how this server prunes.

        Parameters
        ----------
        largest
            Modality -> rows of the largest item before and after.

        Raises
        ------
        ConfigError
            If nothing would be dropped of any.
        """
        default = self._settings.default
        if all(before == after for before, after in largest.values()):
            sizes = " and ".join(f"{name} has {rows}" for name, (rows, _) in largest.items())
            raise ConfigError(
                f"keep={default.keep} prunes nothing: of this model's tokens the largest "
                f"{sizes or 'image or video is switched off'}. Give a smaller keep, or serve the "
                "model without tokenprune."
            )
        if get_tensor_model_parallel_rank() == 0:
            logger.info(
                "tokenprune: %s, keep %s, %s positions; scoring layer %s; tokens of the largest %s",
                default.method,
                default.keep,
                default.positions,
                self._attention_name,
                ", ".join(f"{name}: {rows} -> {kept}" for name, (rows, kept) in largest.items()),
            )

    # Encode, choose, keep ----------------------------------------------------------------------

    def embed(self, encode: Callable[..., Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Encode the items of one call and return the rows of each that stay."""
        tickets, regions = kwargs.pop(TICKET, None), kwargs.pop(REGION, None)
        prompts = kwargs.pop(PROMPT, None)
        if tickets is None or regions is None:
            raise ConfigError(
                "vLLM handed over images without tokenprune's fields: they were prepared by "
                "another processor, and would run unpruned. Start all parts of the server with "
                "the same model and the same --hf-overrides."
            )
        unpacked = [
            Ticket.unpack(ticket, region) for ticket, region in zip(tickets, regions, strict=True)
        ]
        together = {name for ticket in unpacked for name in (*ticket.entries, *ticket.shared)}
        items = [
            _Item(
                ticket,
                {name: value[i] for name, value in kwargs.items() if name not in together},
                *(() if prompts is None else unpack_prompt(prompts[i])),
            )
            for i, ticket in enumerate(unpacked)
        ]
        kept: list[Tensor] = []
        for part in self._parts(items):
            chosen = items[part]
            with watch(self._entrance, self._attention) as watched:
                rows = list(encode(**self._part_of(kwargs, items, part)))
            kept += self._prune(chosen, rows, watched)
        return kept

    def _parts(self, items: Sequence[_Item]) -> Iterator[slice]:
        """Cut a call into runs of the encoder that are no larger than vLLM measured memory for.

        vLLM counts the rows that stay when it puts images together; the encoder reads them all.
        """
        start = rows = 0
        for index, item in enumerate(items):
            size = item.ticket.region.total
            if index > start and rows + size > self._most_rows:
                yield slice(start, index)
                start, rows = index, 0
            rows += size
        yield slice(start, len(items))

    def _part_of(
        self, kwargs: Mapping[str, Any], items: Sequence[_Item], part: slice
    ) -> dict[str, Any]:
        """Return the arguments of some of the items."""
        if part == slice(0, len(items)):
            return dict(kwargs)
        taken = {}
        for name, value in kwargs.items():
            if any(name in item.ticket.shared for item in items):
                taken[name] = value
            elif any(name in item.ticket.entries for item in items):
                counts = [item.ticket.entries.get(name, 0) for item in items]
                edges = [0, *itertools.accumulate(counts)]
                taken[name] = value[edges[part.start] : edges[part.stop]]
            else:
                taken[name] = value[part]
        return taken

    @torch.inference_mode()
    def _prune(self, items: Sequence[_Item], rows: list[Tensor], watched: Any) -> list[Tensor]:
        """Return the kept rows of each item."""
        start = time.perf_counter()
        selections = self._select(items, rows, watched)
        kept = [
            self._keep(item, own, chosen)
            for item, own, chosen in zip(items, rows, selections, strict=True)
        ]
        pruned = [item for item in items if item.ticket.pruning is not None]
        spent = time.perf_counter() - start
        for item in pruned:
            pruning = cast(PruningConfig, item.ticket.pruning)
            metrics.count_time(item.ticket.modality, pruning.method, spent / len(pruned))
        return kept

    def _select(
        self, items: Sequence[_Item], rows: list[Tensor], watched: Any
    ) -> list[list[Selection]]:
        """Return one selection for each segment of each item; items of one budget go together.

        Rows that hold NaN or infinite values where the method looks at them are made finite.
        """
        groups: dict[str, list[tuple[int, VisualTokens]]] = {}
        if any(item.ticket.pruning is not None for item in items):
            found = self._seen(items, watched)
            for index, (item, (features, attention)) in enumerate(zip(items, found, strict=True)):
                pruning = item.ticket.pruning
                if pruning is None:
                    continue
                budget = pruning.to_json()
                embeddings = rows[index][:, : self._width]
                for segment in item.ticket.region.segments:
                    in_item = segment.rows.to(embeddings.device)
                    tokens = VisualTokens(
                        grid=segment.grid or (1, 1, len(in_item)),
                        is_picture=segment.grid is not None,
                        features=features[in_item],
                        embeddings=embeddings[in_item],
                        cls_attention=None if attention is None else attention[:, in_item],
                        projector=self._projector,
                        label=f"{item.ticket.modality} {index} {segment.label}".strip(),
                    )
                    if reads_prompt(pruning.method):
                        tokens = self._with_prompt(tokens, item, segment, rows[index])
                    groups.setdefault(budget, []).append((index, tokens))
        selections: list[list[Selection]] = [[] for _ in items]
        for members in groups.values():
            pruning = cast(PruningConfig, items[members[0][0]].ticket.pruning)
            selector = self._selectors[pruning.method]
            tokens_of = [tokens for _, tokens in members]
            try:
                chosen = select_many(tokens_of, selector, pruning.keep)
            except TokensError as error:
                # One image whose numbers overflowed must not end the server for everybody, nor
                # leave NaNs in its KV cache.
                logger.error("tokenprune: %s They count as 0 here.", error)
                chosen = select_many([_finite(one) for one in tokens_of], selector, pruning.keep)
                for index, _ in members:
                    rows[index] = rows[index].nan_to_num(0.0, 0.0, 0.0)
            for (index, _), selection in zip(members, chosen, strict=True):
                selections[index].append(selection)
        return selections

    def _seen(self, items: Sequence[_Item], watched: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Return features [rows, C] and attention [H, rows] of each item."""
        media = [item.ticket.medium for item in items if item.ticket.medium is not None]
        if len(media) < len(items):
            raise ConfigError(
                "vLLM handed over a caller's own embeddings together with images to encode, which "
                "tokenprune cannot tell apart. Send them in requests of their own."
            )
        attention = None
        if self._attention is not None:
            scores = self._family.attention(watched, media, self._has_cls)
            attention = all_heads(scores, self._family.config.vision_config)
        return self._family.rows_of(media, watched.features, attention)

    def _with_prompt(
        self, tokens: VisualTokens, item: _Item, segment: Segment, rows: Tensor
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
        columns = row_columns[segment.rows]
        in_segment = torch.zeros(region.total, dtype=torch.bool)
        for other in region.segments:
            in_segment[other.rows] = True
        loose = loose_rows(row_columns, segment.rows, in_segment)
        text = is_text.nonzero()[:, 0]
        prompt = ItemPrompt(ids, text, columns, row_columns[loose], tokens.grid, tokens.label)
        reader = None
        if self._language_model is not None:
            interval = None
            if self._family.mrope:
                interval = self._family.frame_interval(item.ticket.modality)
            order = torch.cat([segment.rows, loose]).to(rows.device)
            # Behind the first D numbers of a row comes what goes into deeper layers.
            own, *deeper = rows[order].split(self._language_model.width, dim=1)
            reader = PromptReader(self._language_model, prompt, own, deeper, tokens.grid, interval)
        return replace(tokens, question=prompt.question, query_attention=reader)

    def _keep(self, item: _Item, rows: Tensor, selections: Sequence[Selection]) -> Tensor:
        """Return one item's rows that stay, in the order of its region in the prompt."""
        region = item.ticket.region
        stays = torch.ones(region.total, dtype=torch.bool)
        for segment, selection in zip(
            region.segments if selections else (), selections, strict=True
        ):
            stays[segment.rows] = False
            stays[segment.rows[selection.kept.cpu()]] = True
        # Where rows move against text, the region's text comes with them.
        moves = item.ticket.pruning is not None and region.rows_move()
        columns = region.is_row.nonzero()[:, 0]
        if moves:
            in_prompt = torch.ones_like(region.is_row)
            in_prompt[columns] = stays
            filled = rows.new_zeros(region.length, rows.shape[1])
            filled[columns.to(rows.device)] = rows
            filled[:, : self._width][(~region.is_row).to(rows.device)] = self._text_rows(region)
            kept = filled[in_prompt.to(rows.device)]
            columns = in_prompt.nonzero()[:, 0]
        else:
            kept = rows[stays.nonzero()[:, 0].to(rows.device)]
            columns = columns[stays]
        if self._offsets is None:
            return kept
        offsets = self._offsets_in(item)[: self._axes, columns]
        return torch.cat([kept, to_columns(offsets, kept.dtype).to(kept.device)], dim=1)

    def _text_rows(self, region: Any) -> Tensor:
        ids = region.token_ids[~region.is_row].to(self._device())
        embedded: Tensor = self._model.get_language_model().embed_input_ids(ids)
        return embedded

    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _offsets_in(self, item: _Item) -> Tensor:
        """Return positions [3, L] of an item's unpruned region, from 0."""
        region = item.ticket.region
        data = MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(
                    data=item.fields[name], field=MultiModalBatchedField(keep_on_cpu=True)
                )
                for name in _POSITION_FIELDS
                if name in item.fields
            }
        )
        feature = MultiModalFeatureSpec(
            data=data,
            modality=item.ticket.modality,
            identifier="",
            mm_position=PlaceholderRange(offset=0, length=region.length),
        )
        positions, _ = self._model.engine_positions(region.token_ids.tolist(), [feature])
        return cast(Tensor, positions)

    # Positions ---------------------------------------------------------------------------------

    def take_positions(self, rows: Any, is_row: Tensor | None, tokens: int) -> Any:
        """Take the position columns off the rows of a batch, and remember them for `positions`."""
        if self._offsets is None:
            return rows
        if rows is None or len(rows) == 0:
            self._offsets.write(None, None, tokens)
            return rows
        columns = self._axes * DIGITS
        offsets = from_columns(torch.cat([one[:, -columns:] for one in rows]))
        self._offsets.write(offsets, is_row, tokens)
        return [one[:, :-columns] for one in rows]

    def positions(self, positions: Tensor) -> Tensor:
        """Return the positions with which vLLM's forward is called."""
        if self._offsets is None:
            return positions
        if positions.ndim != 2:
            raise ConfigError(
                "vLLM did not ask for the positions of pruned prompts: the model's config lacks "
                "mrope_section. Start the server with `tokenprune serve`, or export the checkpoint "
                "again."
            )
        moved = self._offsets.add(positions)
        return moved if self._axes > 1 else moved[0]

    def prompt_positions(self, tokens: list[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        """Return positions [3, L] of a pruned prompt and the distance of the next one from L.

        They are the engine's own positions of the unpruned prompt, less the dropped tokens. The
        kept tokens are all put where their item begins: the rest of the way comes with the rows.
        """
        if self._offsets is None:
            return torch.arange(len(tokens)).expand(3, -1).contiguous(), 0
        full: list[int] = []
        full_features = []
        spans: list[tuple[Any, Ticket, int]] = []
        end = 0
        for feature in sorted(features, key=lambda one: one.mm_position.offset):
            ticket = Ticket.unpack(feature.data[TICKET].data, feature.data[REGION].data)
            place = feature.mm_position
            full += tokens[end : place.offset]
            spans.append((place, ticket, len(full)))
            region = ticket.region
            moved = PlaceholderRange(len(full), region.length, region.is_row)
            full_features.append(replace(feature, mm_position=moved))
            full += region.token_ids.tolist()
            end = place.offset + place.length
        full += tokens[end:]
        positions, delta = self._model.engine_positions(full, full_features)
        parts = []
        before = 0
        for place, ticket, start in spans:
            region = ticket.region
            parts.append(positions[:, before:start])
            own = positions[:, start : start + 1].repeat(1, place.length)
            if place.is_embed is not None:
                text = positions[:, start : start + region.length][:, ~region.is_row]
                own[:, ~place.is_embed] = text
            parts.append(own)
            before = start + region.length
        parts.append(positions[:, before:])
        return torch.cat(parts, dim=1).contiguous(), len(full) + delta - len(tokens)


def _finite(tokens: VisualTokens) -> VisualTokens:
    reader: Any = tokens.query_attention
    return replace(
        tokens,
        query_attention=None if reader is None else reader.made_finite(),
        **{
            name: value.nan_to_num(0.0, 0.0, 0.0)
            for name in ("features", "embeddings", "cls_attention")
            if (value := getattr(tokens, name)) is not None
        },
    )


def _check_engine(vllm_config: Any, settings: ServerSettings) -> None:
    """Refuse settings of vLLM under which pruning would be wrong, or would not happen.

    Raises
    ------
    UnsupportedModelError
        Naming the setting.
    """
    multimodal = vllm_config.model_config.get_multimodal_config()
    refused = []
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        refused.append("--enable-tower-connector-lora (it counts an image's tokens by its rows)")
    if multimodal.video_pruning_rate:
        refused.append("--video-pruning-rate (vLLM's own pruning of videos)")
    if multimodal.mm_encoder_tp_mode == "data":
        refused.append("--mm-encoder-tp-mode data (ranks would each choose for their own images)")
    if vllm_config.compilation_config.compile_mm_encoder:
        refused.append("compile_mm_encoder (the scoring layer could not be watched)")
    if settings.reads_prompt and multimodal.mm_processor_cache_type == "shm":
        refused.append("--mm-processor-cache-type shm with a method that reads the question")
    needs = {need for method in settings.methods for need in find(method).needs}
    if "query_attention" in needs:
        parallel = vllm_config.parallel_config
        reading = [m for m in settings.methods if "query_attention" in find(m).needs]
        why = f"together with {reading[0]}, which runs the model's first layers itself"
        if parallel.tensor_parallel_size > 1:
            refused.append(f"--tensor-parallel-size above 1 {why}")
        if parallel.pipeline_parallel_size > 1:
            refused.append(f"--pipeline-parallel-size above 1 {why}")
        if parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe:
            # The layers of experts wait for all ranks, and the others read nothing just then.
            refused.append(f"--data-parallel-size above 1 for a mixture of experts {why}")
        if vllm_config.quant_config is not None:
            refused.append(f"quantised weights {why}")
        if lora is not None:
            refused.append(f"--enable-lora {why}")
    if settings.default.positions == "original":
        if vllm_config.parallel_config.enable_dbo:
            refused.append("--enable-dbo with --positions original")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            refused.append("--pipeline-parallel-size above 1 with --positions original")
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"):
            refused.append(
                f"--speculative-config with method {speculative.method!r} and --positions original"
            )
    if refused:
        raise UnsupportedModelError(
            f"tokenprune does not work together with {'; '.join(refused)}. Leave that out, or "
            "serve the model without tokenprune."
        )


@contextmanager
def _room_for_positions(config: Any, settings: ServerSettings) -> Iterator[None]:
    """Let the language model's rotary tables be twice as long while the model is built.

    Tokens keep the positions of the unpruned prompt, which may be as long as the model's context;
    what is generated comes after that, and may again be as long as the pruned prompt leaves room.

    Raises
    ------
    UnsupportedModelError
        If longer tables would have other numbers in them.
    """
    text = config.get_text_config()
    if settings.default.positions != "original":
        yield
        return
    kind = rope_type(text)
    if kind in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"this model's rotary embedding is of type {kind!r}, whose numbers depend on the "
            "length of the prompt, so kept tokens cannot stay at their own positions in vLLM. Use "
            "positions='compact'."
        )
    known = text.max_position_embeddings
    text.max_position_embeddings = 2 * known
    try:
        yield
    finally:
        text.max_position_embeddings = known
