"""Trimmed cross-attention for Llama-3.2-Vision: later layers and their cache get fewer tokens.

Source: Trimmed Llama (arXiv 2504.00557). In these models (`mllama`) vision tokens stand in no
prompt: the text looks at them from some layers by cross-attention. At the first such layer every
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
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.budget import Keep, check_keep, keeps_all
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    OptionError,
    PromptError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.selection import Selection
from tokenprune.trimming import QueryReduction, head_scores, union_of_heads
from tokenprune_hf.attached import (
    Attachment,
    StandIn,
    ThreadState,
    named_arguments,
    named_call,
)
from tokenprune_hf.caches import Filling, Held, Holding
from tokenprune_hf.engine import cache_of

NAME = "trimmed-attention"
"""What users write: ``method="trimmed-attention"``."""

FirstLayer = Literal["full", "trimmed"]
"""What the choosing layer itself attends to."""

_OPTIONS = {"queries": get_args(QueryReduction), "first_layer": get_args(FirstLayer)}

_CROPS = "what is rejected of a draft is cut off every layer of the cache, vision tokens included"
_REFUSED = {
    "assistant_model": _CROPS,
    "assistant_early_exit": _CROPS,
    "prompt_lookup_num_tokens": _CROPS,
    "prefill_chunk_size": "transformers passes no images along with chunks",
}


@dataclass(frozen=True, eq=False)
class _Choice:
    """What was chosen for the B rows of one prompt.

    Attributes
    ----------
    kept
        LongTensor [B, K], ascending in each row and filled up with 0 at its end.
    real
        BoolTensor [B, K], False where `kept` is filled up.
    total
        N, before trimming.
    drops
        Whether any row has fewer than N.
    lengths
        How many tokens each cross-attention layer is given.
    """

    kept: Tensor
    real: Tensor
    total: int
    drops: bool
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.kept)

    def of_rows(self, rows: Tensor) -> _Choice:
        """Return what was chosen for some rows, LongTensor [C]."""
        rows = rows.to(self.kept.device)
        return replace(self, kept=self.kept[rows], real=self.real[rows])


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
        The arguments of the layers that are given the kept tokens, once they are worked out.
    """

    choice: _Choice | None = None
    attended: Tensor | None = None
    tiles: Tensor | None = None
    trimmed: dict[str, Any] | None = None


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
    generating: _Choice | None = None
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
        How a head's queries are put together: ``"sum"`` (the default; ranks as the mean does) or
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
        **unknown: Any,
    ) -> None:
        _check_options({"queries": queries, "first_layer": first_layer, **unknown})
        if isinstance(keep, str):
            raise BudgetError(
                f"keep={keep!r} is no budget of a head: published ones are for videos of other "
                "models. Give a number of tokens (keep=64) or a fraction of them (keep=0.25)."
            )
        super().__init__(model)
        self.keep = check_keep(keep)
        self.queries: QueryReduction = queries
        self.first_layer: FirstLayer = first_layer
        self._inner, self._layers = _cross_attention_of(self.model)
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
        self._put_on: list[Any] = [
            StandIn(self.model, "generate", self._generate),
            StandIn(self._inner, "forward", self._forward),
        ]
        for number, layer in self._layers.items():
            hook = functools.partial(self._before_layer, number)
            self._put_on.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _detach(self) -> None:
        for one in self._put_on:
            one.remove()

    # generate ----------------------------------------------------------------------------------

    def _generate(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the model's own `generate`, knowing how many prompts its rows belong to."""
        named = named_call(self.model, "generate", args, kwargs)
        if _brings_images(named) or any(self._lengths(cache_of(named))):
            _refuse(named, self.model.generation_config)
        else:
            self._note(_NOTHING)
        text, thread = _text_of(named), self._thread
        before = thread.prompts, thread.generating
        thread.prompts, thread.generating = 1 if text is None else len(text), None
        try:
            return plain(*args, **kwargs)
        finally:
            thread.prompts, thread.generating = before

    # The decoder's runs ------------------------------------------------------------------------

    def _forward(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the inner model, which has the decoder, on a prompt with images or what follows."""
        named = named_arguments(self._inner, args, kwargs)
        thread = self._thread
        with Filling[_Choice](cache_of(named)) as filling:
            thread.call = call = self._begin(named, filling)
            try:
                output = plain(*args, **kwargs)
            finally:
                thread.call = None
            if call is not None and call.choice is not None:
                if filling.cache is None and isinstance(output, Mapping):
                    filling.cache = cache_of(output)
                found = filling.before
                holding = Holding[_Choice](call.choice, None) if found is None else found.holding
                filling.holding = replace(holding, prompt=call.choice)
            return output

    def _begin(self, named: dict[str, Any], filling: Filling[_Choice]) -> _Call | None:
        """Return what the layers have to know: of a prompt with images, or of its cache."""
        text, cache = _text_of(named), cache_of(named)
        if text is None:
            return None  # transformers says what is missing
        if not _brings_images(named):
            if any(self._lengths(cache)):
                return _Call(self._known(cache, filling.before, text))
            if self._thread.prompts is None:
                self._note(_NOTHING)
            return None
        self._check_prompt(named, cache, text)
        tiles, ids = named.get("aspect_ratio_mask"), named.get("aspect_ratio_ids")
        if tiles is not None:
            tiles = tiles.bool()
            if ids is not None:
                tiles = tiles & (ids != 0)[..., None]  # 0 is where a batch has no image
        call = _Call(None, _attended(named.get("attention_mask"), text), tiles)
        known = self._thread.generating
        if known is not None and cache is None and named.get("use_cache") is False:
            # A later step of a `generate` without a cache, which reads the whole prompt again.
            call.choice = known if known.rows == len(text) else None
        return call

    def _before_layer(
        self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before a cross-attention layer: choose at the first, and trim what it is given."""
        call, thread = self._thread.call, self._thread
        if call is None:
            return None  # somebody runs an inner module: the plain model
        first = number == next(iter(self._layers))
        named = named_arguments(layer, args, kwargs)
        if call.choice is None:
            with torch.no_grad():
                call.choice = self._choose(layer, named, call)
            if thread.prompts is not None:
                thread.generating = thread.generating or call.choice
        choice = call.choice
        if not choice.drops:
            return None
        if first and self.first_layer == "full":
            given = {"cross_attention_mask": _mask_of(named, choice.rows, choice.total)}
        else:
            call.trimmed = given = call.trimmed or _trim(choice, named)
        hidden = named.pop("hidden_states")
        return (hidden,), {**named, **given}

    # Checking ----------------------------------------------------------------------------------

    def _lengths(self, cache: Any) -> tuple[int, ...]:
        """Return how many tokens a cache holds for each cross-attention layer."""
        return tuple(0 if keys is None else keys.shape[-2] for keys in self._keys(cache))

    def _keys(self, cache: Any) -> list[Tensor | None]:
        layers = getattr(cache, "layers", [])
        found = [layers[number].keys if number < len(layers) else None for number in self._layers]
        return [keys if isinstance(keys, Tensor) and keys.numel() else None for keys in found]

    def _check_prompt(self, named: dict[str, Any], cache: Any, text: Tensor) -> None:
        """Raise unless a call that brings images can be trimmed."""
        if self.model.training and any(one.gradient_checkpointing for one in self._layers.values()):
            raise UnsupportedModelError(
                "trimmed attention does not work with gradient checkpointing, which runs layers a "
                "second time after the call. Call model.eval(), or turn gradient checkpointing off."
            )
        from transformers.cache_utils import DynamicLayer

        layers = getattr(cache, "layers", [])
        kinds = {type(layers[number]) for number in self._layers if number < len(layers)}
        if (later := getattr(cache, "layer_class_to_replicate", None)) is not None:
            kinds.add(later)
        if kinds - {DynamicLayer}:
            raise PromptError(
                f"a {type(cache).__name__} does not shrink with its vision tokens, so it cannot be "
                "used with trimmed attention. Leave out cache_implementation and the cache, or "
                "pass a DynamicCache."
            )
        if any(self._lengths(cache)):
            raise PromptError(
                "images cannot be added to a cache that already holds some. Leave out pixel_values "
                "and cross_attention_states if the cache holds them, or call without "
                "a cache. `generate` takes pixel_values alone: it would pass "
                "cross_attention_states again at every step."
            )
        pixels = named.get("pixel_values")
        if pixels is not None and len(pixels) != len(text):
            raise PromptError(
                f"pixel_values are those of {len(pixels)} prompts, and the text has {len(text)}. "
                "Pass both as the processor returned them."
            )

    def _known(self, cache: Any, found: Held[_Choice] | None, text: Tensor) -> _Choice:
        """Return what was chosen for the rows of a filled cache.

        Raises
        ------
        PromptError
            If that is not known, or the cache does not hold it any more.
        """
        if found is None:
            raise PromptError(
                "this cache was filled outside the block in which attention is trimmed, so it is "
                "not known which vision tokens it holds. Let the block begin before the prompt is "
                "read."
            )
        choice = found.holding.prompt
        if found.rows is not None:
            choice = choice.of_rows(found.rows)
        rows = {len(text), *(len(keys) for keys in self._keys(cache) if keys is not None)}
        if rows != {choice.rows} or self._lengths(cache) != choice.lengths:
            raise PromptError(
                f"{choice.rows} prompts left {list(choice.lengths)} vision tokens in this cache's "
                f"cross-attention layers; now {len(text)} go on from it and it holds "
                f"{list(self._lengths(cache))}. Go on with the same rows, from a cache that was "
                "not cropped or otherwise changed."
            )
        return choice

    # Choosing ----------------------------------------------------------------------------------

    def _choose(self, layer: Any, named: dict[str, Any], call: _Call) -> _Choice:
        """Choose what stays, from q and k of the first cross-attention layer."""
        started = time.perf_counter()
        text, vision = named["hidden_states"], named["cross_attention_states"]
        rows = len(text)
        total, rest = divmod(vision.numel(), rows * vision.shape[-1])
        per_image = int(self._inner.max_num_tiles)
        per_tile = int(self._inner.vision_model.num_patches)
        images, some = divmod(total, per_image * per_tile)
        if rest or some:
            raise PromptError(
                f"cross_attention_states {list(vision.shape)} of {rows} prompts are no whole "
                f"number of images of {per_image} tiles with {per_tile} tokens each. Pass "
                "what the vision model and the projector returned, or pixel_values."
            )
        # Rows that `generate` repeats for beams belong to one prompt, and get one choice.
        of_call = self._thread.prompts
        prompts = rows if of_call is None or rows % of_call else of_call
        repeats = rows // prompts
        seen = _seen(named, call, total)[::repeats]
        counted = seen.any(dim=1)
        if call.tiles is not None:
            tiles = call.tiles[::repeats].flatten(1).to(counted.device)
            if tiles.shape != (prompts, images * per_image):
                raise PromptError(
                    f"aspect_ratio_mask {list(call.tiles.shape)} does not fit {rows} prompts with "
                    f"{images * per_image} tiles. Pass it as the processor returned it."
                )
            counted = counted & tiles.repeat_interleave(per_tile, dim=1)
        query, key = _query_key(layer, text[::repeats], vision.reshape(rows, total, -1)[::repeats])
        seen, counted = seen.to(key.device), counted.to(key.device)
        grid = (images, per_image, per_tile)
        selections = []
        for index in range(len(query)):
            kept, scores = self._choose_row(
                layer, query[index], key[index], seen[index], counted[index]
            )
            # Images, tiles, patches of a tile: places in lists, and not in a picture.
            selections.append(Selection(kept, total, grid, scores, is_picture=False))
        choice = self._joined(selections, rows, total)
        share = sum(choice.lengths) / (total * len(choice.lengths))
        self._note(_Chosen(selections, share, time.perf_counter() - started))
        return choice

    def _choose_row(
        self, layer: Any, query: Tensor, key: Tensor, seen: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what one prompt keeps, LongTensor [K], and float32 scores [N].

        Parameters
        ----------
        layer
            The choosing one.
        query, key
            [S, H, d] and [N, G, d].
        seen
            BoolTensor [S, N]; nothing is seen from padding.
        counted
            BoolTensor [N].
        """
        everything = torch.arange(len(key), device=key.device)
        if not bool(counted.any()):
            return everything, torch.zeros(len(key), device=key.device)
        asks = seen.any(dim=1)
        scores = head_scores(
            query[asks].transpose(0, 1),
            key.transpose(0, 1),
            float(layer.cross_attn.scaling),
            seen[asks],
            self.queries,
        )
        kept, best = union_of_heads(scores, self.keep, counted)
        return (everything if keeps_all(self.keep) else kept), best

    def _joined(self, selections: list[Selection], rows: int, total: int) -> _Choice:
        """Return the selections as one tensor, each for its prompt's rows."""

        def of_rows(parts: list[Tensor]) -> Tensor:
            padded = pad_sequence(parts, batch_first=True)
            return padded.repeat_interleave(rows // len(parts), dim=0)

        kept = [one.kept for one in selections]
        real = [torch.ones_like(one, dtype=torch.bool) for one in kept]
        longest, shortest = max(map(len, kept)), min(map(len, kept))
        first = total if self.first_layer == "full" else longest
        lengths = (first, *[longest] * (len(self._layers) - 1))
        return _Choice(of_rows(kept), of_rows(real), total, shortest < total, lengths)


# What a layer is given ----------------------------------------------------------------------------


def _trim(choice: _Choice, named: dict[str, Any]) -> dict[str, Any]:
    """Return what a cross-attention layer is given in place of its arguments with all N tokens.

    Parameters
    ----------
    choice
        What was chosen.
    named
        The layer's arguments; without states where the cache has them.
    """
    vision, row = named["cross_attention_states"], named["full_text_row_masked_out_mask"]
    if vision is not None:
        vision = vision.reshape(choice.rows, choice.total, -1)
        columns = choice.kept.to(vision.device)[..., None].expand(-1, -1, vision.shape[-1])
        vision = vision.gather(1, columns)
    mask = _mask_of(named, choice.rows, choice.total)
    columns = choice.kept.to(mask.device)[:, None, None].expand(-1, 1, mask.shape[2], -1)
    real = choice.real.to(mask.device)[:, None, None]
    seen = (mask.gather(-1, columns) == 0) & real
    if row is not None:
        seen = seen & row.bool()
    sees = seen.any(dim=-1, keepdim=True)
    # transformers leaves a row that has nothing to see unmasked, and its MLP out.
    shown = torch.where(sees, seen, real)
    masked = torch.zeros_like(shown, dtype=mask.dtype)
    return {
        "cross_attention_states": vision,
        "cross_attention_mask": masked.masked_fill(~shown, torch.finfo(mask.dtype).min),
        "full_text_row_masked_out_mask": sees.to(mask.dtype),
    }


def _mask_of(named: dict[str, Any], rows: int, total: int) -> Tensor:
    """Return a layer's mask [B, 1, S, N], 0 where a row of the text sees a token.

    Where none was passed every row sees everything. It has to be said: transformers' sdpa takes a
    missing mask for a causal one, by which the third row would see three tokens.
    """
    text, mask = named["hidden_states"], named["cross_attention_mask"]
    if mask is None:
        return torch.zeros(rows, 1, text.shape[1], total, dtype=text.dtype, device=text.device)
    if len(mask) != rows or mask.shape[-1] != total:
        raise PromptError(
            f"cross_attention_mask is that of {len(mask)} prompts with {mask.shape[-1]} vision "
            f"tokens each, and there are {rows} with {total}. Pass it as the processor returned "
            "it; for further tokens repeat its last row."
        )
    return cast(Tensor, mask)


def _seen(named: dict[str, Any], call: _Call, total: int) -> Tensor:
    """Return BoolTensor [B, S, N]: which tokens a row of the text sees, and none from padding."""
    row = named["full_text_row_masked_out_mask"]
    seen = _mask_of(named, len(named["hidden_states"]), total)[:, 0] == 0
    if row is not None:
        seen = seen & row[:, 0].bool()
    if call.attended is not None:
        seen = seen & call.attended[..., None].to(seen.device)
    return seen


def _query_key(layer: Any, text: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    """Return a cross-attention layer's q [B, S, H, d] and k [B, N, G, d]."""
    attention = layer.cross_attn
    query = attention.q_proj(layer.input_layernorm(text)).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(vision).unflatten(-1, (-1, attention.head_dim))
    return attention.q_norm(query), attention.k_norm(key)


def _attended(mask: Any, text: Tensor) -> Tensor | None:
    """Return BoolTensor [B, S], which of a call's rows of text are no padding; None for all."""
    if mask is None:
        return None
    rows, length = text.shape[:2]
    matrix = isinstance(mask, Tensor) and mask.ndim == 2
    if not matrix or len(mask) != rows or mask.shape[1] < length:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PromptError(
            f"attention_mask is {given}; together with images that are to be trimmed it has one "
            f"value per token: {[rows, length]}. Pass the mask that the processor returned."
        )
    return cast(Tensor, mask)[:, -length:].bool()


# Models, options, arguments -----------------------------------------------------------------------


def _model_type(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _cross_attention_of(model: Any) -> tuple[Any, dict[int, Any]]:
    """Return the inner model, and its cross-attention layers by number, in order.

    Raises
    ------
    UnsupportedModelError
        If it is no Llama-3.2-Vision.
    """
    model_type, name = _model_type(model), type(model).__name__
    if model_type not in (None, "mllama"):
        raise UnsupportedModelError(
            f"{name} (model_type {model_type!r}) has no cross-attention to vision tokens that "
            f"method {NAME!r} could trim: it is for Llama-3.2-Vision (model_type 'mllama'). For "
            "models whose vision tokens stand in the prompt take one of tokenprune.methods()."
        )
    from transformers.models.mllama.modeling_mllama import MllamaModel

    parts = () if model_type is None else model.modules()
    inner: Any = next((part for part in parts if isinstance(part, MllamaModel)), None)
    if inner is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{name} is no vision-language model of transformers with `generate`. Pass the whole "
            "model, for example what AutoModelForImageTextToText.from_pretrained returned."
        )
    decoder = inner.language_model
    numbers = sorted(set(decoder.cross_attention_layers))
    if not numbers:
        raise UnsupportedModelError(
            f"the text_config of this {name} names no cross_attention_layers, so there is nothing "
            "to trim. Use it as it is."
        )
    return inner, {number: decoder.layers[number] for number in numbers}


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            raise OptionError(
                f"method {NAME!r} has no option {name!r}. {did_you_mean(name, _OPTIONS)}"
            )
        if value not in _OPTIONS[name]:
            raise OptionError(
                f"option {name}={value!r} of method {NAME!r} is not one of its values. "
                f"{did_you_mean(str(value), _OPTIONS[name])}"
            )


def _brings_images(arguments: dict[str, Any]) -> bool:
    return any(
        arguments.get(name) is not None for name in ("pixel_values", "cross_attention_states")
    )


def _text_of(arguments: dict[str, Any]) -> Any:
    """Return the ids [B, S] or embeddings [B, S, C] that a call reads, or None."""
    names = ("inputs", "input_ids", "inputs_embeds")
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def _refuse(kwargs: dict[str, Any], config: Any) -> None:
    """Raise for arguments of `generate` that cannot work with images, or with trimmed ones.

    Parameters
    ----------
    kwargs
        The arguments.
    config
        The model's own, for a call that brings none.
    """
    if kwargs.get("generation_config") is not None:
        config = kwargs["generation_config"]
    for name, reason in _REFUSED.items():
        if kwargs.get(name, getattr(config, name, None)) is not None:
            raise PromptError(
                f"generate({name}=...) is not supported with trimmed attention: {reason}. Leave it "
                "out, or call it outside the block."
            )


# Through `tokenprune_hf` --------------------------------------------------------------------------


def trim(
    model: Any,
    keep: Keep,
    positions: str,
    application: str,
    proportional_attention: bool,
    options: dict[str, Any],
) -> TrimmedAttention:
    """Do what ``tokenprune_hf.apply(model, "trimmed-attention", ...)`` asks for.

    Raises
    ------
    ConfigError
        If something was asked for that only tokens in a prompt have.
    BudgetError, OptionError, UnsupportedModelError, TokenPruneError
        As `TrimmedAttention`.
    """
    for name, given, plain in (
        ("positions", positions, "original"),
        ("apply", application, "drop"),
        ("proportional_attention", proportional_attention, False),
    ):
        if given != plain:
            raise ConfigError(
                f"{name}={given!r} has no meaning for method {NAME!r}: the vision tokens it trims "
                "stand beside the prompt, without positions and without a place in the attention "
                f"mask. Leave {name} out."
            )
    return TrimmedAttention(model, keep, **options)


def check_other(model: Any, method: Any) -> None:
    """Raise if a Llama-3.2-Vision is asked to take a method that prunes prompts.

    Parameters
    ----------
    model
        Any model.
    method
        A name, a `Selector` or a `PruningConfig`, as `tokenprune_hf.apply` takes it.
    """
    if _model_type(model) == "mllama" and method != NAME:
        name = method if isinstance(method, str) else type(method).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned by {name!r}: its vision tokens stand in no "
            f"prompt, the text attends to them beside it. Take method={NAME!r}, with a keep."
        )
