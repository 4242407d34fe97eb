"""Pruner: the way of a server's images from the encoder to the language model.

Encode, choose (`choosing`), keep the chosen rows, and hand each row's own position on to where the
language model reads it (`positions`, `prompt_positions`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from tokenprune.errors import ConfigError, UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.selection import Selection
from tokenprune.tower.structure import of_noise, same
from tokenprune.transfer import to_device
from tokenprune_vllm import metrics
from tokenprune_vllm.adapters import Adapters
from tokenprune_vllm.carrying import carry, taken
from tokenprune_vllm.choosing import Chooser, logger
from tokenprune_vllm.encoder_calls import EncoderCall, Item
from tokenprune_vllm.positions import (
    DIGITS,
    PositionOffsets,
    RowNumbers,
    from_columns,
    to_columns,
)
from tokenprune_vllm.prompt_positions import item_positions, loses_nothing, prompt_positions
from tokenprune_vllm.settings import UNPRUNED, ServerSettings
from tokenprune_vllm.tags import around, to_codes

_REACH = 3
"""Numbers of `tags.around`, and one of `tags.to_codes`."""

_NOISES = 4
"""Most times that an encoder is run on noise: rows that are codes may be the same by chance."""


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
    reach
        Where to write how far the image of each token of a batch reaches around it, and how often
        it counts, see `tags`; None where attention is the engine's own.

    Attributes
    ----------
    chooser
        What chooses the rows; None on later stages of a pipeline, which get no images.
    adapters
        Those that a method may have to read with; None where there are none.
    mrope
        Whether the model itself counts positions on three axes.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        settings: ServerSettings,
        vllm_config: Any,
        reach: RowNumbers | None = None,
    ) -> None:
        self._model = model
        self._family = family
        self._settings = settings
        self._checked: set[str] = set()
        self.adapters: Adapters | None = None
        if vllm_config.lora_config is not None and settings.readers:
            self.adapters = Adapters(model)
        staged = vllm_config.parallel_config.pipeline_parallel_size > 1
        self.chooser: Chooser | None = None
        if not staged or get_pp_group().is_first_rank:
            self.chooser = Chooser(model, family, settings, vllm_config, self.adapters)
        scheduler = vllm_config.scheduler_config
        self._width = int(vllm_config.model_config.get_inputs_embeds_size())
        self._most_rows = int(
            max(scheduler.max_num_batched_tokens, scheduler.max_num_encoder_input_tokens)
        )
        # What else a model of no family makes of ids (embeddings of each layer, experts by
        # modality) is its own: text among rows travels as ids, for the model to embed it.
        self._carries_ids = not family.known
        # Looking for it waits for the device, so it is looked for only once there may be some: from
        # the first item that has text among its rows on, or where rows are encoded elsewhere.
        self._copied = vllm_config.ec_transfer_config is not None
        self._text_travels = self._copied
        self.mrope = family.mrope
        self._axes = 3 if family.mrope else 1
        self._offsets: PositionOffsets | None = None
        self._columns = DIGITS * self._carries_ids  # that travel with each row
        if settings.default.positions == "original":
            device = torch.get_default_device()
            self._offsets = PositionOffsets(self._axes, scheduler.max_num_batched_tokens, device)
            self._columns += DIGITS * self._axes
        self._reach = reach
        if reach is not None:
            self._columns += DIGITS * _REACH

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
        if default == UNPRUNED:
            return
        if all(before == after for before, after in largest.values()):
            sizes = " and ".join(f"{name} has {rows}" for name, (rows, _) in largest.items())
            raise ConfigError(
                f"keep={default.keep} prunes nothing: of this model's tokens the largest "
                f"{sizes or 'image or video is switched off'}. Give a smaller keep, or serve the "
                "model without tokenprune."
            )
        if self.chooser is not None and get_tensor_model_parallel_rank() == 0:
            logger.info(
                "tokenprune: %s, keep %s, %s positions; scoring layer %s; tokens of the largest %s",
                default.method,
                default.keep,
                default.positions,
                self.chooser.attention_name,
                ", ".join(f"{name}: {rows} -> {kept}" for name, (rows, kept) in largest.items()),
            )

    # Rows --------------------------------------------------------------------------------------

    def embed(self, encode: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Encode the items of one call and return the rows of each that stay."""
        kept: list[Tensor] = []
        adapters = None if self.adapters is None else self.adapters.take
        for items, of_items in EncoderCall(arguments, adapters).runs(self._most_rows):
            chooser = self.chooser
            if chooser is None:  # here the engine measures memory, and throws the rows away
                kept += encode(**of_items)
                continue
            if items[0].ticket.visual:
                chooser.find(functools.partial(_encode_noise, encode, of_items), items)
            with chooser.watching() as watched:
                rows = list(encode(**of_items))
            self._check_rows(items, rows, encode, of_items)
            kept += self._prune(chooser, items, rows, watched)
        return kept

    def _check_rows(
        self,
        items: Sequence[Item],
        rows: list[Tensor],
        encode: Callable[..., Any],
        arguments: Mapping[str, Any],
    ) -> None:
        """Raise, at the first items of each modality, if a model of any type has rows of structure.

        vLLM's first items are usually its own, with which it measures memory before it serves.

        Raises
        ------
        UnsupportedModelError
            If not every row is a part of a picture.
        """
        modality = items[0].ticket.modality
        if self._family.known or modality in self._checked or not items[0].ticket.visual:
            return
        counts = [item.ticket.region.total for item in items]
        if [len(of_item) for of_item in rows] != counts:
            raise UnsupportedModelError(
                f"the encoder of {type(self._model).__name__} returned "
                f"{[len(of_item) for of_item in rows]} rows for {counts} placeholders: tokenprune "
                "does not know which of them stand where. Serve the model without tokenprune."
            )
        alike = [torch.ones(len(of_item), dtype=torch.bool) for of_item in rows]
        for seed in range(_NOISES):
            others = encode(**of_noise(arguments, seed))
            alike = [
                before & same(*pair).cpu()
                for before, *pair in zip(alike, rows, others, strict=True)
            ]
            if not any(bool(of_item.any()) for of_item in alike):
                break
        structure = [int(of_item.sum()) for of_item in alike]
        if any(structure):
            raise UnsupportedModelError(
                f"of {counts[0]} rows that the encoder of {type(self._model).__name__} returns for "
                f"a {modality}, {structure[0]} are the same whatever the pixels are: newlines, "
                "separators or the like, which must stay, and where they stand is not known in "
                "vLLM for this model. Serve it without tokenprune, or prune it in transformers."
            )
        self._checked.add(modality)

    @torch.inference_mode()
    def _prune(
        self, chooser: Chooser, items: Sequence[Item], rows: list[Tensor], watched: Any
    ) -> list[Tensor]:
        """Return the kept rows of each item, and count the time."""
        start = time.perf_counter()
        selections = chooser.choose(items, rows, watched)
        plans = [
            self._plan(item, len(of_item), of_item.dtype, chosen)
            for item, of_item, chosen in zip(items, rows, selections, strict=True)
        ]
        kept = self._keep(items, rows, plans)
        spent = time.perf_counter() - start
        prunings = [(item.ticket.modality, item.ticket.pruning) for item in items]
        methods = [(modality, pruning.method) for modality, pruning in prunings if pruning]
        for modality, method in methods:
            metrics.count_time(modality, method, spent / len(methods))
        return kept

    def _plan(
        self, item: Item, count: int, dtype: torch.dtype, selections: Sequence[Selection]
    ) -> _Plan:
        """Return what is made of one item's rows, worked out on the host.

        Parameters
        ----------
        item
            Whose rows they are.
        count, dtype
            How many there are, and of what numbers.
        selections
            Of its segments, on the host; none where it is not pruned.
        """
        region, hides = item.ticket.region, item.ticket.hides
        stays = torch.ones(region.total, dtype=torch.bool, device="cpu")
        counts = torch.ones(region.total, dtype=torch.int64, device="cpu")
        for segment, selection in zip(
            region.segments if selections else (), selections, strict=True
        ):
            of_kept = segment.rows[selection.kept]
            counts[segment.rows] = 0
            counts[of_kept] = 1
            stays[segment.rows] = hides
            stays[of_kept] = True
            if item.ticket.counted and selection.represented is not None:
                counts[of_kept] = selection.represented.cpu()
        order = stays.nonzero()[:, 0]
        columns = region.is_row.nonzero()[:, 0]
        text = None
        if item.ticket.text_moves:
            # How many rows stand on which side of the text inside was not known when the prompt
            # was made: the text's embeddings come along, behind the rows.
            sources = torch.empty(region.length, dtype=torch.int64, device="cpu")
            sources[columns] = torch.arange(count, device="cpu")
            is_text = ~region.is_row
            sources[is_text] = torch.arange(count, count + int(is_text.sum()), device="cpu")
            in_prompt = torch.ones_like(region.is_row)
            in_prompt[columns] = stays
            text = region.text()
            columns = in_prompt.nonzero()[:, 0]
            order = sources[columns]
            ids = torch.where(region.is_row, 0, region.token_ids + 1)[columns]
            self._text_travels |= self._carries_ids
        else:
            columns = columns[stays]
            ids = torch.zeros_like(columns)
        counts = torch.nn.functional.pad(counts, (0, 0 if text is None else len(text)), value=1)
        behind = self._columns_behind(item, columns, ids, counts[order], dtype, text)
        return _Plan(order, behind, text)

    def _keep(
        self, items: Sequence[Item], rows: Sequence[Tensor], plans: Sequence[_Plan]
    ) -> list[Tensor]:
        """Return each item's rows that stay, with what travels behind them.

        They come in the order of its region in the prompt.
        """
        if not plans:
            return []
        device = rows[0].device
        # One copy each for what the host worked out of all items.
        counts = [len(plan.order) for plan in plans]
        orders = to_device(torch.cat([plan.order for plan in plans]), device).split(counts)
        behind: Sequence[Tensor | None] = [None] * len(plans)
        if plans[0].behind is not None:
            together = torch.cat([plan.behind for plan in plans if plan.behind is not None])
            behind = to_device(together, device).split(counts)
        kept = []
        for of_item, plan, order, columns in zip(rows, plans, orders, behind, strict=True):
            if plan.text is not None:
                of_item = torch.cat([of_item, self._rows_of_text(of_item, plan.text)])
            staying = of_item.index_select(0, order)
            kept.append(staying if columns is None else carry(staying, columns, self._copied))
        return kept

    def _rows_of_text(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return rows [n, D] of the text inside an item: its embeddings, and 0 for deeper layers.

        Where it travels as ids the model embeds it itself, and all is 0.
        """
        made = rows.new_zeros(len(ids), rows.shape[1])
        if not self._carries_ids:
            made[:, : self._width] = self._embed_text(to_device(ids, rows.device))
        return made

    def _columns_behind(
        self,
        item: Item,
        columns: Tensor,
        ids: Tensor,
        counts: Tensor,
        dtype: torch.dtype,
        text: Tensor | None,
    ) -> Tensor | None:
        """Return what travels behind the rows of an item, on the host.

        These are positions, how far its image reaches, how often each counts, and ids of text.

        Parameters
        ----------
        item
            Whose rows they are.
        columns
            LongTensor [n], where each stands in the item's region.
        ids
            LongTensor [n], 0 for a row, and of text its id + 1.
        counts
            LongTensor [n], how often each counts; 0 for what is hidden.
        dtype
            Of the rows.
        text
            Ids of the text inside that comes along; None where none does.

        Returns
        -------
        Tensor or None
            [n, X] of `dtype`; None where nothing does.
        """
        behind: list[Tensor] = []
        if self._offsets is not None:
            if item.ticket.visual:
                positions = item_positions(self._model.engine_positions, item.ticket, item.fields)
                offsets = positions[: self._axes, columns]
            else:  # sound, whose positions are in the prompt's already
                offsets = columns.new_zeros(self._axes, len(columns))
            behind.append(to_columns(offsets, dtype))
        if self._reach is not None:
            reach = columns.new_zeros(_REACH - 1, len(columns))
            if item.ticket.masked and item.ticket.visual:
                # As the rows stand in the prompt, which is perhaps pruned.
                _, is_row = item.ticket.shrunk()
                if text is not None or is_row is None:
                    reach = around(ids == 0)
                else:
                    reach = around(is_row)[:, is_row]
            behind.append(to_columns(torch.cat([reach, to_codes(counts)[None]]), dtype))
        if self._carries_ids:
            behind.append(to_columns(ids[None], dtype))
        return torch.cat(behind, dim=1) if behind else None

    def _embed_text(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._model.get_language_model().embed_input_ids(ids)
        return embedded

    # Positions ---------------------------------------------------------------------------------

    def take_columns(
        self, input_ids: Tensor, rows: Any, is_row: Tensor | None
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Read what travels with the rows of a batch; remember positions for `positions`.

        Parameters
        ----------
        input_ids
            [tokens] of the batch.
        rows
            Of each item in the batch, with their columns.
        is_row
            BoolTensor [tokens], where they go.

        Returns
        -------
        input_ids, rows, is_row
            What the model is to embed. Text that came as rows is text again.
        """
        if rows is None or len(rows) == 0:
            for numbers in (self._offsets, self._reach):
                if numbers is not None:
                    numbers.write(None, None, len(input_ids))
            return input_ids, rows, is_row
        if not self._columns:
            return input_ids, rows, is_row
        pairs = [taken(of_item, self._columns, self._copied) for of_item in rows]
        rows = [of_item for of_item, _ in pairs]
        columns = [behind for _, behind in pairs]
        first = 0
        for numbers, count in ((self._offsets, self._axes), (self._reach, _REACH)):
            if numbers is None:
                continue
            end = first + count * DIGITS
            found = from_columns(torch.cat([behind[:, first:end] for behind in columns]))
            numbers.write(found, is_row, len(input_ids))
            first = end
        if self._carries_ids and self._text_travels and is_row is not None:
            ids = [from_columns(behind[:, -DIGITS:])[0] for behind in columns]
            return self._text_again(input_ids, rows, is_row, ids)
        return input_ids, rows, is_row

    def _text_again(
        self, input_ids: Tensor, rows: list[Tensor], is_row: Tensor, ids: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        is_text = torch.cat(ids).to(is_row.device) > 0
        if not bool(is_text.any()):
            return input_ids, rows, is_row
        text = is_row.clone()
        text[is_row] = is_text
        own = torch.cat(ids)
        input_ids = input_ids.clone()
        input_ids[text.to(input_ids.device)] = (own[own > 0] - 1).to(input_ids)
        rows = [of_item[of_text == 0] for of_item, of_text in zip(rows, ids, strict=True)]
        return input_ids, [of_item for of_item in rows if len(of_item)], is_row & ~text

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

    def prompt_positions(
        self, tokens: Sequence[int], features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Return positions [3, L] of a pruned prompt and the distance of the next one from L."""
        if self._offsets is None:
            if loses_nothing(features):  # the model's own, as without the plugin
                own: tuple[Tensor, int] = self._model.engine_positions(list(tokens), list(features))
                return own
            return torch.arange(len(tokens)).expand(3, -1).contiguous(), 0
        return prompt_positions(self._model.engine_positions, tokens, features)


@dataclass(frozen=True)
class _Plan:
    """What is made of the rows of one item, on the host.

    Attributes
    ----------
    order
        LongTensor [n]: which rows stay, in order. Those of the text inside are counted behind the
        encoder's.
    behind
        [n, X], what travels behind them; None where nothing does.
    text
        LongTensor, ids of the text inside that comes along; None where none does.
    """

    order: Tensor
    behind: Tensor | None
    text: Tensor | None


@torch.inference_mode()
def _encode_noise(encode: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Tensor]:
    """Return the rows of each item, if the encoder is given noise of the same sizes."""
    return list(encode(**of_noise(arguments)))
