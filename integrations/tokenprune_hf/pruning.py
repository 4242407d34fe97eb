"""`prune`, `apply`, `remove`: a model of transformers whose `generate` and calls run pruned.

A call with pixels goes this way: encode, select, shorten the prompt, run the model's own forward
on the short prompt and the kept rows. Two things are attached to the model and taken off again: a
forward pre-hook, and a `generate` in front of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from tokenprune.budget import Keep, check_keep
from tokenprune.config import Positions, PruningConfig, check_positions
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    PromptError,
    TokenPruneError,
    did_you_mean,
)
from tokenprune.representation import tokens_represented
from tokenprune.selecting import check_known, select_many
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.tokens import VisualTokens
from tokenprune_hf.attached import Attachment, attached, named_arguments
from tokenprune_hf.encoding import Encoded, encode_media
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.families.base import ENCODED
from tokenprune_hf.families.registry import check_method, family_of
from tokenprune_hf.proportional import ProportionalAttention
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.shortened import Application, Shortened, find_placeholders, shorten_prompt
from tokenprune_hf.trimmed import NAME, TrimmedAttention, check_other, trim

_REFUSED = {
    "assistant_model": "a draft model would read the unpruned prompt",
    "custom_generate": "its own loop would bypass the pruned prompt",
    "prefill_chunk_size": "chunks would cut images apart from their placeholders",
    "negative_prompt_ids": "the second prompt would need a pruning of its own",
}


class Pruning(Attachment):
    """A pruned model: made by `prune` or `apply`, undone by leaving the block or by `remove`.

    Attributes
    ----------
    model, selector, keep, positions, application, proportional_attention
        What was asked for.
    selections
        One `Selection` per item (image, video or crop) of the last call, in prompt order.
    selecting_seconds
        How long scoring and choosing them took; the encoder is not in it. On a GPU it is the time
        of handing over the work, unless the method itself waits for its scores.
    """

    def __init__(
        self,
        model: Any,
        selector: Selector,
        keep: Keep,
        positions: Positions,
        application: Application,
        proportional_attention: bool = False,
    ) -> None:
        super().__init__(model)
        self.selector = selector
        self.keep = check_keep(keep)
        self.positions = check_positions(positions)
        self.application = _check_application(application)
        if not isinstance(proportional_attention, bool):
            raise ConfigError(
                f"proportional_attention={proportional_attention!r} must be True or False."
            )
        self.proportional_attention = proportional_attention
        self.selections: list[Selection] = []
        self.selecting_seconds = 0.0
        self._family = family_of(model)
        check_method(selector, model)
        self._caches: weakref.WeakKeyDictionary[Any, Shortened] = weakref.WeakKeyDictionary()
        self._in_generate = False
        self._generating: Shortened | None = None
        self._proportional: ProportionalAttention | None = None
        self.begin()

    # Attaching and taking off ------------------------------------------------------------------

    def _attach(self) -> None:
        if self.proportional_attention:
            self._proportional = ProportionalAttention(self.model)  # first: it may refuse
        plain = self.model.generate

        @functools.wraps(plain)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            return self._generate(plain, inputs, args, kwargs)

        self.model.__dict__["generate"] = generate
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
            *self._family.hooks(),
        ]
        self._rope_deltas = getattr(self._family.inner, "rope_deltas", None)

    def _detach(self) -> None:
        del self.model.__dict__["generate"]
        for hook in self._hooks:
            hook.remove()
        if self._proportional is not None:
            self._proportional.remove()
        if self._family.mrope:
            self._family.inner.rope_deltas = self._rope_deltas
        self._caches.clear()

    # Forward calls -----------------------------------------------------------------------------

    def _before_forward(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the model's forward: shorten a call with pixels, mend one with our cache."""
        if self._in_generate:
            return self._before_step(args, kwargs)
        named = named_arguments(self.model, args, kwargs)
        cache: Any = cache_of(named)
        shortened = self._shorten(named)
        if shortened is not None:
            if named.get("use_cache") is not False:
                from transformers import DynamicCache

                # Made here, so that this prompt is known again when its cache comes back.
                if cache is None:
                    cache = DynamicCache(config=self.model.config.get_text_config())
                    named.update(cache_argument(self.model, cache))
                self._caches[cache] = shortened
            self._count_keys(shortened)
            return (), shortened.call(named, self._family.encoder_arguments())
        if (known := self._known(cache)) is not None:
            self._count_keys(known)
            return (), known.continued_call(named, cache.get_seq_length(), self.positions)
        return None

    def _after_forward(self, _module: Any, _args: Any, _output: Any) -> None:
        """Run when the model's forward is over, also after an exception."""
        self._count_keys(None)

    def _count_keys(self, shortened: Shortened | None) -> None:
        """Have attention count the keys of a prompt until the call is over."""
        if self._proportional is not None:
            if shortened is not None:
                self._proportional.check_call()
            self._proportional.logs = None if shortened is None else shortened.logs

    def _before_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before each step of `generate`: hand the kept rows to those that read the prompt."""
        shortened, input_ids = self._generating, kwargs.get("input_ids")
        cache: Any = cache_of(kwargs)
        self._count_keys(self._known(cache) if shortened is None else shortened)
        if shortened is None or input_ids is None:
            return None
        length = shortened.prompt.length
        if shortened.is_prompt_of(input_ids):
            kwargs["mm_encoder_outputs"] = shortened.encoder_outputs(len(input_ids))
            if kwargs.get("attention_mask") is None and cache is None:
                # Without mask and cache, transformers takes gaps in positions for packed prompts.
                kwargs["attention_mask"] = torch.ones_like(input_ids)
            since, new = 0, input_ids.shape[1] - length
        else:
            since, new = cache.get_seq_length() - length, input_ids.shape[1]
        if new and shortened.ends_with_dropped:
            # The engine counts on from the last token it sees, which is not the prompt's last.
            after = shortened.positions_after(since, new, len(input_ids))
            before = kwargs["position_ids"].expand(*after.shape[:-1], -1)[..., :-new]
            kwargs["position_ids"] = torch.cat([before, after], dim=-1)
        return args, kwargs

    # generate ----------------------------------------------------------------------------------

    def _generate(
        self, plain: Callable[..., Any], inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in front of the model's own `generate`."""
        if args:
            names = list(inspect.signature(plain).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if inputs is not None:
            kwargs["input_ids"] = inputs
        with torch.no_grad():
            shortened = self._shorten(kwargs)
        known = self._known(cache_of(kwargs))
        if shortened is not None:
            _refuse(kwargs)
            call = shortened.call(kwargs, self._family.encoder_arguments())
            del call["mm_encoder_outputs"]  # every step is handed them by the hook, beams and all
        elif known is not None:
            call = known.continued_prompt(kwargs)
        else:
            return self._run(plain, kwargs, None)

        input_ids: Tensor = kwargs["input_ids"]
        short_length = call["input_ids"].shape[1]
        self._shift_lengths(call, input_ids.shape[1] - short_length)
        if call.get("streamer") is not None:
            call["streamer"] = _FullPromptStreamer(call["streamer"], input_ids)
        output = self._run(plain, call, shortened)
        sequences = output if isinstance(output, Tensor) else output.sequences
        repeats = len(sequences) // len(input_ids)
        prompts = input_ids.to(sequences.device).repeat_interleave(repeats, dim=0)
        full = torch.cat([prompts, sequences[:, short_length:]], dim=1)
        if isinstance(output, Tensor):
            return full
        output.sequences = full
        cache = cache_of(output)
        if cache is not None and repeats == 1 and shortened is not None:
            self._caches[cache] = shortened
        return output

    def _run(
        self, plain: Callable[..., Any], kwargs: dict[str, Any], shortened: Shortened | None
    ) -> Any:
        self._generating, self._in_generate = shortened, True
        try:
            return plain(**kwargs)
        finally:
            self._generating, self._in_generate = None, False

    def _shift_lengths(self, kwargs: dict[str, Any], removed: int) -> None:
        """Let `max_length` and `min_length` count the caller's prompt and not the short one."""
        given = kwargs.get("generation_config")
        defaults = self.model.generation_config if given is None else given
        for name, by_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if kwargs.get(by_new) is not None or getattr(defaults, by_new, None) is not None:
                continue
            length = kwargs.get(name, getattr(defaults, name, None))
            if not length:
                continue
            if given is None or name in kwargs:
                kwargs[name] = max(length - removed, 0)
            else:
                # transformers takes a config or arguments, not both; the caller's stays.
                kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
                setattr(kwargs["generation_config"], name, max(length - removed, 0))

    # Shortening --------------------------------------------------------------------------------

    def _known(self, cache: Any) -> Shortened | None:
        """Return the pruned prompt that filled a cache, or None."""
        shortened = None if cache is None else self._caches.get(cache)
        if shortened is None or cache.get_seq_length() < shortened.prompt.length:
            return None  # never ours, or emptied since
        return shortened

    def _shorten(self, arguments: dict[str, Any]) -> Shortened | None:
        """Encode, select and shorten a call's prompt; None where it has no image and no video."""
        encoded: Encoded | None = arguments.pop("encoded", None)
        known: Sequence[Selection | None] | None = arguments.pop("known", None)
        if arguments.get("mm_encoder_outputs"):
            raise PromptError(
                "mm_encoder_outputs cannot be pruned: they no longer hold what selectors look at. "
                "Pass the processor's pixel values, or encoded=tokenprune_hf.encode(...)."
            )
        if encoded is None and not self._family.media(arguments):
            self._check_no_placeholders(arguments)
            self.selections = []
            return None
        cache = cache_of(arguments)
        if cache is not None and cache.get_seq_length() > 0:
            raise PromptError(
                "images or videos cannot be added to a cache that is already filled. Leave out "
                "the pixel values if the cache holds them, or call without a cache."
            )
        if arguments.get("input_ids") is None or arguments.get("inputs_embeds") is not None:
            raise PromptError(
                "pruning finds visual tokens by their id: pass input_ids, and no inputs_embeds, "
                "together with images or videos."
            )
        if encoded is None:
            encoded = encode_media(self._family, arguments, self.selector.needs)
        from_encoder = [name for name in self.selector.needs if name in ENCODED]
        missing = [name for name in from_encoder if name not in encoded.needs]
        if missing:
            raise PromptError(
                f"encoded was made without {', '.join(missing)}, which method "
                f"{self.selector.name!r} needs. Encode again with needs including them."
            )
        with torch.no_grad():
            placeholders = find_placeholders(self._family, arguments["input_ids"], encoded)
            started = time.perf_counter()
            items = prompt_items(self._family, arguments, encoded, self.selector.needs)
            selections = self._select(encoded, items, placeholders, known)
            self.selecting_seconds = time.perf_counter() - started
            shortened = shorten_prompt(
                self._family,
                arguments,
                encoded,
                placeholders,
                selections,
                self.positions,
                self.application,
            )
            if self._family.mrope:
                # With it the engine counts on, in calls that come without positions.
                spoken = shortened.arguments["attention_mask"].sum(dim=-1)
                self._family.inner.rope_deltas = (shortened.following[-1] - spoken)[:, None]
        return shortened

    def _check_no_placeholders(self, arguments: dict[str, Any]) -> None:
        """Raise if the prompt asks for images that were not passed."""
        input_ids = arguments.get("input_ids")
        cache = cache_of(arguments)
        if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
            return
        for modality in ("image", "video"):
            count = int((input_ids == self._family.token_id(modality)).sum())
            if count:
                raise PromptError(
                    f"the prompt holds {count} {modality} placeholders and no {modality} was "
                    "passed. Pass the processor's pixel values along with its input_ids."
                )

    def _select(
        self,
        encoded: Encoded,
        items: dict[str, list[VisualTokens]],
        placeholders: dict[str, Tensor],
        known: Sequence[Selection | None] | None,
    ) -> dict[str, list[Selection]]:
        """Choose the tokens of every item; `self.selections` gets them in prompt order."""
        places = {
            (modality, index): placeholders[modality][int(item.rows[0])].tolist()
            for modality, media in encoded.modalities.items()
            for index, item in enumerate(media.items)
        }
        in_prompt = sorted(places, key=places.__getitem__)
        earlier = [None] * len(in_prompt) if known is None else list(known)
        check_known(earlier, [items[modality][index].total for modality, index in in_prompt])
        of_item = dict(zip(in_prompt, earlier, strict=True))
        result = {
            modality: select_many(
                own,
                self.selector,
                self.keep,
                known=[of_item[modality, index] for index in range(len(own))],
            )
            for modality, own in items.items()
        }
        if self.proportional_attention:
            result = {
                modality: _represent(encoded, modality, own) for modality, own in result.items()
            }
        self.selections = [result[modality][index] for modality, index in in_prompt]
        return result


def _check_application(application: Application) -> Application:
    if application not in get_args(Application):
        raise ConfigError(
            f"apply={application!r} is not a way to apply a selection. "
            f"{did_you_mean(str(application), get_args(Application))}"
        )
    return application


def _represent(encoded: Encoded, modality: str, selections: list[Selection]) -> list[Selection]:
    """Return the selections of a modality's items, saying how many tokens each kept one is for."""
    media = encoded.modalities[modality]
    result = []
    for item, one in zip(media.items, selections, strict=True):
        if one.represented is None:
            counts = tokens_represented(media.rows[item.rows][None], one.kept[None])
            one = dataclasses.replace(one, represented=counts[0])
        result.append(one)
    return result


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that cannot work on a pruned prompt."""
    for name, reason in _REFUSED.items():
        value = kwargs.get(name)
        if value is None and kwargs.get("generation_config") is not None:
            value = getattr(kwargs["generation_config"], name, None)
        if value is not None:
            raise PromptError(
                f"generate({name}=...) is not supported with pruned images: {reason}. Leave it "
                "out, or call it without pruning."
            )


class _FullPromptStreamer:
    """Passes a streamer the caller's prompt in place of the short one, then every new token."""

    def __init__(self, streamer: Any, input_ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = input_ids

    def put(self, value: Tensor) -> None:
        """Pass on what was generated; the first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        self._streamer.end()


@overload
def apply(
    model: Any, method: Literal["trimmed-attention"], keep: Keep | None = None, **options: Any
) -> TrimmedAttention: ...


@overload
def apply(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning: ...


def apply(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning | TrimmedAttention:
    """Make a model's `generate` and calls run pruned until `remove`.

    Parameters
    ----------
    model
        A vision-language model of transformers of a family in `tokenprune_hf.supported_models()`,
        or a Llama-3.2-Vision for `method="trimmed-attention"`.
    method
        A name out of `tokenprune.methods()`, a `tokenprune.Selector` of your own, or a
        `tokenprune.PruningConfig`, which says everything else too. ``"trimmed-attention"`` is for
        Llama-3.2-Vision alone, whose text attends to vision tokens beside the prompt; `keep` is
        what each head keeps then, `positions` and `apply` do not apply, and the options are
        `queries` and `first_layer` (`tokenprune_hf.trimmed.TrimmedAttention`).
    keep
        Budget of each image, video or crop: an int of tokens or a fraction.
    positions
        ``"original"``: kept tokens, and the text after them, have the positions of the full
        prompt. ``"compact"``: the short prompt is numbered without gaps, as the published code of
        FasterVLM and ZOO-Prune does (on models with M-RoPE all three axes count alike then).
    apply
        ``"drop"``: tokens that were not selected leave the prompt, which is what makes the model
        cheap. ``"mask"``: they stay and the attention mask hides them, for calls that need the
        prompt's full length, and for comparing. The logits of all other tokens are those of
        ``"drop"``, except where layers have a sliding window: a shorter prompt brings more of it
        into the window.
    proportional_attention
        Whether attention counts each kept token as many times as there are tokens it stands for
        (`tokenprune.tokens_represented`; `Selection.represented` has the numbers): a large even
        area then weighs what it did in the full prompt. It costs no tokens and, with methods whose
        tokens cover the image, keeps more accuracy (docs/selectors.md). Token Merging's, arXiv
        2210.09461. vLLM's kernels cannot do it, so the answers of the two engines differ with it.
    **options
        The method's own options.

    Returns
    -------
    Pruning or TrimmedAttention
        With `selections` of the last call and `remove`.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, ConfigError
        For a wrong method, option, budget or way to count positions.
    UnsupportedModelError
        If the model, or the method on this model, is not supported.
    TokenPruneError
        If the model is pruned already.
    """
    check_other(model, method)
    if isinstance(method, PruningConfig):
        if keep is not None or options or positions != "original":
            raise TokenPruneError(
                "keep, positions or options came with a PruningConfig, which has them already. "
                "Change them there, with dataclasses.replace."
            )
        return Pruning(
            model,
            method.selector(),
            method.keep,
            method.positions,
            apply,
            proportional_attention,
        )
    if keep is None:
        raise BudgetError(
            "keep is missing. Give a number of tokens (keep=64) or a fraction of them (keep=0.1)."
        )
    if method == NAME:
        return trim(model, keep, positions, apply, proportional_attention, options)
    if isinstance(method, Selector):
        if options:
            raise TokenPruneError(
                f"options {sorted(options)} came with a {type(method).__name__} object, which has "
                "its options already. Set them there."
            )
        return Pruning(model, method, keep, positions, apply, proportional_attention)
    config = PruningConfig(method, keep, positions, options)
    return Pruning(
        model, config.selector(), config.keep, config.positions, apply, proportional_attention
    )


_begin = apply  # where `apply` is a parameter's name


@overload
def prune(
    model: Any, method: Literal["trimmed-attention"], keep: Keep | None = None, **options: Any
) -> TrimmedAttention: ...


@overload
def prune(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning: ...


def prune(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning | TrimmedAttention:
    """Prune a model inside a ``with`` block; parameters, result and errors as `apply`.

    After the block the model is exactly as it was, also after an exception.
    """
    return _begin(
        model,
        method,
        keep,
        positions,
        apply=apply,
        proportional_attention=proportional_attention,
        **options,
    )


def remove(model: Any) -> None:
    """Undo `apply`; a model that is not pruned stays as it is."""
    running = attached(model)
    if running is not None:
        running.remove()
