"""Calls of a pruned model: what stands in front of its own `forward` and `generate`.

A call with pixels is encoded, chosen from and shortened, and the model's own method then runs on
the short prompt and the kept rows. A call that goes on from the cache of a pruned prompt is
translated into terms of the short prompt. Any other call is the plain model's.

A call of `forward` is handed the kept rows at once. `generate` calls `forward` step by step, and of
its steps those that read the prompt are handed them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tokenprune.errors import PromptError, TokenPruneError
from tokenprune.selection import Selection
from tokenprune.transfer import ToHost
from tokenprune_hf.attached import ThreadState, named_arguments, named_call
from tokenprune_hf.caches import Cache, Filling, Held, Holding, cache_length
from tokenprune_hf.crops import IMAGE_CROPS
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.generate_arguments import FullPromptStreamer, refuse, setting, shift_lengths
from tokenprune_hf.inside.continuing import Continuing
from tokenprune_hf.inside.finding import placed
from tokenprune_hf.inside.layers import InsideLayers
from tokenprune_hf.inside.left import Left
from tokenprune_hf.proportional import ProportionalAttention
from tokenprune_hf.pruner import NOTHING, Chosen, Pruner
from tokenprune_hf.shortened import Shortened
from tokenprune_hf.shortening import find_placeholders

_BEAMS = (
    "this cache was filled by a beam search, whose rows are not those of the sequences that it "
    "returned. Read the whole conversation again, without this cache."
)


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
    known
        The pruned prompt that the running `generate` reads or goes on from; None where there is
        none.
    read
        Whether a step has read it.
    chosen
        What the thread's last call chose; None before its first one.
    to_check
        What the running call chose, until it is checked.
    reading
        Whether the running step begins with the prompt, on its way to the host.
    cache
        The one that the steps of `generate` fill, once it is known.
    reads
        Whether the running step reads the prompt.
    """

    depth: int = 0
    generating: bool = False
    prompt: Shortened | None = None
    known: Shortened | None = None
    read: bool = False
    chosen: Chosen | None = None
    to_check: Chosen | None = None
    reading: ToHost | None = None
    cache: Cache | None = None
    reads: bool = False


class _GenerateOutput(Protocol):
    """What `generate` returns where it is asked for more than tokens."""

    sequences: Tensor


class Calls:
    """Runs the calls of one pruned model, in any number of threads.

    Parameters
    ----------
    pruner
        Encodes and chooses.

    Attributes
    ----------
    attached
        Whether calls come here: False once pruning was taken off.
    proportional
        Has attention count keys, where that was asked for.
    inside
        Has tokens leave inside the language model, for a method that does.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner
        self._vision = pruner.vision
        self._model = pruner.vision.model
        self._call = _Call()
        self._last = NOTHING
        self.attached = False
        self.proportional: ProportionalAttention | None = None
        self.inside: InsideLayers | None = None

    @property
    def chosen(self) -> Chosen:
        """What the last call chose: the thread's own or, where it made none, that of any thread."""
        return self._call.chosen or self._last

    def _note(self, chosen: Chosen) -> None:
        self._call.chosen = self._last = chosen

    def check_inner(
        self, inner: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise if images or videos are passed to the model without its head."""
        if self._call.depth:  # the whole model is running, and calls its inner one
            return
        if self._vision.encoder_inputs(named_arguments(inner, args, kwargs)):
            raise PromptError(
                f"images or videos were passed to {type(inner).__name__}, which is not pruned: "
                f"only calls of the whole {type(self._model).__name__} are. Call that one, or call "
                "this one outside the block."
            )

    # Forward calls -----------------------------------------------------------------------------

    def forward(
        self, plain: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> object:
        """Stand in front of the model's own `forward`."""
        # A call with pixels inside `generate` is no step of it: a logits processor makes it.
        if self._call.generating and not _brings_pixels(kwargs):
            kwargs = self._step(kwargs)
            with self._inside_of_step(kwargs):
                result = plain(*args, **kwargs)
            self._check()
            return result
        with self._running():
            named = named_arguments(self._model, args, kwargs)
            with Filling[Shortened](cache_of(named)) as filling:
                if (shortened := self._shorten(named, filling.before is not None)) is not None:
                    if filling.cache is None and named.get("use_cache") is not False:
                        from transformers import DynamicCache

                        # Made here, so that it can be noted what it holds.
                        filling.cache = DynamicCache(config=self._model.config.get_text_config())
                        named.update(cache_argument(self._model, filling.cache))
                    # The encoder has run: what only it reads must not reach the model again.
                    call = shortened.call(named, self._vision.encoder_arguments())
                    self._vision.will_read(shortened.arguments["position_ids"])
                    nothing_after = shortened.input_ids[:, :0]
                    filling.holding = Holding(shortened.without_media(), nothing_after)
                elif filling.before is not None:
                    known = _prompt_and_after(filling.before)
                    length, positions = filling.before.length, self._pruner.positions
                    call = known.prompt.continued_call(named, length, positions)
                    filling.holding = _read_on(known, named)
                else:
                    return plain(*args, **kwargs)
                prompt = filling.holding.prompt
                self._count_keys(prompt)
                with self._inside(shortened or prompt, call, filling.cache) as inside:
                    result = plain(**call)
                if shortened is not None:
                    filling.holding.prompt = dataclasses.replace(prompt, left=inside.left)
                self._check()
                return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check(self) -> None:
        """Raise unless what was chosen for the running call may be used; note it if it may.

        Done when the prompt was handed to the language model and nothing that came of it has left:
        the device then goes on while the host looks.

        Raises
        ------
        TokensError, SelectorError
            As `tokenprune.select_many`.
        """
        reading, self._call.reading = self._call.reading, None
        if reading is not None and not bool(reading.arrived()[0]):
            raise _unread()
        chosen, self._call.to_check = self._call.to_check, None
        if chosen is not None:
            self._note(chosen.checked())

    def _step(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a step of `generate`, with the kept rows where it reads the prompt.

        Which steps do is told by their tokens: without a cache every step reads the prompt again,
        and searches may begin with several steps that do.
        """
        shortened, input_ids = self._call.prompt, kwargs.get("input_ids")
        known = self._call.known
        self._call.reads = False
        if known is not None and "position_ids" in kwargs and kwargs["position_ids"] is None:
            # Some models take the positions out of their steps, to count the cache instead.
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            past = cache_length(cache_of(kwargs))
            kwargs["position_ids"] = known.positions_of(past, tokens.shape[1], len(tokens))
        if shortened is None:
            return kwargs
        if input_ids is None:
            raise PromptError(
                "generate reads embeddings in place of the prompt's tokens, where pruned images "
                "cannot be put. Leave out what makes them (prompt tuning, inputs_embeds)."
            )
        cache = cache_of(kwargs)
        length = shortened.prompt.length
        # Told by its tokens and not by the step's number: without a cache every step reads it.
        reads = input_ids.shape[1] >= length and shortened.begins(input_ids)
        if isinstance(reads, Tensor) and input_ids.shape[1] == length and _is_empty(cache):
            # A first step like all others: it is looked at once the step is on its way.
            self._call.reading, reads = ToHost([reads]), True
        if bool(reads):
            self._call.read = self._call.reads = True
            self._vision.will_read(shortened.arguments["position_ids"])
            # `generate` may have encoded what is neither image nor video (audio).
            others = kwargs.get("mm_encoder_outputs") or {}
            kwargs["mm_encoder_outputs"] = others | shortened.encoder_outputs(len(input_ids))
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
        call, proportional = self._call, self.proportional
        # The other one's state is put back at the end: a logits processor of `generate` may call
        # the model, and the steps that follow are the outer call's again.
        before = call.prompt, call.known, call.generating, call.read, call.to_check, call.cache
        counted = None if proportional is None else proportional.logs
        call.prompt, call.known, call.generating, call.read = None, None, False, False
        call.to_check = call.cache = None
        call.depth += 1
        try:
            yield
        finally:
            call.depth -= 1
            self._vision.will_read(None)
            call.prompt, call.known, call.generating, call.read, call.to_check, call.cache = before
            if proportional is not None:
                proportional.logs = counted

    def _count_keys(self, shortened: Shortened) -> None:
        """Have attention count the keys of a prompt until the call is over."""
        if self.proportional is not None:
            self.proportional.check_call()
            self.proportional.logs = shortened.logs

    @contextmanager
    def _inside(
        self, prompt: Shortened, call: Mapping[str, Any], cache: Cache | None
    ) -> Iterator[_Inside]:
        """Have tokens leave inside the language model in one call of it, where a method does so.

        Parameters
        ----------
        prompt
            What the call reads, where it has `items`, or goes on from.
        call
            The call's arguments.
        cache
            What it fills, or None.
        """
        layers, result = self.inside, _Inside(prompt.left)
        if layers is None:
            if prompt.left is not None:
                raise _left_inside()
            yield result
            return
        tokens = call.get("input_ids")
        tokens = call["inputs_embeds"] if tokens is None else tokens
        if prompt.items is not None and layers.drops(prompt.items):
            layers.check_call(prompt.items, cache)
            repeats = len(tokens) // len(prompt.input_ids)
            reading = layers.reading(prompt.items, repeats, prompt.left)
            with layers.run(reading):
                yield result
            result.left = reading.left
            if reading.chose:
                self._call.to_check = Chosen(
                    reading.selections(), reading.seconds, {}, reading.check()
                )
        elif prompt.items is None and prompt.left is not None and cache is not None:
            past = cache_length(cache)
            shown = call.get("attention_mask")
            if shown is None:
                shown = prompt.mask_of(past + tokens.shape[1], len(tokens))
            with layers.run(Continuing(prompt.left, cache, past, shown)):
                yield result
        else:
            yield result

    @contextmanager
    def _inside_of_step(self, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Do so in a step of `generate`; see `_inside`."""
        call, cache = self._call, cache_of(kwargs)
        # What a logits processor asks of the model, with a cache of its own, is no step.
        if call.known is None or not (call.reads or (cache is not None and cache is call.cache)):
            yield
            return
        prompt = call.prompt if call.reads and call.prompt is not None else call.known
        prompt = dataclasses.replace(prompt, left=call.known.left)
        with self._inside(prompt, kwargs, cache) as inside:
            yield
        call.known = dataclasses.replace(call.known, left=inside.left)
        call.cache = cache

    # generate ----------------------------------------------------------------------------------

    def generate(
        self, plain: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> object:
        """Stand in front of the model's own `generate`.

        It runs on short prompts, and its output has the caller's prompts in front.
        """
        if isinstance(plain, functools.partial):  # somebody's defaults, lengths among them
            args, kwargs = (*plain.args, *args), {**plain.keywords, **kwargs}
            plain = plain.func
        kwargs = named_call(self._model, "generate", args, kwargs)
        if (inputs := kwargs.pop("inputs", None)) is not None:
            kwargs["input_ids"] = inputs
        with self._running(), Filling[Shortened](cache_of(kwargs)) as filling:
            # Encoding stands outside the model's own `generate`, which switches gradients off.
            with torch.no_grad():
                shortened = self._shorten(kwargs, filling.before is not None)
            if shortened is not None:
                refuse(kwargs)
                call = shortened.call(kwargs, self._vision.encoder_arguments())
                del call["mm_encoder_outputs"]  # steps are handed them, beams and all
                known: Holding[Shortened] = Holding(shortened.without_media(), None)
            elif filling.before is not None:
                known = _prompt_and_after(filling.before)
                call = known.prompt.continued_prompt(kwargs, known.after)
            else:
                return self._run(plain, kwargs, None, None)
            self._count_keys(known.prompt)
            input_ids: Tensor = kwargs["input_ids"]
            short_length = call["input_ids"].shape[1]
            full_length = input_ids.shape[1]
            shift_lengths(call, full_length, full_length - short_length, self._model)
            if call.get("streamer") is not None:
                call["streamer"] = FullPromptStreamer(call["streamer"], input_ids)
            beams = setting(call, "num_beams", self._model) or 1

            self._call.cache = filling.cache
            output = self._run(plain, call, shortened, known.prompt)
            more = None if isinstance(output, Tensor) else cast(_GenerateOutput, output)
            sequences = cast(Tensor, output) if more is None else more.sequences
            # More than one with `num_return_sequences`: those of a prompt stand together.
            repeats = len(sequences) // len(input_ids)
            if filling.cache is None and more is not None:
                filling.cache = cache_of(cast(Any, more))
            if filling.cache is not None:
                if self._call.known is not None:  # with what its steps left of it
                    known = dataclasses.replace(known, prompt=self._call.known.without_media())
                filling.holding = _generated(known, sequences, repeats, beams)
            prompts = input_ids.to(sequences.device).repeat_interleave(repeats, dim=0)
            full = torch.cat([prompts, sequences[:, short_length:]], dim=1)
            if more is None:
                return full
            more.sequences = full
            return more

    def _run(
        self,
        plain: Callable[..., object],
        kwargs: dict[str, Any],
        shortened: Shortened | None,
        known: Shortened | None,
    ) -> object:
        """Run the model's own `generate`, whose steps read `shortened` or go on from `known`.

        Raises
        ------
        PromptError
            If no step did, so that the answer is to another prompt.
        TokenPruneError
            If pruning was taken off while it ran, and the answer needed it.
        """
        call = self._call
        call.prompt, call.known, call.generating, call.read = shortened, known, True, False
        output = plain(**kwargs)
        if shortened is None:
            return output
        read = call.read
        # Otherwise only the first step needs us: the cache then holds the pruned prompt, and the
        # engine counts on from it as it should.
        every_step = (
            shortened.ends_with_dropped
            or self._pruner.proportional
            or setting(kwargs, "use_cache", self._model) is False
        )
        if not self.attached and (every_step or not read):
            raise TokenPruneError(
                "pruning was taken off the model while generate was running, so that its answer is "
                "lost. Let calls in other threads end before the block does."
            )
        if not read:
            raise _unread()
        return output

    # Both --------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shorten(self, arguments: dict[str, Any], known_cache: bool) -> Shortened | None:
        """Encode, choose and shorten a call's prompt; None where it has no image and no video.

        Parameters
        ----------
        arguments
            The call's, by name; what is ours among them is taken out.
        known_cache
            Whether it goes on from a cache that is known to hold a pruned prompt.
        """
        known: Sequence[Selection | None] | None = arguments.pop("known", None)
        if self.inside is not None and any(one is not None for one in known or ()):
            raise PromptError(
                "known holds selections, and this method chooses inside the language model, anew "
                "in each call. Leave known out."
            )
        crops: Sequence[int] | None = arguments.pop(IMAGE_CROPS, None)
        brought = self._pruner.encoded(arguments, known_cache)
        if brought is None:
            self._note(NOTHING)
            return None
        encoded, on_host = brought
        with torch.no_grad():
            placeholders = find_placeholders(self._vision, on_host["input_ids"], encoded)
            encoded = self._pruner.scoped(encoded, placeholders, crops)
            device = arguments["input_ids"].device
            chosen = self._pruner.choose(on_host, encoded, placeholders, known, device)
            shortened = self._pruner.shorten(arguments, on_host, encoded, placeholders, chosen)
            if self.inside is not None:
                items = placed(self._vision, on_host, encoded, placeholders)
                shortened = dataclasses.replace(shortened, items=items)
            self._call.to_check = chosen
            if cache_of(arguments) is not None:
                self._check()  # a conversation in the caller's cache outlives a bad image
            return shortened


@dataclasses.dataclass
class _Inside:
    """What a call has left of a prompt inside the language model; None where nothing left."""

    left: Left | None


# What a cache holds -------------------------------------------------------------------------------


def _prompt_and_after(held: Held[Shortened]) -> Holding[Shortened]:
    """Return what a cache holds now: its own rows, and no more of the prompt than is left."""
    prompt, after = held.holding.prompt, held.holding.after
    if held.rows is not None:
        prompt = prompt.of_rows(held.rows)
    if held.length < prompt.prompt.length:
        prompt = prompt.cut_to(held.length)
    if after is not None:
        after = after[:, : held.length - prompt.prompt.length]
    return dataclasses.replace(held.holding, prompt=prompt, after=after)


def _read_on(known: Holding[Shortened], arguments: dict[str, Any]) -> Holding[Shortened]:
    """Return what a cache holds when a call has read more tokens."""
    ids = arguments.get("input_ids")
    after = None  # once embeddings were read, what stands in the cache is not known by ids
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
        # Sequences are made of several beams' rows, and the cache ends in the beams' own order.
        refusal=_BEAMS if beams > 1 else None,
    )


def _left_inside() -> PromptError:
    return PromptError(
        "tokens of this cache's prompt left inside the language model, so that its layers hold "
        "different tokens. Go on from it in a block of a method that does that, such as "
        "tokenprune_hf.prune(model, 'fastv', keep), or read the prompt again without this cache."
    )


def _is_empty(cache: Cache | None) -> bool:
    """Say whether a step fills a new cache, so that it reads the prompt or nothing does."""
    return cache is not None and cache_length(cache) == 0


def _unread() -> PromptError:
    return PromptError(
        "generate did not read the pruned prompt: its own loop put other tokens in front. "
        "Use the plain generate of transformers, or call the model itself."
    )


def _brings_pixels(arguments: dict[str, Any]) -> bool:
    """Say whether a call brings images or videos, by the names that all encoders share."""
    return any(
        name.startswith("pixel_values") and value is not None for name, value in arguments.items()
    )
