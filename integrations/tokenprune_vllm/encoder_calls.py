"""One call of vLLM's vision encoder: its images or videos, each with what the worker knows of it.

vLLM hands over the values of all items together, some stacked item by item, some laid end to end,
some shared by all. Here a call is told apart into items, and cut into runs of the encoder that fit
into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune_vllm.encoder_inputs import Fields
from tokenprune_vllm.processor import PROMPT, REGION, TICKET, Ticket, unpack_prompt


@dataclass(frozen=True)
class Item:
    """One image or video in the worker.

    Attributes
    ----------
    ticket
        What the processor told the worker about it.
    fields
        Its own part of the encoder's arguments, but for what lies end to end or is shared.
    before, after
        LongTensors, ids of the text around it, or None where no method reads it.
    adapter
        vLLM's number of its request's LoRA adapter, 0 for none, where a method reads with it.
    """

    ticket: Ticket
    fields: Fields
    before: Tensor | None = None
    after: Tensor | None = None
    adapter: int = 0


class EncoderCall:
    """The items of one call of `embed_multimodal`.

    Parameters
    ----------
    arguments
        What vLLM calls it with.
    adapters
        Number of items -> the adapter of each, where a method reads with them.

    Raises
    ------
    ConfigError
        If the items were prepared without tokenprune.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        adapters: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._arguments = dict(arguments)
        tickets, regions = self._arguments.pop(TICKET, None), self._arguments.pop(REGION, None)
        prompts = self._arguments.pop(PROMPT, None)
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
        stacked = {name: value for name, value in self._arguments.items() if name not in together}
        adapter_of = [0] * len(unpacked) if adapters is None else adapters(len(unpacked))
        self._items = []
        for index, ticket in enumerate(unpacked):
            before, after = (None, None) if prompts is None else unpack_prompt(prompts[index])
            fields = {name: value[index] for name, value in stacked.items()}
            self._items.append(Item(ticket, fields, before, after, adapter_of[index]))

    def runs(self, most_rows: int) -> Iterator[tuple[list[Item], dict[str, Any]]]:
        """Yield items that are encoded together, and the encoder's arguments for them.

        vLLM counts the rows that stay when it puts images together, but the encoder reads all of
        them: no run is larger than what vLLM measured memory for, unless one item alone is.

        Parameters
        ----------
        most_rows
            Rows of the encoder in one run.
        """
        if not all(item.ticket.visual for item in self._items):
            yield self._items, dict(self._arguments)  # sound: nothing is dropped of it
            return
        start = rows = 0
        for index, item in enumerate(self._items):
            size = item.ticket.region.total
            if index > start and rows + size > most_rows:
                yield self._run(slice(start, index))
                start, rows = index, 0
            rows += size
        yield self._run(slice(start, len(self._items)))

    def _run(self, run: slice) -> tuple[list[Item], dict[str, Any]]:
        items = self._items[run]
        if len(items) == len(self._items):
            return items, dict(self._arguments)
        return items, {name: self._cut(name, value, run) for name, value in self._arguments.items()}

    def _cut(self, name: str, value: Any, run: slice) -> Any:
        """Return what some of the items have of one argument."""
        tickets = [item.ticket for item in self._items]
        if any(name in ticket.shared for ticket in tickets):
            return value
        if any(name in ticket.entries for ticket in tickets):
            counts = (ticket.entries.get(name, 0) for ticket in tickets)
            edges = [0, *itertools.accumulate(counts)]
            return value[edges[run.start] : edges[run.stop]]
        return value[run]
