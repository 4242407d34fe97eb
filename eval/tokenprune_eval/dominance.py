"""How much of a model's attention goes to text and how much to visual tokens, while it answers.

`measure_dominance` gives the Modality Dominance Index and the Attention Efficiency Index of each
decoder layer. Source: "When Language Overrules" (arXiv 2508.10552). The attention of each generated
token is worked out from its q and the layer's cached k; no map of all pairs is ever built, and the
engine keeps its fused kernel.

The formulas were read in the paper's abstract and in others' accounts of it, not in code of its
authors. Left open there: which text is meant, how several generated tokens are put together, and
which two layers are the middle of an odd number. What is done here stands in the docstrings below.
"""

from __future__ import annotations

import math
import statistics
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenprune.errors import (
    ConfigError,
    PromptError,
    TokenPruneError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.families.registry import attending_layers
from tokenprune.inside.base import InsideMethod
from tokenprune.numerics import full_precision
from tokenprune_hf.attached import ThreadState, attached, named_arguments
from tokenprune_hf.engine import cache_of
from tokenprune_hf.prefix import sliding_window
from tokenprune_hf.pruning import Pruning
from tokenprune_hf.shortening import attention_mask_of
from tokenprune_hf.vision import VisionModel, vision_model

TextTokens = Literal["all", "question"]
"""Which tokens of the prompt are its text: all that are not visual, or those behind the last
visual token."""

Depth = Literal["early", "middle", "late"]
"""The parts of a decoder for which the paper reports means."""


def depth_layers(count: int) -> dict[Depth, tuple[int, ...]]:
    """Return the layers of each part of a decoder: its first two, middle two and last two.

    Parameters
    ----------
    count
        Number of decoder layers. The middle two of an odd number are the middle one and the one
        before it. A decoder of one layer has that one in every part.
    """
    middle = count // 2
    return {
        "early": tuple(range(min(2, count))),
        "middle": tuple(range(max(middle - 1, 0), min(middle + 1, count))),
        "late": tuple(range(max(count - 2, 0), count)),
    }


# Results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Indices:
    """The indices of a layer, or their means.

    Attributes
    ----------
    mdi
        Modality Dominance Index: attention per text token over attention per visual token. 1 is
        even, above 1 text dominates; infinite where no attention at all reached visual tokens.
    aei_text, aei_visual
        Attention Efficiency Index: the modality's share of the attention over its share of the
        tokens.
    """

    mdi: float
    aei_text: float
    aei_visual: float


@dataclass(frozen=True)
class LayerDominance:
    """What one prompt's generated tokens attended to at one layer.

    Attributes
    ----------
    text_attention, visual_attention
        A_T and A_O: attention to the prompt's text and visual tokens, the mean over heads, summed
        over the generated tokens. Not yet divided by their sum; what is missing to `queries` went
        to generated tokens and to text that is not counted.
    text_tokens, visual_tokens
        |T| and |O|. Visual tokens are those that the decoder read: the kept ones of a pruned
        prompt, and placeholders that always stay (newlines of LLaVA-NeXT and LLaVA-OneVision).
    queries
        How many generated tokens were counted; 0 where the answer was no longer than one token.
    """

    text_attention: float
    visual_attention: float
    text_tokens: int
    visual_tokens: int
    queries: int

    @property
    def text_share(self) -> float:
        """P_T: A_T over A_T + A_O; NaN where nothing was counted."""
        total = self.text_attention + self.visual_attention
        return self.text_attention / total if total > 0 else math.nan

    @property
    def indices(self) -> Indices:
        """The layer's indices; NaN where nothing was counted."""
        share = self.text_share
        text = self.text_tokens / (self.text_tokens + self.visual_tokens)
        aei_text, aei_visual = share / text, (1 - share) / (1 - text)
        # The efficiencies' quotient is MDI: (P_T / |T|) / (P_O / |O|).
        mdi = math.inf if aei_visual == 0 else aei_text / aei_visual
        return Indices(mdi, aei_text, aei_visual)


@dataclass(frozen=True)
class PromptDominance:
    """One prompt's layers.

    Attributes
    ----------
    layers
        Layer, from 0 -> what was measured there.
    depth
        How many layers the decoder has.
    """

    layers: Mapping[int, LayerDominance]
    depth: int

    @property
    def queries(self) -> int:
        """How many generated tokens were counted."""
        return next(iter(self.layers.values())).queries

    def mean(self, part: Depth) -> Indices:
        """Return the mean indices of the early, middle or late layers.

        Raises
        ------
        ConfigError
            If they were not all measured.
        """
        wanted = _layers_of(part, self.depth, self.layers)
        return _mean(self.layers[layer].indices for layer in wanted)


@dataclass(frozen=True)
class DominanceResult:
    """What was measured on all prompts.

    Attributes
    ----------
    prompts
        One for each prompt, in the order in which they were read; those of a batch by row.
    text
        Which text was counted.
    depth
        How many layers the decoder has.
    """

    prompts: tuple[PromptDominance, ...]
    text: TextTokens
    depth: int

    @property
    def measured(self) -> int:
        """How many prompts have a generated token that was counted; the means are over these."""
        return sum(prompt.queries > 0 for prompt in self.prompts)

    @property
    def layers(self) -> dict[int, Indices]:
        """Layer -> mean indices over the measured prompts, each prompt counting alike."""
        counted = [prompt for prompt in self.prompts if prompt.queries]
        return {
            layer: _mean(prompt.layers[layer].indices for prompt in counted)
            for layer in self.prompts[0].layers
        }

    def mean(self, part: Depth) -> Indices:
        """Return the mean indices of the early, middle or late layers over the measured prompts.

        Raises
        ------
        ConfigError
            If they were not all measured.
        """
        layers = self.layers
        return _mean(layers[layer] for layer in _layers_of(part, self.depth, layers))


def _layers_of(part: Depth, depth: int, measured: Mapping[int, Any]) -> tuple[int, ...]:
    parts = depth_layers(depth)
    if part not in parts:
        raise ConfigError(f"{part!r} is no part of a decoder. {did_you_mean(part, parts)}")
    wanted = parts[part]
    if missing := [layer for layer in wanted if layer not in measured]:
        raise ConfigError(
            f"the {part} layers are {list(wanted)} and {missing} were not measured. Pass "
            f"layers={list(wanted)}, or leave layers out to measure all {depth}."
        )
    return wanted


def _mean(several: Iterable[Indices]) -> Indices:
    rows = list(several)
    return Indices(
        statistics.fmean(row.mdi for row in rows),
        statistics.fmean(row.aei_text for row in rows),
        statistics.fmean(row.aei_visual for row in rows),
    )


# Measuring --------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    """A batch of B prompts of S columns and what has been summed up for it.

    Attributes
    ----------
    text, visual
        BoolTensor [B, S], the columns that count.
    done
        BoolTensor [B], rows whose answer has ended.
    queries
        LongTensor [B].
    sums
        Layer -> float32 [2, B], A_T and A_O.
    """

    text: Tensor
    visual: Tensor
    done: Tensor
    queries: Tensor
    sums: dict[int, Tensor]


@dataclass(frozen=True)
class _Step:
    """One run of the decoder: a prompt, or the next token of each of its rows.

    Attributes
    ----------
    batch
        Whose.
    is_prompt
        Whether it is the prompt itself.
    visible
        BoolTensor [B, K], the keys that the new token may see, or None for all.
    """

    batch: _Batch
    is_prompt: bool
    visible: Tensor | None = None


class _Thread(ThreadState):
    """The run of the decoder in a thread, or None."""

    step: _Step | None = None


class Dominance:
    """Watches a model's decoder inside a ``with`` block; made by `measure_dominance`."""

    def __init__(
        self, model: Any, layers: Sequence[int] | None = None, text: TextTokens = "all"
    ) -> None:
        if text not in get_args(TextTokens):
            raise ConfigError(
                f"text={text!r} is no text of a prompt. {did_you_mean(text, get_args(TextTokens))}"
            )
        self._vision = vision_model(model)
        self._text: TextTokens = text
        self._attention, self._depth = _attention_modules(self._vision, layers)
        self._batches: list[_Batch] = []
        self._caches: weakref.WeakKeyDictionary[Any, _Batch] = weakref.WeakKeyDictionary()
        self._thread = _Thread()
        self._hooks: ExitStack | None = None

    def __enter__(self) -> Dominance:
        """Attach to the model.

        Raises
        ------
        TokenPruneError
            If it is attached already.
        """
        if self._hooks is not None:
            raise TokenPruneError(
                "this measurement is running already. Make another with measure_dominance(model)."
            )
        inner = self._vision.inner
        with ExitStack() as hooks:
            # On the inner model, behind whatever pruning does to a call of the outer one, and in
            # front of what it does there: SmolVLM's gets embeddings and no ids.
            begin = inner.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
            hooks.callback(begin.remove)
            hooks.callback(inner.register_forward_hook(self._end, always_call=True).remove)
            for layer, attention in self._attention.items():
                watch = attention.register_forward_hook(self._watcher(layer), with_kwargs=True)
                hooks.callback(watch.remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take everything off the model again, also after an exception; the sums stay."""
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = None
        self._caches.clear()

    @property
    def result(self) -> DominanceResult:
        """All that was measured until now.

        Raises
        ------
        PromptError
            If no generated token was counted.
        """
        prompts = [prompt for batch in self._batches for prompt in self._prompts(batch)]
        if not any(prompt.queries for prompt in prompts):
            raise PromptError(
                f"{len(prompts)} prompts were read and no generated token attended to them. The "
                "first token of an answer comes from the prompt's own last position and counts "
                "only when it is fed back: generate at least 2 tokens inside the block."
            )
        return DominanceResult(tuple(prompts), self._text, self._depth)

    def _prompts(self, batch: _Batch) -> list[PromptDominance]:
        sums = {layer: values.tolist() for layer, values in batch.sums.items()}
        counts = [batch.text.sum(dim=1), batch.visual.sum(dim=1), batch.queries]
        return [
            PromptDominance(
                {
                    layer: LayerDominance(text[row], visual[row], *numbers)
                    for layer, (text, visual) in sums.items()
                },
                self._depth,
            )
            for row, numbers in enumerate(torch.stack(counts, dim=1).tolist())
        ]

    # Hooks -------------------------------------------------------------------------------------

    def _begin(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the inner model runs: see whose tokens it is given."""
        self._thread.step = None
        if inner is not self._vision.inner:
            return  # a copy of the model is not measured
        running = attached(self._vision.model)
        if isinstance(running, Pruning) and isinstance(running.selector, InsideMethod):
            raise PromptError(
                f"with method {running.selector.name!r} tokens leave inside the language model, so "
                "that its layers do not read one prompt, and their modality dominance cannot be "
                "compared. Measure it with a method that prunes before the language model."
            )
        named = named_arguments(inner, args, kwargs)
        ids: Tensor | None = named.get("input_ids")
        if ids is None:
            raise PromptError(
                "visual tokens are found by their id: pass input_ids, and no inputs_embeds, while "
                "modality dominance is measured."
            )
        cache: Any = cache_of(named)
        mask = named.get("attention_mask")
        if cache is None or cache.get_seq_length() == 0:
            self._thread.step = _Step(self._new_batch(ids, mask), is_prompt=True)
            return
        batch = self._caches.get(cache)
        if batch is None:
            raise PromptError(
                "this cache was filled outside the block in which modality dominance is measured, "
                "so its visual tokens are not known. Let the block begin before the prompt is read."
            )
        keys = cache.get_seq_length() + 1
        if ids.shape != (len(batch.done), 1):
            raise PromptError(
                f"input_ids {list(ids.shape)} came with a filled cache, where one generated token "
                f"for each of {len(batch.done)} prompts is counted. Measure the next turn of a "
                "conversation as a prompt of its own, without chunks and without a draft model."
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(ids), keys)):
            raise _mask_error(mask, [len(ids), keys])
        ends = _end_ids(self._vision.model).to(ids.device)
        batch.done = batch.done | torch.isin(ids[:, 0], ends)
        batch.queries = batch.queries + (~batch.done).long()
        visible = None if mask is None else mask.bool()
        self._thread.step = _Step(batch, is_prompt=False, visible=visible)

    def _end(self, *_: Any) -> None:
        # What runs the layers between two steps (a method reading the question) is not an answer.
        self._thread.step = None

    def _new_batch(self, ids: Tensor, mask: Any) -> _Batch:
        """Find text and visual tokens in prompts [B, S] as the decoder reads them."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise _mask_error(mask, list(ids.shape))
        given = {"input_ids": ids, "attention_mask": mask}
        valid = attention_mask_of(self._vision, given).bool()
        visual = torch.zeros_like(valid)
        for modality in ("image", "video"):
            visual |= valid & (ids == self._vision.token_id(modality))
        text = valid & ~visual
        if self._text == "question":
            seen_from_the_end = visual.long().flip(-1).cumsum(dim=-1).flip(-1)
            text &= seen_from_the_end == 0
        for tokens, name in ((visual, "visual token"), (text, f"text (text={self._text!r})")):
            if empty := (~tokens.any(dim=1)).nonzero()[:, 0].tolist():
                raise PromptError(
                    f"prompts {empty} of a batch of {len(ids)} hold no {name}, so their modality "
                    "dominance is not defined. Run them outside the block."
                )
        zeros = torch.zeros(2, len(ids), device=ids.device)
        batch = _Batch(
            text=text,
            visual=visual,
            done=torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
            queries=torch.zeros(len(ids), dtype=torch.long, device=ids.device),
            sums=dict.fromkeys(self._attention, zeros),
        )
        self._batches.append(batch)
        return batch

    def _watcher(self, layer: int) -> Any:
        """Return the hook behind one layer's attention."""

        def watch(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            step = self._thread.step
            if step is None or attention is not self._attention[layer]:
                return  # a copy of the model is not measured
            named = named_arguments(attention, args, kwargs)
            cache: Any = cache_of(named)
            if cache is None:
                raise PromptError(
                    "modality dominance is read from the key-value cache, and this call has none. "
                    "Leave out use_cache=False inside the block."
                )
            if step.is_prompt:
                self._caches[cache] = step.batch
                return
            with torch.no_grad():
                received = _attention_of_newest(attention, named, cache, step.visible)
                batch, device = step.batch, received.device
                own = torch.stack([batch.text, batch.visual]).to(device)
                sums = (received[:, : own.shape[-1]] * own).sum(dim=-1)
                sums = sums.masked_fill(batch.done.to(device), 0.0)
                batch.sums[layer] = batch.sums[layer].to(device) + sums

        return watch


def _attention_of_newest(
    attention: Any, named: Mapping[str, Any], cache: Any, visible: Tensor | None
) -> Tensor:
    """Return the attention of each row's newest token to all K keys, float32 [B, K].

    Parameters
    ----------
    attention
        The module, which has just run on one token of each of B rows.
    named
        What it was called with, by name.
    cache
        Its keys after that.
    visible
        BoolTensor [B, K], or None for all.

    Raises
    ------
    UnsupportedModelError
        If the cache does not keep all keys as they are.
    """
    stored = cache.layers[attention.layer_idx].keys
    length = int(cache.get_seq_length(attention.layer_idx))
    if not isinstance(stored, Tensor) or stored.shape[-2] != length:
        raise UnsupportedModelError(
            f"a {type(cache).__name__} does not keep the {length} keys of layer "
            f"{attention.layer_idx} as they are, so modality dominance cannot be read from it. "
            "Leave out cache_implementation and the cache, or pass a DynamicCache."
        )
    states: Tensor = named["hidden_states"][:, -1]  # [B, D]
    cos, sin = (part[:, -1][None] for part in named["position_embeddings"])  # [1, B, d]
    # Each row has one token, so that the rows can stand where a prompt's tokens stand there.
    query = _queries(attention, states)
    cos, sin = _rotary_of(attention, cos, sin)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query = rotate(query, query, cos, sin)[0][0].float()  # [H, B, d]
    key = stored.to(query.device).float()  # [B, G, K, d]
    with full_precision(query.device):
        # Heads side by side for each key head, so that keys need not be repeated.
        grouped = query.unflatten(0, (key.shape[1], -1))
        logits = torch.einsum("ghbd,bgkd->bghk", grouped, key) * float(attention.scaling)
    if visible is not None:
        hidden = ~visible.to(logits.device)[:, None, None]
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _attention_modules(
    vision: VisionModel, layers: Sequence[int] | None
) -> tuple[dict[int, Any], int]:
    """Return the attention modules of the layers asked for, and how many layers there are.

    Raises
    ------
    ConfigError
        If there is no such layer.
    UnsupportedModelError
        If a layer's attention cannot be read.
    """
    name = type(vision.model).__name__
    try:
        decoder = list(vision.language_model().layers)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"modality dominance cannot be measured on {name}, because the decoders of its family "
            f"are not read. Measure a model whose layers all have full attention. The family's own "
            f"reason: {error}"
        ) from error
    depth = len(decoder)
    attending = attending_layers(vision.model.config.get_text_config())
    wanted = attending if layers is None else list(layers)
    allowed = all(type(one) is int and 0 <= one < depth for one in wanted)
    if not wanted or not allowed:
        raise ConfigError(
            f"layers={layers!r} are no layers of {name}'s decoder, which has {depth}: name some of "
            f"0 to {depth - 1}, or leave layers out for all."
        )
    found = {}
    for number in sorted(set(wanted)):
        attention: Any = getattr(decoder[number], "self_attn", None)
        if not all(hasattr(attention, part) for part in ("q_proj", "head_dim", "layer_idx")):
            raise UnsupportedModelError(
                f"layer {number} of {name}'s decoder has no q_proj to read the attention of "
                "generated tokens from. Pass layers=... with layers that have one, or measure "
                "another model."
            )
        if (window := sliding_window(attention)) is not None:
            raise UnsupportedModelError(
                f"layer {number} of {name}'s decoder sees the last {window} tokens only, so its "
                "attention to the whole prompt is not defined. Pass layers=... with layers of full "
                "attention, or measure another model."
            )
        found[number] = attention
    return found, depth


def _end_ids(model: Any) -> Tensor:
    """Return the ids that are fed to rows whose answer has ended: end of sequence and padding."""
    config = model.generation_config
    ids: set[int] = set()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(ids), dtype=torch.long)


def _mask_error(mask: Any, wanted: list[int]) -> PromptError:
    given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return PromptError(
        f"attention_mask is {given}; while modality dominance is measured it has one value per "
        f"token: {wanted}. Pass the mask that the processor returned, and no static cache."
    )


def measure_dominance(
    model: Any, layers: Sequence[int] | None = None, text: TextTokens = "all"
) -> Dominance:
    """Measure, inside a ``with`` block, how text and visual tokens share a model's attention.

    ::

        with measure_dominance(model) as dominance:
            model.generate(**inputs, max_new_tokens=32)
        dominance.result.mean("late").mdi

    For each prompt and layer, the attention that every generated token's query gives to the
    prompt's text (A_T) and visual tokens (A_O) is averaged over heads and summed over the generated
    tokens; attention to earlier generated tokens and to padding is left out by dividing by
    A_T + A_O. Then MDI = (A_T / |T|) / (A_O / |O|), and AEI is a modality's share of the attention
    over its share of the tokens.

    A generated token has a query when it is fed back, so the last one of an answer has none, and
    the prompt's last position, which yields the first one, does not count. Nor does the
    end-of-sequence token, nor what is fed behind it while other rows of a batch go on; both are
    known from ``model.generation_config``. Every token that a forward call feeds to a filled cache
    counts as generated. In a beam search every beam is a prompt, and tokens of beams that were
    given up count.

    Inside `tokenprune_hf.prune` (either block may be the outer one) the prompt is the short one
    that the decoder reads.

    Parameters
    ----------
    model
        A vision-language model of transformers of a family in `tokenprune_hf.supported_models()`.
    layers
        Which decoder layers, from 0; None for all that attend to tokens. See `depth_layers`.
    text
        ``"all"``: every token of the prompt that is neither visual nor padding is text.
        ``"question"``: only those behind the last visual token are, the end of the chat template
        included; the text before counts nowhere.

    Returns
    -------
    Dominance
        A context manager with `result`.

    Raises
    ------
    ConfigError
        If `text` or `layers` has a value it cannot take.
    UnsupportedModelError
        If the model is of no known family, or its decoder's attention cannot be read. Inside the
        block, for a cache that does not keep all keys.
    PromptError
        Inside the block, for a prompt without visual tokens or text, for calls without input_ids
        or without a cache, for more than one token at once on a filled cache, and where tokens
        leave inside the language model.
    """
    return Dominance(model, layers, text)


def _queries(attention: Any, states: Tensor) -> Tensor:
    """Project [L, D] to q [1, heads, L, d], with the norm that some models have."""
    # Qwen3.5 projects to q and to a gate on the head's output, head by head, q first.
    split = attention.q_proj(states[None]).unflatten(-1, (attention.config.num_attention_heads, -1))
    split = split[..., : int(attention.head_dim)]
    # LFM2 calls it q_layernorm.
    norm = getattr(attention, "q_norm", getattr(attention, "q_layernorm", None))
    heads: Tensor = (split if norm is None else norm(split)).transpose(1, 2)
    return heads


def _rotary_of(attention: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors by which an attention module turns q and k; some turn nothing."""
    if attention.config.model_type == "cohere2":  # in sliding layers alone
        rotates = sliding_window(attention) is not None
    else:  # Llama 4 and SmolLM3 say of each layer whether it does
        rotates = bool(getattr(attention, "use_rope", True))
    return (cos, sin) if rotates else (torch.ones_like(cos), torch.zeros_like(sin))
