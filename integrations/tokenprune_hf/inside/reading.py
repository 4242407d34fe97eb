"""Reading: one call that reads a batch of prompts, whose tokens leave at each stage on the way."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.errors import PromptError, TokensError, UnsupportedModelError
from tokenprune.inside.base import InsideMethod, Stage, StagePicks
from tokenprune.question.attention import QueryKeys
from tokenprune.selection import Selection
from tokenprune.transfer import ToHost, to_device
from tokenprune_hf.engine import CACHE_NAMES
from tokenprune_hf.inside.items import Placed, PlacedItem
from tokenprune_hf.inside.left import Behind, Left, Merged, rows_with_new
from tokenprune_hf.inside.masks import Cut
from tokenprune_hf.prefix import Taken, sliding_window, taken
from tokenprune_hf.prompt import ShortPrompt


@dataclass
class _Item:
    """An item of which some tokens are left.

    Attributes
    ----------
    placed
        Where it stood at first.
    counts
        How many of its tokens stay behind each stage.
    tokens
        LongTensor [n], which of its N tokens are left.
    columns, text
        LongTensors [n] and [Q], where these and the text behind it stand now.
    weights
        float32 [Q], how much each token of that text counts; None for all alike.
    scores
        float32 [N] of the last stage; 0 for tokens that had left before.
    """

    placed: PlacedItem
    counts: tuple[int, ...]
    tokens: Tensor
    columns: Tensor
    text: Tensor
    weights: Tensor | None = None
    scores: Tensor | None = None

    def selection(self) -> Selection:
        """Return which of its tokens are left."""
        of = self.placed.tokens
        return Selection(
            self.tokens, of.total, of.grid, scores=self.scores, is_picture=of.is_picture
        )


class Reading:
    """A call that reads B prompts; what tokens leave is chosen on the way, or known already.

    Parameters
    ----------
    method, budget
        What is asked for.
    stages
        Of the method in this model.
    layers
        The decoder's.
    items
        Where the items stand.
    repeats
        How many rows of the call each prompt has, one behind the other (beams).
    known
        What an earlier call that read the same prompts left; it is not chosen again.

    Attributes
    ----------
    left
        What is left behind the stages that were passed; None where every item keeps all.
    seconds
        How long choosing took.
    """

    def __init__(
        self,
        method: InsideMethod,
        budget: Budget,
        stages: Sequence[Stage],
        layers: Sequence[Any],
        items: Placed,
        repeats: int,
        known: Left | None,
    ) -> None:
        self._method = method
        self._budget = budget
        self._stages = list(stages)
        self._layers = layers
        self._placed = items
        self._repeats = repeats
        self._known = known
        self._lengths = list(items.lengths)
        self._items: list[_Item] = []
        self._scores: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._behind: list[Behind] = []
        self._cut: Cut | None = None
        self._length = self._total = 0
        self.seconds = 0.0

    @property
    def left(self) -> Left | None:
        """What is left of the prompts."""
        return Left(tuple(self._behind), self._length) if self._behind else None

    @property
    def chose(self) -> bool:
        """Whether this call chose, and did not find it chosen."""
        return bool(self._behind) and self._known is None

    def selections(self) -> list[Selection]:
        """Return what is left of each item, in prompt order."""
        return [item.selection() for item in self._items]

    def check(self) -> Callable[[], None]:
        """Return what raises TokensError where a score is not finite; the host need not wait."""
        on_way = ToHost(self._finite)

        def check() -> None:
            if not all(map(bool, on_way.arrived())):
                raise TokensError(
                    f"method {self._method.name!r} found attention that is no number (NaN or "
                    "infinite) inside the language model. Load the model in bfloat16 or float32."
                )

        return check

    # Before and behind layers ------------------------------------------------------------------

    def before(
        self, number: int, layer: Any, states: Tensor, named: dict[str, Any], run: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return hidden states and arguments that a layer is given.

        Parameters
        ----------
        number, layer
            The layer, from 0.
        states
            [R, T, D], its input.
        named
            Its other arguments, as the decoder passes them for all T columns.
        run
            Runs a function so that no hook stands in front of what it calls.
        """
        if number == 0:
            self._begin(states)
        arguments = self._arguments(named, layer, states)
        # A stage may be passed and the next one ranked in front of the same layer.
        while (stage := self._next()) is not None:
            if stage.ranked_at == number and self._known is None:
                started = time.perf_counter()
                with torch.no_grad():
                    seen = run(functools.partial(self._taken, layer, states, arguments))
                    self._rank(number, layer, seen)
                self.seconds += time.perf_counter() - started
            if stage.layer != number:
                break
            states = self._pass(stage, states)
            arguments = self._arguments(named, layer, states)
        return states, arguments

    def _next(self) -> Stage | None:
        """Return the stage that comes next."""
        place = len(self._behind)
        return self._stages[place] if place < len(self._stages) else None

    def after(self, output: Any) -> Any:
        """Return the last layer's output with as many columns as the call has."""
        if not self._behind:
            return output
        states = output[0] if isinstance(output, tuple) else output
        columns, valid = self._rows(self._behind[-1])
        columns, valid = columns.to(states.device), valid.to(states.device)
        # Zeros stand where tokens left: nothing was computed for them. Whoever counts columns of
        # logits, labels or the last token counts those of the caller's prompt.
        whole = states.new_zeros(len(states), self._total, states.shape[-1])
        index = columns[..., None].expand(-1, -1, states.shape[-1])
        whole = whole.scatter(1, index, states.masked_fill(~valid[..., None], 0))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    # Parts -------------------------------------------------------------------------------------

    def _begin(self, states: Tensor) -> None:
        """Take note of what goes into the first layer."""
        if states.ndim != 3:
            raise UnsupportedModelError(
                f"the language model passes on states of shape {list(states.shape)} from layer to "
                "layer, and not one vector a token. Use a method that prunes before it (see "
                "`tokenprune methods`)."
            )
        self._total = states.shape[1]
        # All prompts are as long as the longest one; what comes behind it was generated since.
        self._length = max(self._placed.lengths)
        for one in self._placed.items:
            total = one.tokens.total
            counts = self._method.counts(total, self._budget.count(total))
            item = _Item(
                one,
                counts,
                torch.arange(total, device=states.device),
                to_device(one.columns, states.device),
                to_device(one.text, states.device),
            )
            if self._method.weighs_text and self._known is None:
                row = states[one.prompt * self._repeats].detach()
                item.weights = self._method.text_weights(row[item.columns], row[item.text])
            self._items.append(item)

    def _rows(self, behind: Behind) -> tuple[Tensor, Tensor]:
        """Return columns of each row of the call, those behind the prompt too, and which count."""
        return rows_with_new(behind, self._length, self._repeats, self._total)

    def _arguments(self, named: dict[str, Any], layer: Any, states: Tensor) -> dict[str, Any]:
        if not self._behind:
            return named
        if self._cut is None:
            columns, valid = self._rows(self._behind[-1])
            self._cut = Cut(columns, valid, self._behind[-1].padded, self._total)
        return self._cut.arguments(named, layer, states)

    def _taken(self, layer: Any, states: Tensor, arguments: Mapping[str, Any]) -> Taken:
        """Return q, k and v of a layer, of one row of each prompt in a batch of all rows."""
        without = {name: None for name in CACHE_NAMES if name in arguments}
        return taken(
            layer,
            states,
            remedy="Use a method that prunes before the language model",
            **{**arguments, **without},
        )

    def _rank(self, number: int, layer: Any, seen: Taken) -> None:
        """Score what is left of every item."""
        window = sliding_window(layer.self_attn)
        if window is not None and max(self._placed.lengths) > window:
            raise PromptError(
                f"layer {number} sees {window} tokens only and a prompt has "
                f"{max(self._placed.lengths)}, so its attention cannot rank all tokens. Let "
                f"method {self._method.name!r} rank in a layer of full attention, by its option "
                f"{self._method.where}."
            )
        width = self._behind[-1].columns.shape[1] if self._behind else self._length
        self._scores = []
        for item in self._items:
            prompt = item.placed.prompt
            row, length = prompt * self._repeats, self._lengths[prompt]
            start = 0 if self._placed.padded_right else width - length
            if self._method.asked == "last":
                asked = torch.full((1,), length - 1, device=seen.key.device)
            else:
                asked = item.text.to(seen.key.device) - start
            scores = self._method.score(
                QueryKeys(
                    query=seen.query[row][:, start + asked],
                    key=seen.key[row][:, start : start + length],
                    visual=item.columns.to(seen.key.device) - start,
                    scale=seen.scale,
                    columns=asked,
                    weights=None if item.weights is None else item.weights.to(seen.key.device),
                )
            )
            self._scores.append(scores)
            item.scores = scores.new_zeros(item.placed.tokens.total)
            item.scores[item.tokens.to(scores.device)] = scores
        self._finite.append(torch.cat(self._scores).isfinite().all())

    def _pass(self, stage: Stage, states: Tensor) -> Tensor:
        """Let tokens leave, and return the states of those that are left."""
        place = len(self._behind)
        if self._known is None:
            started = time.perf_counter()
            with torch.no_grad():
                self._behind.append(self._choose(stage, place, states))
            self.seconds += time.perf_counter() - started
        else:
            self._behind.append(self._known.stages[place])
        self._cut = None
        return self._behind[-1].passed(states, self._repeats)

    def _choose(self, stage: Stage, place: int, states: Tensor) -> Behind:
        """Return what stays behind a stage, and take note of where items stand then."""
        before = self._behind[-1] if self._behind else None
        device = self._scores[0].device
        prompts = len(self._lengths)
        width = self._length if before is None else before.columns.shape[1]
        staying = self._filled(width, device)
        picked: list[StagePicks] = []
        for item, scores in zip(self._items, self._scores, strict=True):
            keep, prompt = item.counts[place], item.placed.prompt
            columns = item.columns.to(device)
            if keep == len(columns):
                picks = StagePicks(torch.arange(keep, device=device))
            else:
                row = states[prompt * self._repeats].detach()
                picks = self._method.pick(scores, keep, _at(row, columns))
            staying[prompt, columns] = False
            staying[prompt, columns[picks.kept]] = True
            self._lengths[prompt] -= len(columns) - keep
            picked.append(picks)
        step = ShortPrompt.of(staying, max(self._lengths), self._placed.padded_right)
        moved = torch.zeros(prompts, width, dtype=torch.int64, device=device)
        places = torch.arange(step.length, device=device).expand(prompts, -1)
        moved = moved.scatter(1, step.columns, places)
        merged = []
        for item, picks in zip(self._items, picked, strict=True):
            of_prompt, columns = moved[item.placed.prompt], item.columns.to(device)
            after = of_prompt[columns[picks.kept]]
            if picks.merge is not None:
                merged.append(Merged(item.placed.prompt, columns, after, picks.kept, picks.merge))
            item.tokens = item.tokens.to(device)[picks.kept]
            item.columns, item.text = after, of_prompt[item.text.to(device)]
        columns = step.columns if before is None else before.columns.gather(1, step.columns)
        padded = len(set(self._lengths)) > 1
        return Behind(stage.layer, columns, step.valid, padded, step, tuple(merged))

    def _filled(self, width: int, device: torch.device) -> Tensor:
        """Return BoolTensor [B, width], False where the prompts are filled up now."""
        lengths = torch.tensor(self._lengths)[:, None]
        places = torch.arange(width)
        real = places < lengths if self._placed.padded_right else places >= width - lengths
        return to_device(real, device)


def _at(row: Tensor, columns: Tensor) -> Callable[[], Tensor]:
    """Return a function that reads hidden states when a method asks for them."""
    return lambda: row[columns.to(row.device)]
