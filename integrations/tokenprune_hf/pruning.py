"""`prune`, `apply`, `remove`: a model of transformers whose `generate` and calls run pruned.

A call with pixels goes this way: encode, select, shorten the prompt, run the model's own forward
on the short prompt and the kept rows. What is attached to the model and taken off again stands in
front of its own `generate` and `forward`. What belongs to one call is kept by thread, and what is
known of a prompt in its cache.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from tokenprune.budget import Budget, Keep
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
from tokenprune_hf.attached import (
    Attachment,
    StandIn,
    ThreadState,
    attached,
    named_arguments,
    named_call,
)
from tokenprune_hf.caches import Filling, Held, Holding, cache_length
from tokenprune_hf.encoding import Encoded, encode_media
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.mllama.method import METHOD as TRIMMED
from tokenprune_hf.mllama.model import check_prompt_has_images
from tokenprune_hf.proportional import ProportionalAttention
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.shortened import Application, Shortened
from tokenprune_hf.shortening import find_placeholders, shorten_prompt
from tokenprune_hf.vision import ENCODED, VisionModel, check_method, vision_model

_REFUSED = {
    "assistant_model": "a draft model would read the unpruned prompt",
    "custom_generate": "its own loop would bypass the pruned prompt",
    "prefill_chunk_size": "chunks would cut images apart from their placeholders",
    "negative_prompt_ids": "the second prompt would need a pruning of its own",
}


@dataclass(frozen=True)
class _Chosen:
    """What was chosen in one call, and how long that took in seconds."""

    selections: list[Selection]
    seconds: float


class _Call(ThreadState):
    """The call of the model that is running in a thread.

    Attributes
    ----------
    depth
        How many calls of the model are running inside each other.
    generating
        Whether `generate` is, whose steps are prepared already.
    prompt
        The pruned prompt that the steps of `generate` read; None where it has no images.
    read
        Whether a step has read it.
    chosen
        What the thread's last call chose; None before its first one.
    """

    depth: int = 0
    generating: bool = False
    prompt: Shortened | None = None
    read: bool = False
    chosen: _Chosen | None = None


class Pruning(Attachment):
    """A pruned model: made by `prune` or `apply`, undone by leaving the block or by `remove`.

    Any number of threads may call the model at once. A deep copy of the model is pruned as well,
    until `remove(copy)`.

    Attributes
    ----------
    model
        The model that is pruned; the one inside, where a wrapper was passed.
    selector, keep, positions, application, proportional_attention
        What was asked for.
    selections
        One `Selection` per item (image, video or crop) of the last call, in prompt order: of the
        last call in the thread that asks or, where it made none, of the last one in any.
    selecting_seconds
        How long scoring and choosing them took; the encoder is not in it. On a GPU it is the time
        of handing over the work, unless the method itself waits for its scores.
    """

    def __init__(
        self,
        model: Any,
        selector: Selector,
        keep: Keep | Budget,
        positions: Positions,
        application: Application,
        proportional_attention: bool = False,
    ) -> None:
        super().__init__(model)
        self.selector = selector
        self._budget = Budget.of(keep)
        self.positions = check_positions(positions)
        self.application = _check_application(application)
        if not isinstance(proportional_attention, bool):
            raise ConfigError(
                f"proportional_attention={proportional_attention!r} must be True or False."
            )
        self.proportional_attention = proportional_attention
        check_method(selector, self._vision.model)
        self._call = _Call()
        self._last = _Chosen([], 0.0)
        self._proportional: ProportionalAttention | None = None
        self.begin()

    @property
    def keep(self) -> int | float:
        """The budget of each item."""
        return self._budget.keep

    @functools.cached_property
    def _vision(self) -> VisionModel:
        return vision_model(self.model)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this model: a copy has another one to look at."""
        return {name: value for name, value in self.__dict__.items() if name != "_vision"}

    @property
    def selections(self) -> list[Selection]:
        """One `Selection` per item of the last call, in prompt order."""
        return (self._call.chosen or self._last).selections

    @property
    def selecting_seconds(self) -> float:
        """Seconds that scoring and choosing took in the last call."""
        return (self._call.chosen or self._last).seconds

    def _note(self, chosen: _Chosen) -> None:
        self._call.chosen = self._last = chosen

    # Attaching and taking off ------------------------------------------------------------------

    def _attach(self) -> None:
        if self.proportional_attention:
            self._proportional = ProportionalAttention(self.model)  # first: it may refuse
        self._stand_ins = [
            StandIn(self.model, "generate", self._generate),
            StandIn(self.model, "forward", self._forward),
        ]
        self._hooks = [
            self._vision.inner.register_forward_pre_hook(self._check_inner, with_kwargs=True),
            *self._vision.hooks(),
        ]

    def _detach(self) -> None:
        for one in [*self._hooks, *self._stand_ins]:
            one.remove()
        if self._proportional is not None:
            self._proportional.remove()
            self._proportional = None

    def _check_inner(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise if images or videos are passed to the model without its head."""
        if self._call.depth:
            return
        if self._vision.encoder_inputs(named_arguments(inner, args, kwargs)):
            raise PromptError(
                f"images or videos were passed to {type(inner).__name__}, which is not pruned: "
                f"only calls of the whole {type(self.model).__name__} are. Call that one, or call "
                "this one outside the block."
            )

    # Forward calls -----------------------------------------------------------------------------

    def _forward(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in front of the model's own `forward`."""
        # A call with pixels inside `generate` is no step of it: a logits processor makes it.
        if self._call.generating and not _brings_pixels(kwargs):
            return plain(*args, **self._step(kwargs))
        with self._running():
            named = named_arguments(self.model, args, kwargs)
            with Filling[Shortened](cache_of(named)) as filling:
                if (shortened := self._shorten(named, filling.before is not None)) is not None:
                    if filling.cache is None and named.get("use_cache") is not False:
                        from transformers import DynamicCache

                        # Made here, so that it can be noted what it holds.
                        filling.cache = DynamicCache(config=self.model.config.get_text_config())
                        named.update(cache_argument(self.model, filling.cache))
                    call = shortened.call(named, self._vision.encoder_arguments())
                    empty = shortened.input_ids[:, :0]
                    filling.holding = Holding(shortened.without_media(), empty)
                elif filling.before is not None:
                    known = _prompt_and_after(filling.before)
                    call = known.prompt.continued_call(named, filling.before.length, self.positions)
                    filling.holding = _read_on(known, named)
                else:
                    return plain(*args, **kwargs)
                self._count_keys(filling.holding.prompt)
                return plain(**call)

    def _step(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a step of `generate`, with the kept rows where it reads the prompt."""
        shortened, input_ids = self._call.prompt, kwargs.get("input_ids")
        if shortened is None:
            return kwargs
        if input_ids is None:
            raise PromptError(
                "generate reads embeddings in place of the prompt's tokens, where pruned images "
                "cannot be put. Leave out what makes them (prompt tuning, inputs_embeds)."
            )
        cache: Any = cache_of(kwargs)
        length = shortened.prompt.length
        if shortened.is_prompt_of(input_ids):
            self._call.read = True
            kwargs["mm_encoder_outputs"] = shortened.encoder_outputs(len(input_ids))
            if kwargs.get("attention_mask") is None and cache is None:
                # Without mask and cache, transformers takes gaps in positions for packed prompts.
                kwargs["attention_mask"] = torch.ones_like(input_ids)
            since, new = 0, input_ids.shape[1] - length
        else:
            since, new = cache_length(cache) - length, input_ids.shape[1]
        if new and shortened.ends_with_dropped:
            # The engine counts on from the last token it sees, which is not the prompt's last.
            after = shortened.positions_after(since, new, len(input_ids))
            before = kwargs["position_ids"].expand(*after.shape[:-1], -1)[..., :-new]
            kwargs["position_ids"] = torch.cat([before, after], dim=-1)
        return kwargs

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Mark a call of the model as running in this thread, perhaps inside another one."""
        call, proportional = self._call, self._proportional
        before = call.prompt, call.generating, call.read
        counted = None if proportional is None else proportional.logs
        call.prompt, call.generating, call.read = None, False, False
        call.depth += 1
        try:
            yield
        finally:
            call.depth -= 1
            call.prompt, call.generating, call.read = before
            if proportional is not None:
                proportional.logs = counted

    def _count_keys(self, shortened: Shortened) -> None:
        """Have attention count the keys of a prompt until the call is over."""
        if self._proportional is not None:
            self._proportional.check_call()
            self._proportional.logs = shortened.logs

    # generate ----------------------------------------------------------------------------------

    def _generate(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in front of the model's own `generate`."""
        if isinstance(plain, functools.partial):  # somebody's defaults, lengths among them
            args, kwargs = (*plain.args, *args), {**plain.keywords, **kwargs}
            plain = plain.func
        kwargs = named_call(self.model, "generate", args, kwargs)
        if (inputs := kwargs.pop("inputs", None)) is not None:
            kwargs["input_ids"] = inputs
        with self._running(), Filling[Shortened](cache_of(kwargs)) as filling:
            with torch.no_grad():
                shortened = self._shorten(kwargs, filling.before is not None)
            if shortened is not None:
                _refuse(kwargs)
                call = shortened.call(kwargs, self._vision.encoder_arguments())
                del call["mm_encoder_outputs"]  # steps are handed them, beams and all
                known: Holding[Shortened] = Holding(shortened.without_media(), None)
            elif filling.before is not None:
                known = _prompt_and_after(filling.before)
                call = known.prompt.continued_prompt(kwargs, known.after)
            else:
                return self._run(plain, kwargs, None)
            self._count_keys(known.prompt)
            return self._generate_short(plain, kwargs["input_ids"], call, shortened, known, filling)

    def _generate_short(
        self,
        plain: Callable[..., Any],
        input_ids: Tensor,
        call: dict[str, Any],
        shortened: Shortened | None,
        known: Holding[Shortened],
        filling: Filling[Shortened],
    ) -> Any:
        """Run `generate` on short prompts, and return its output with the caller's in front.

        Parameters
        ----------
        plain
            The model's own `generate`.
        input_ids
            The caller's LongTensor [B, L].
        call
            Arguments with the short prompts.
        shortened
            The prompts whose images have to be read; None where the cache holds them.
        known
            The prompts, as the cache will hold them.
        filling
            Gets what the cache holds in the end.
        """
        short_length = call["input_ids"].shape[1]
        full_length = input_ids.shape[1]
        self._shift_lengths(call, full_length, full_length - short_length)
        if call.get("streamer") is not None:
            call["streamer"] = _FullPromptStreamer(call["streamer"], input_ids)
        beams = self._setting(call, "num_beams") or 1
        output = self._run(plain, call, shortened)
        sequences = output if isinstance(output, Tensor) else output.sequences
        repeats = len(sequences) // len(input_ids)
        if filling.cache is None and not isinstance(output, Tensor):
            filling.cache = cache_of(output)
        if filling.cache is not None:
            filling.holding = _generated(known, sequences, repeats, beams)
        prompts = input_ids.to(sequences.device).repeat_interleave(repeats, dim=0)
        full = torch.cat([prompts, sequences[:, short_length:]], dim=1)
        if isinstance(output, Tensor):
            return full
        output.sequences = full
        return output

    def _run(
        self, plain: Callable[..., Any], kwargs: dict[str, Any], shortened: Shortened | None
    ) -> Any:
        """Run the model's own `generate`, whose steps read `shortened`.

        Raises
        ------
        PromptError
            If no step did, so that the answer is to another prompt.
        TokenPruneError
            If pruning was taken off while it ran, and the answer needed it.
        """
        call = self._call
        call.prompt, call.generating, call.read = shortened, True, False
        output = plain(**kwargs)
        if shortened is None:
            return output
        read = call.read
        every_step = (
            shortened.ends_with_dropped
            or self.proportional_attention
            or self._setting(kwargs, "use_cache") is False
        )
        if not self.is_attached and (every_step or not read):
            raise TokenPruneError(
                "pruning was taken off the model while generate was running, so that its answer is "
                "lost. Let calls in other threads end before the block does."
            )
        if not read:
            raise PromptError(
                "generate did not read the pruned prompt: its own loop put other tokens in front. "
                "Use the plain generate of transformers, or call the model itself."
            )
        return output

    def _setting(self, kwargs: dict[str, Any], name: str) -> Any:
        """Return a setting of `generate` as the call's arguments or configs have it."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        config = kwargs.get("generation_config") or self.model.generation_config
        return getattr(config, name, None)

    def _shift_lengths(self, kwargs: dict[str, Any], full_length: int, removed: int) -> None:
        """Let `max_length` and `min_length` count the caller's prompt and not the short one.

        Raises
        ------
        PromptError
            If they leave no room for an answer: the engine would say so of the short prompt.
        """
        lengths = {
            name: self._setting(kwargs, name) or None
            for name, by_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
            if self._setting(kwargs, by_new) is None
        }
        longest, shortest = lengths.get("max_length"), lengths.get("min_length")
        if longest is not None and longest <= full_length:
            raise PromptError(
                f"the prompt has {full_length} tokens and max_length={longest} counts them, so "
                "nothing is left for an answer. Raise it or, better, give max_new_tokens."
            )
        if longest is not None and shortest is not None and shortest > longest:
            raise PromptError(
                f"min_length={shortest} is above max_length={longest}. Lower it, or give "
                "min_new_tokens and max_new_tokens."
            )
        for name, length in lengths.items():
            if length is None:
                continue
            if kwargs.get("generation_config") is None or name in kwargs:
                kwargs[name] = max(length - removed, 0)
            else:
                # transformers takes a config or arguments, not both; the caller's stays.
                kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
                setattr(kwargs["generation_config"], name, max(length - removed, 0))

    # Shortening --------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shorten(self, arguments: dict[str, Any], known_cache: bool) -> Shortened | None:
        """Encode, select and shorten a call's prompt; None where it has no image and no video.

        Parameters
        ----------
        arguments
            The call's, by name; what is ours among them is taken out.
        known_cache
            Whether it goes on from a cache that is known to hold a pruned prompt.
        """
        encoded: Encoded | None = arguments.pop("encoded", None)
        known: Sequence[Selection | None] | None = arguments.pop("known", None)
        if arguments.get("mm_encoder_outputs"):
            raise PromptError(
                "mm_encoder_outputs cannot be pruned: they no longer hold what selectors look at. "
                "Pass the processor's pixel values, or encoded=tokenprune_hf.encode(...)."
            )
        filled = cache_length(cache_of(arguments)) > 0
        if encoded is None and not self._vision.encoder_inputs(arguments):
            if filled and not known_cache:
                self._check_no_placeholders(arguments)
            self._note(_Chosen([], 0.0))
            return None
        if filled:
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
            encoded = encode_media(self._vision, arguments, self.selector.needs)
        from_encoder = [name for name in self.selector.needs if name in ENCODED]
        missing = [name for name in from_encoder if name not in encoded.needs]
        if missing:
            raise PromptError(
                f"encoded was made without {', '.join(missing)}, which method "
                f"{self.selector.name!r} needs. Encode again with needs including them."
            )
        with torch.no_grad():
            placeholders = find_placeholders(self._vision, arguments["input_ids"], encoded)
            started = time.perf_counter()
            items = prompt_items(self._vision, arguments, encoded, self.selector.needs)
            selections, in_prompt = self._select(encoded, items, placeholders, known)
            self._note(_Chosen(in_prompt, time.perf_counter() - started))
            return shorten_prompt(
                self._vision,
                arguments,
                encoded,
                placeholders,
                selections,
                self.positions,
                self.application,
            )

    def _check_no_placeholders(self, arguments: dict[str, Any]) -> None:
        """Raise if a prompt that speaks of images goes on from a cache of unknown content."""
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            return
        for modality in ("image", "video"):
            count = int((input_ids == self._vision.token_id(modality)).sum())
            if count:
                raise PromptError(
                    f"the prompt holds {count} {modality} placeholders and comes with a filled "
                    f"cache, and it is not known whether that holds a pruned {modality}. Go on "
                    "from the cache that a call inside a block of tokenprune_hf.prune returned, or "
                    "pass the pixel values without a cache."
                )

    def _select(
        self,
        encoded: Encoded,
        items: dict[str, list[VisualTokens]],
        placeholders: dict[str, Tensor],
        known: Sequence[Selection | None] | None,
    ) -> tuple[dict[str, list[Selection]], list[Selection]]:
        """Choose the tokens of every item; return them by modality, and all in prompt order."""
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
                self._budget,
                known=[of_item[modality, index] for index in range(len(own))],
            )
            for modality, own in items.items()
        }
        if self.proportional_attention:
            result = {
                modality: _represent(encoded, modality, own) for modality, own in result.items()
            }
        return result, [result[modality][index] for modality, index in in_prompt]


_BEAMS = (
    "this cache was filled by a beam search, whose rows are not those of the sequences that it "
    "returned. Read the whole conversation again, without this cache."
)


def _prompt_and_after(found: Held[Shortened]) -> Holding[Shortened]:
    """Return what a cache holds now: its own rows, and no more of the prompt than is left."""
    prompt, after = found.holding.prompt, found.holding.after
    if found.rows is not None:
        prompt = prompt.of_rows(found.rows)
    if found.length < prompt.prompt.length:
        prompt = prompt.cut_to(found.length)
    if after is not None:
        after = after[:, : found.length - prompt.prompt.length]
    return dataclasses.replace(found.holding, prompt=prompt, after=after)


def _read_on(known: Holding[Shortened], arguments: dict[str, Any]) -> Holding[Shortened]:
    """Return what a cache holds when a call has read more tokens."""
    ids = arguments.get("input_ids")
    after = None
    if known.after is not None and ids is not None:
        after = torch.cat([known.after.to(ids.device), ids], dim=1)
    return dataclasses.replace(known, after=after)


def _generated(
    known: Holding[Shortened], sequences: Tensor, repeats: int, beams: int
) -> Holding[Shortened]:
    """Return what a cache holds after `generate`.

    Parameters
    ----------
    known
        Prompts B, as they are in the cache.
    sequences
        LongTensor [B * repeats, ...], short prompts and all that came after them.
    repeats, beams
        Sequences of each prompt, and beams of each.
    """
    prompt = known.prompt
    if repeats > 1:
        rows = torch.arange(len(prompt.input_ids), device=prompt.input_ids.device)
        prompt = prompt.of_rows(rows.repeat_interleave(repeats))
    return dataclasses.replace(
        known,
        prompt=prompt,
        # The cache's own length says how many of them it holds: the last one was not read.
        after=sequences[:, prompt.prompt.length :],
        refusal=_BEAMS if beams > 1 else None,
    )


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


def _brings_pixels(arguments: dict[str, Any]) -> bool:
    """Say whether a call brings images or videos, by the names that all encoders share."""
    return any(
        name.startswith("pixel_values") and value is not None for name, value in arguments.items()
    )


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


def apply(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning:
    """Make a model's `generate` and calls run pruned until `remove`.

    Parameters, result and errors are those of `prune`.
    """
    started: Pruning = _start(
        model, method, keep, positions, apply, proportional_attention, options
    )
    return started


def prune(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    **options: Any,
) -> Pruning:
    """Prune a model inside a ``with`` block.

    ::

        with tokenprune_hf.prune(model, "zeroth-order", keep=0.1) as pruning:
            output = model.generate(**inputs, max_new_tokens=32)
        pruning.selections

    After the block the model is exactly as it was, also after an exception.

    Parameters
    ----------
    model
        A vision-language model of transformers of a family in `tokenprune_hf.supported_models()`,
        or a PEFT model, what `torch.compile` returned, or a DistributedDataParallel around one.
    method
        A name out of `tokenprune.methods()`, a `tokenprune.Selector` of your own, or a
        `tokenprune.PruningConfig`, which says everything else too. ``"trimmed-attention"`` is
        deprecated: it does, and returns, what `tokenprune_hf.trim_cross_attention` does.
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
    Pruning
        With `selections` of the last call and `remove`.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, ConfigError
        For a wrong method, option, budget or way to count positions.
    UnsupportedModelError
        If the model, its wrapper, or the method on this model, is not supported.
    TokenPruneError
        If the model is pruned already.
    """
    started: Pruning = _start(
        model, method, keep, positions, apply, proportional_attention, options
    )
    return started


def _start(
    model: Any,
    method: str | Selector | PruningConfig,
    keep: Keep | None,
    positions: Positions,
    application: Application,
    proportional_attention: bool,
    options: dict[str, Any],
) -> Any:
    """Do what `prune` and `apply` say; the deprecated method returns no `Pruning`."""
    if method != TRIMMED.name:
        check_prompt_has_images(model, method)
    if isinstance(method, PruningConfig):
        if keep is not None or options or positions != "original":
            raise TokenPruneError(
                "keep, positions or options came with a PruningConfig, which has them already. "
                "Change them there, with dataclasses.replace."
            )
        asked = method.selector(), method.budget, method.positions
        return Pruning(model, *asked, application, proportional_attention)
    if keep is None:
        raise BudgetError(
            "keep is missing. Give a number of tokens (keep=64) or a fraction of them (keep=0.1)."
        )
    if method == TRIMMED.name:
        from tokenprune_hf.mllama.by_name import trim_by_name

        about_prompts = {
            "positions": (positions, "original"),
            "apply": (application, "drop"),
            "proportional_attention": (proportional_attention, False),
        }
        return trim_by_name(model, keep, options, about_prompts)
    if isinstance(method, Selector):
        if options:
            raise TokenPruneError(
                f"options {sorted(options)} came with a {type(method).__name__} object, which has "
                "its options already. Set them there."
            )
        return Pruning(model, method, keep, positions, application, proportional_attention)
    config = PruningConfig(method, keep, positions, options)
    asked = config.selector(), config.budget, config.positions
    return Pruning(model, *asked, application, proportional_attention)


def remove(model: Any) -> None:
    """Undo `apply`; a model that is not pruned stays as it is."""
    running = attached(model)
    if running is not None:
        running.remove()
