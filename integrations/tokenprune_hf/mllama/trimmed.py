"""Trimmed cross-attention for Llama-3.2-Vision: later layers and their cache get fewer tokens.

Source: Trimmed Llama (arXiv 2504.00557). In these models (`mllama`) vision tokens stand in no
prompt: the text attends to them by cross-attention in some layers. At the first such layer every
head takes the tokens that the text attends to most; the union over heads is all that the later
cross-attention layers, and their part of the cache, are given.

Everything is done by hooks on the model's own modules, the attention stays what it is (sdpa or
eager), and no code of transformers is copied.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Keep, check_keep
from tokenprune.errors import BudgetError
from tokenprune.selection import Selection
from tokenprune.selectors.options import check_choice
from tokenprune.trimming import QueryReduction
from tokenprune_hf.attached import (
    Attachment,
    StandIn,
    ThreadState,
    named_arguments,
    named_call,
)
from tokenprune_hf.caches import Filling, Holding
from tokenprune_hf.engine import cache_of
from tokenprune_hf.mllama.checks import (
    brings_images,
    check_prompt,
    known_choice,
    refuse,
    text_of,
    vision_lengths,
)
from tokenprune_hf.mllama.choice import Choice, attended_text, mask_of
from tokenprune_hf.mllama.choosing import Rule, choose
from tokenprune_hf.mllama.method import METHOD
from tokenprune_hf.mllama.model import cross_attention_of

FirstLayer = Literal["full", "trimmed"]
"""What the choosing layer itself attends to."""


@dataclass(eq=False)
class _Call:
    """One run of the decoder.

    Attributes
    ----------
    choice
        What is kept; None until the first cross-attention layer of a prompt.
    attended
        BoolTensor [B, S], False for padding, or None for no padding.
    tiles
        BoolTensor [B, images, tiles], False for padding tiles, or None if that is not known.
    trimmed
        The arguments of the layers that are given the kept tokens, once they are computed.
    """

    choice: Choice | None = None
    attended: Tensor | None = None
    tiles: Tensor | None = None
    trimmed: dict[str, Tensor | None] | None = None


@dataclass(frozen=True)
class _Chosen:
    """What was chosen in one call: see the attributes of `TrimmedAttention`."""

    selections: list[Selection]
    cache_share: float
    seconds: float


class _Thread(ThreadState):
    """What is running in a thread.

    Attributes
    ----------
    call
        The run of the decoder; None where none is, or it is left to the model.
    prompts
        How many prompts the `generate` that is running reads; None where none is.
    generating
        What its first step chose.
    chosen
        What the thread's last call chose; None before its first one.
    """

    call: _Call | None = None
    prompts: int | None = None
    generating: Choice | None = None
    chosen: _Chosen | None = None


_NOTHING = _Chosen([], 1.0, 0.0)


class TrimmedAttention(Attachment):
    """A Llama-3.2-Vision model whose cross-attention is trimmed, until `remove`.

    ::

        with TrimmedAttention(model, keep=0.25) as trimming:
            model.generate(**inputs)
        trimming.selections, trimming.cache_share

    From the paper: the first cross-attention layer chooses; scores are kept apart by head; each
    head takes its k best; the union over heads is K and V of all later cross-attention layers.
    The rest are reconstructions, as no code of the authors was found:

    - A head is a query head (32 in the 11B model), not a group of them around one key head.
    - k is ``tokens_kept(keep, n)``, n being the tokens that count: not of a padding tile, and seen
      by some row of the text. The union therefore is larger than `keep`.
    - A row of the text counts as a query if it is no padding and sees any token at all. Only rows
      of the call that brings the images choose; generated tokens do not.
    - `queries` and `first_layer`, below.
    - A prompt whose text sees no token (one without an image in a batch with images) keeps all N,
      since nothing is there to choose by; its row is what the plain model gives.
    - A row of the text that saw tokens of which none was kept is treated as transformers treats
      rows that see nothing: it attends to all that is there, and the layer's MLP adds nothing.

    Without a `cross_attention_mask` all text sees all tokens, in a model with sdpa too, which by
    itself would read a missing mask as a causal one; where all are kept that is left to the model.

    The unions of a batch are filled up to the largest one, and what fills them up is masked.
    Beams and returned sequences of one prompt share one choice, so that their caches can be
    reordered. Inside one `generate` without a cache the first step chooses for all.

    Parameters
    ----------
    model
        A `MllamaForConditionalGeneration`.
    keep
        What each head keeps: an int of tokens, or a fraction. ``1.0`` changes nothing at all.
    queries
        How a head's queries are combined: ``"sum"`` (the default; ranks as the mean does) or
        ``"max"``.
    first_layer
        ``"full"`` (the default): the choosing layer attends to everything, as it has to be
        computed anyhow. ``"trimmed"``: it too attends to the union only, and so does its cache.

    Attributes
    ----------
    model, keep, queries, first_layer
        What was asked for.
    selections
        One `Selection` per prompt of the last call that brought images, over its N = images x tiles
        x tokens of a tile, which also is `grid`. `scores` is the best over heads of a head's score.
        Empty after a call of text only.
    cache_share
        The share of the cross-attention layers' cache that is left by that call, in bytes: 1.0 is
        all of it. It counts what fills up a batch.
    selecting_seconds
        How long choosing took. On a GPU the time of handing over the work is in it.

    Raises
    ------
    BudgetError, OptionError
        For a wrong budget or option.
    UnsupportedModelError
        If the model is no Llama-3.2-Vision.
    TokenPruneError
        If the model is trimmed already.
    PromptError
        Inside the block: for images that come with a filled cache, caches that do not grow
        (static, quantized), caches that were filled elsewhere or changed since, attention masks of
        other shapes than [B, L], and drafts or chunks in `generate`.
    """

    def __init__(
        self,
        model: Any,
        keep: Keep,
        queries: QueryReduction = "sum",
        first_layer: FirstLayer = "full",
    ) -> None:
        check_choice(METHOD.name, "queries", queries, get_args(QueryReduction))
        check_choice(METHOD.name, "first_layer", first_layer, get_args(FirstLayer))
        if isinstance(keep, str):
            raise BudgetError(
                f"keep={keep!r} is no budget of a head: published ones are for videos of other "
                "models. Give a number of tokens (keep=64) or a fraction of them (keep=0.25)."
            )
        super().__init__(model)
        self.keep = check_keep(keep)
        self.queries: QueryReduction = queries
        self.first_layer: FirstLayer = first_layer
        self._inner, self._layers = cross_attention_of(self.model)
        self._thread = _Thread()
        self._last = _NOTHING
        self.begin()

    @property
    def selections(self) -> list[Selection]:
        """One `Selection` per prompt of the last call that brought images."""
        return (self._thread.chosen or self._last).selections

    @property
    def cache_share(self) -> float:
        """The share of the cross-attention layers' cache that the last call left."""
        return (self._thread.chosen or self._last).cache_share

    @property
    def selecting_seconds(self) -> float:
        """Seconds that choosing took in the last call."""
        return (self._thread.chosen or self._last).seconds

    def _note(self, chosen: _Chosen) -> None:
        self._thread.chosen = self._last = chosen

    # Attaching and taking off ------------------------------------------------------------------

    def _attach(self) -> None:
        self._attachments: list[StandIn | RemovableHandle] = [
            StandIn(self.model, "generate", self._generate),
            StandIn(self._inner, "forward", self._forward),
        ]
        for number, layer in self._layers.items():
            # No lambda: a partial of a bound method is bound anew in a copy of the model.
            hook = functools.partial(self._before_layer, number)
            self._attachments.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _detach(self) -> None:
        for attachment in self._attachments:
            attachment.remove()

    # generate ----------------------------------------------------------------------------------

    def _generate(
        self, plain: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> object:
        """Run the model's own `generate`, knowing how many prompts its rows belong to."""
        named = named_call(self.model, "generate", args, kwargs)
        if brings_images(named) or any(vision_lengths(cache_of(named), self._layers)):
            refuse(named, self.model.generation_config)
        else:
            self._note(_NOTHING)
        text, thread = text_of(named), self._thread
        # `generate` may run inside another one, such as in a logits processor: the outer one's
        # steps need their own again.
        before = thread.prompts, thread.generating
        # Without any text transformers begins with one token of its own.
        thread.prompts, thread.generating = 1 if text is None else len(text), None
        try:
            return plain(*args, **kwargs)
        finally:
            thread.prompts, thread.generating = before

    # The decoder's runs ------------------------------------------------------------------------

    def _forward(
        self, plain: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> object:
        """Run the inner model, which has the decoder, on a prompt with images or what follows."""
        named = named_arguments(self._inner, args, kwargs)
        thread = self._thread
        with Filling[Choice](cache_of(named)) as filling:
            thread.call = call = self._begin(named, filling)
            try:
                output = plain(*args, **kwargs)
            finally:
                thread.call = None
            if call is not None and call.choice is not None:
                # Without a cache of the caller's, the model has made one and returns it.
                if filling.cache is None and isinstance(output, Mapping):
                    filling.cache = cache_of(output)
                before = filling.before
                holding = Holding[Choice](call.choice, None) if before is None else before.holding
                filling.holding = replace(holding, prompt=call.choice)
            return output

    def _begin(self, named: dict[str, Any], filling: Filling[Choice]) -> _Call | None:
        """Return what the layers have to know: of a prompt with images, or of its cache."""
        text, cache = text_of(named), cache_of(named)
        if text is None:
            return None  # transformers says what is missing
        if not brings_images(named):
            if any(vision_lengths(cache, self._layers)):
                return _Call(known_choice(cache, filling.before, text, self._layers))
            if self._thread.prompts is None:
                self._note(_NOTHING)
            return None
        check_prompt(named, cache, text, self._layers)
        tiles, ids = named.get("aspect_ratio_mask"), named.get("aspect_ratio_ids")
        if tiles is not None:
            tiles = tiles.bool()
            if ids is not None:
                tiles = tiles & (ids != 0)[..., None]  # 0 is where a batch has no image
        call = _Call(None, attended_text(named.get("attention_mask"), text), tiles)
        known = self._thread.generating
        if known is not None and cache is None and named.get("use_cache") is False:
            # A later step of a `generate` without a cache, which reads the whole prompt again. A
            # call with other rows, such as a logits processor's, is none.
            call.choice = known if known.rows == len(text) else None
        return call

    def _before_layer(
        self, number: int, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
        """Run before a cross-attention layer: choose at the first, and trim what it is given."""
        call, thread = self._thread.call, self._thread
        if call is None:
            return None  # the decoder is run by itself, or a call without images: plain
        first = number == next(iter(self._layers))  # they are in the model's order
        named = named_arguments(layer, args, kwargs)
        if call.choice is None:
            with torch.no_grad():
                call.choice = self._choose(layer, named, call)
            if thread.prompts is not None:
                # Steps of a `generate` without a cache read the prompt again. They must not choose
                # anew, as the generated tokens would be queries then.
                thread.generating = thread.generating or call.choice
        choice = call.choice
        if not choice.drops:
            return None
        if first and self.first_layer == "full":
            given: dict[str, Tensor | None]
            given = {"cross_attention_mask": mask_of(named, choice.rows, choice.total)}
        else:
            # One set for all later layers of the run: they get the same states and mask.
            call.trimmed = given = call.trimmed or choice.trimmed_arguments(named)
        # As the decoder calls its layers: the hidden states by position, all else by name.
        hidden = named.pop("hidden_states")
        return (hidden,), {**named, **given}

    def _choose(self, layer: Any, named: dict[str, Any], call: _Call) -> Choice:
        """Choose what stays at the first cross-attention layer, and note it."""
        started = time.perf_counter()
        sizes = int(self._inner.max_num_tiles), int(self._inner.vision_model.num_patches)
        rule, prompts = Rule(self.keep, self.queries), self._thread.prompts
        selections = choose(rule, layer, named, call.attended, call.tiles, sizes, prompts)
        total = selections[0].total
        choice = Choice.of_prompts(
            [selection.kept for selection in selections],
            len(named["hidden_states"]),
            total,
            len(self._layers),
            first_is_full=self.first_layer == "full",
        )
        share = sum(choice.lengths) / (total * len(choice.lengths))
        self._note(_Chosen(selections, share, time.perf_counter() - started))
        return choice


def trim_cross_attention(
    model: Any,
    keep: Keep,
    *,
    queries: QueryReduction = "sum",
    first_layer: FirstLayer = "full",
) -> TrimmedAttention:
    """Trim the cross-attention of a Llama-3.2-Vision inside a ``with`` block.

    ::

        with tokenprune_hf.trim_cross_attention(model, keep=0.25) as trimming:
            output = model.generate(**inputs, max_new_tokens=64)
        trimming.selections, trimming.cache_share

    Without a block it lasts until `tokenprune_hf.remove`. Source: Trimmed Llama (arXiv
    2504.00557); `TrimmedAttention` says what of it is reconstructed.

    Parameters
    ----------
    model, keep, queries, first_layer
        See `TrimmedAttention`.

    Returns
    -------
    TrimmedAttention
        With the `selections` and the `cache_share` of the last call, and `remove`.

    Raises
    ------
    BudgetError, OptionError, UnsupportedModelError, TokenPruneError
        As `TrimmedAttention`.
    """
    return TrimmedAttention(model, keep, queries, first_layer)
