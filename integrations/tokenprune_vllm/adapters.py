"""LoRA adapters of the language model, where a method reads the question with it.

vLLM tells its LoRA layers token by token which adapter is whose, for the batch at hand. Images are
encoded before that batch runs, those of several requests together. So two things are needed here:

- whose an image is. vLLM says that to models whose towers have adapters, when
  ``enable_tower_connector_lora`` is on; then it also keeps what was encoded for one adapter apart
  from what was encoded for another. A pruned model claims a tower that none of its modules is in,
  so that it is told and no module of the real tower gets an adapter.
- layers that run with that adapter on a prompt of its own. They get another mapping while that
  prompt is read, and the batch's stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.model_executor.models.module_mapping import MultiModelKeys

_ITEMS = "tokenprune_items"
"""The name of the tower that is claimed."""

NONE = 0
"""vLLM's number of no adapter."""


def modules_with_adapters(
    model: Any, own: MultiModelKeys | None, adapters: Adapters | None
) -> MultiModelKeys:
    """Return which modules of a model belong to what, for vLLM's LoRA.

    Parameters
    ----------
    model
        vLLM's.
    own
        What its own class says. Of a class that says nothing, vLLM would also give adapters to the
        tower, and run them by the batch's mapping.
    adapters
        Those that a method may have to read with.
    """
    if own is None:
        whole = model.get_language_model()
        name = next(name for name, module in model.named_modules() if module is whole)
        own = MultiModelKeys(language_model=[name])
    if adapters is None:
        return own
    return MultiModelKeys(language_model=own.language_model, tower_model=[_ITEMS])


class Adapters:
    """The adapters of a model whose images are chosen by the question.

    Parameters
    ----------
    model
        vLLM's. It gets its ``lora_manager`` from vLLM once it is loaded.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Whether each item that vLLM announced since the encoder ran has anything to encode.
        self._announced: list[bool] = []
        self._of_items: list[int] = []
        self._wrapper: Any = None
        self._tokens = 0

    def announce(self, item: Any, rows: int) -> tuple[int, int | None]:
        """Take note of an item that is encoded next; return how many tokens of the tower it has.

        Parameters
        ----------
        item
            None when vLLM asks how many tokens so many rows have at most, or where the item's rows
            are known.
        rows
            Of the item in the prompt.
        """
        self._announced.append(item is not None)
        # One token for each item in the tower that is claimed, and never more of them than rows.
        return (rows if item is None else 1), None

    def take(self, count: int) -> list[int]:
        """Return the adapters, by vLLM's numbers, of the items that are encoded now.

        vLLM announces all items of a step, and then has them encoded in that order, in one call or
        several. Those that it makes itself to measure memory are announced by nobody and have none.
        """
        if self._announced:
            self._of_items = self._told()
            self._announced.clear()
        taken, self._of_items = self._of_items[:count], self._of_items[count:]
        return taken + [NONE] * (count - len(taken))

    def _told(self) -> list[int]:
        """Return the adapters of the items of a step that have anything to encode."""
        manager = self._model.lora_manager
        wrapper = manager.punica_wrapper_mapping[_ITEMS]
        if wrapper.indices_len[1] is None:  # nothing was told yet
            return []
        slots = wrapper.sampler_indices.tolist()
        announced = self._announced[-len(slots) :]
        return [
            NONE if slot < 0 else manager.lora_index_to_id[slot]
            for slot, encoded in zip(slots, announced, strict=True)
            if encoded
        ]

    @contextmanager
    def active(self, adapter: int, tokens: int, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let modules run with one adapter on so many tokens while the block runs.

        Parameters
        ----------
        adapter
            vLLM's number of one that is in memory, as those of all requests of a step are; `NONE`
            for the model alone.
        tokens
            How many each module is called with.
        modules
            Among which to look for layers that take adapters.
        """
        layers = [layer for layer in modules if isinstance(layer, BaseLayerWithLoRA)]
        before = [layer.punica_wrapper for layer in layers]
        wrapper = self._of_tokens(tokens)
        manager = self._model.lora_manager
        wrapper.update_metadata(
            LoRAMapping((adapter,) * tokens, (adapter,), is_prefill=True),
            manager.lora_index_to_id,
            manager.lora_slots + 1,
            manager.vocab_size,
        )
        try:
            for layer in layers:
                layer.set_mapping(wrapper)
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.set_mapping(own)

    def _of_tokens(self, tokens: int) -> Any:
        """Return a mapping with room for so many tokens: a prompt may be longer than a batch."""
        if self._wrapper is None or tokens > self._tokens:
            self._tokens = max(tokens, 2 * self._tokens)
            manager = self._model.lora_manager
            self._wrapper = get_punica_wrapper(
                self._tokens,
                max_batches=1,
                device=manager.device,
                lora_config=manager.lora_config,
            )
        return self._wrapper
