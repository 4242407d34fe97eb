"""Deeper tiny models, and what methods inside the language model do to them, written out by hand.

Nothing is left out here: every layer reads the whole prompt, and from a stage's layer on an
additive mask hides what has left. Attention is eager, and what a token is worth is read off maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.hf.models import IMAGE, TINY, VIDEO, Tiny
from tokenprune.inside.base import InsideMethod

DEPTH = 8


def deeper(name: str, depth: int = DEPTH, **text: Any) -> Tiny:
    """Return a tiny model with more layers, and with other values in its text config."""
    tiny = TINY[name]

    def build() -> Any:
        config = tiny.build()
        of_text = config.get_text_config()
        kinds = getattr(of_text, "layer_types", None)
        of_text.num_hidden_layers = depth
        if kinds:
            of_text.layer_types = [kinds[number % len(kinds)] for number in range(depth)]
        for option, value in text.items():
            setattr(of_text, option, value)
        return config

    return dataclasses.replace(tiny, build=build)


def decoder(model: Any) -> Any:
    """Return the language model's decoder."""
    found = getattr(model.model, "language_model", getattr(model.model, "text_model", None))
    return getattr(found, "model", found)


@dataclass
class ByHand:
    """One prompt without padding, with what has left of it.

    Attributes
    ----------
    hidden
        Layer -> columns that this layer, and all behind it, do not see.
    replaced
        Layer -> column -> the columns whose mean goes into this layer in its place.
    """

    model: Any
    hidden: dict[int, list[int]] = field(default_factory=dict)
    replaced: dict[int, dict[int, list[int]]] = field(default_factory=dict)

    def run(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output with hidden columns, attention maps and states."""
        with self._hooks(), torch.no_grad(), eager(self.model):
            return self.model(
                **inputs, output_attentions=True, output_hidden_states=True, use_cache=False
            )

    def answer(self, inputs: dict[str, Any], new: int) -> list[int]:
        """Return the tokens of a greedy answer, each by a run of everything before it."""
        inputs, found = dict(inputs), []
        suppressed = self.model.generation_config.suppress_tokens
        for _ in range(new):
            logits = self.run(inputs).logits[0, -1].clone()
            logits[suppressed] = -torch.inf
            found.append(int(logits.argmax()))
            inputs = longer(inputs, found[-1])
        return found

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def hook(number: int) -> Callable[..., Any]:
            def before(_layer: object, args: Any, kwargs: dict[str, Any]) -> Any:
                states = args[0].clone()
                for column, members in self.replaced.get(number, {}).items():
                    states[:, column] = args[0][:, members].mean(dim=1)
                columns = [c for layer, own in self.hidden.items() if layer <= number for c in own]
                mask = kwargs["attention_mask"].clone()
                mask[..., columns] = torch.finfo(mask.dtype).min
                return (states, *args[1:]), {**kwargs, "attention_mask": mask}

            return before

        handles = [
            layer.register_forward_pre_hook(hook(number), with_kwargs=True)
            for number, layer in enumerate(decoder(self.model).layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let a model make its attention maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def longer(inputs: dict[str, Any], token: int) -> dict[str, Any]:
    """Return a prompt with one token of text more."""
    fill = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
    return {
        name: torch.cat([value, torch.full((len(value), 1), fill[name])], dim=1)
        if name in fill
        else value
        for name, value in inputs.items()
    }


def visual_runs(inputs: dict[str, Any]) -> list[list[int]]:
    """Return the columns of each run of placeholders in a prompt."""
    runs: list[list[int]] = []
    for column, token in enumerate(inputs["input_ids"][0].tolist()):
        if token in (IMAGE, VIDEO):
            if runs and runs[-1][-1] == column - 1:
                runs[-1].append(column)
            else:
                runs.append([column])
    return runs


def in_attention_order(scores: Tensor, keep: int) -> list[int]:
    """Return the indices of the highest scores, highest first; the lowest index wins a tie."""
    ranked = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    return ranked[:keep]


def leave_out(
    model: Any,
    inputs: dict[str, Any],
    method: InsideMethod,
    keep: int,
    clusters: Callable[[Tensor, int], tuple[list[int], list[list[int]]]] | None = None,
    runs: list[list[int]] | None = None,
) -> tuple[ByHand, list[list[int]]]:
    """Leave tokens out of one prompt as a method does, stage by stage.

    Parameters
    ----------
    model, inputs
        One prompt without padding.
    method
        Says where, and how many stay.
    keep
        Of each item.
    clusters
        For SparseVLM: states [m, D] and a number -> centres and the members of each.
    runs
        The columns of each item; None where each run of placeholders is one.

    Returns
    -------
    tuple
        The prompt with what has left hidden, and which of each item's tokens are left.
    """
    every = visual_runs(inputs)
    runs = every if runs is None else runs
    by_hand = ByHand(model)
    length = inputs["input_ids"].shape[1]
    visual = {column for run in every for column in run}
    left = [list(range(len(run))) for run in runs]
    plain = by_hand.run(inputs)
    for number, stage in enumerate(method.stages(len(decoder(model).layers))):
        output = by_hand.run(inputs)
        maps = output.attentions[stage.ranked_at][0].mean(dim=0)
        for item, run in enumerate(runs):
            columns = [run[token] for token in left[item]]
            asking = [length - 1]
            if method.asked == "text":
                text = [c for c in range(run[-1] + 1, length) if c not in visual]
                states = plain.hidden_states[0][0]
                shares = (states[run] @ states[text].T).softmax(dim=-1).mean(dim=0)
                raters = [c for c, r in zip(text, shares, strict=True) if r > shares.mean()]
                asking = raters or text
            scores = maps[asking][:, columns].mean(dim=0)
            count = method.counts(len(run), keep)[number]
            if count == len(columns):
                continue
            if clusters is None:
                stays = in_attention_order(scores, count)
            else:
                order = in_attention_order(scores, len(columns))
                best, amount = split(len(columns), count)
                dropped = order[best:]
                recycled = sorted(dropped[: int(0.3 * len(dropped)) + 1])
                states = output.hidden_states[stage.layer][0][[columns[t] for t in recycled]]
                centres, members = clusters(states, amount)
                stays = [*order[:best], *(recycled[centre] for centre in centres)]
                by_hand.replaced.setdefault(stage.layer, {}).update(
                    {
                        columns[recycled[centre]]: [columns[recycled[one]] for one in own]
                        for centre, own in zip(centres, members, strict=True)
                    }
                )
            by_hand.hidden.setdefault(stage.layer, []).extend(
                column for token, column in enumerate(columns) if token not in stays
            )
            left[item] = sorted(left[item][token] for token in stays)
    return by_hand, left


def split(total: int, keep: int) -> tuple[int, int]:
    """Return how many of `keep` are best tokens, and how many are clusters of dropped ones."""
    fitting = []
    for best in range(1, keep + 1):
        dropped = total - best
        recycled = int(0.3 * dropped) + 1
        if best + int(recycled / 10) + 1 == keep:
            fitting.append(best)
    best = max(fitting, default=1)
    return best, keep - best


def peak_clusters(states: Tensor, amount: int) -> tuple[list[int], list[list[int]]]:
    """Cut states into clusters by density peaks, row by row."""
    rows = states.double()
    distance = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    total = len(rows)
    density = [
        float((-distance[i].sort().values[:amount].square().mean()).exp()) for i in range(total)
    ]
    worth = []
    for i in range(total):
        denser = [float(distance[i, j]) for j in range(total) if density[j] > density[i]]
        worth.append(min(denser, default=float(distance.max())) * density[i])
    centres = sorted(in_attention_order(torch.tensor(worth, dtype=torch.float64), amount))
    members: list[list[int]] = [[] for _ in centres]
    for i in range(total):
        own = centres.index(i) if i in centres else int(distance[i, centres].argmin())
        members[own].append(i)
    return centres, members
