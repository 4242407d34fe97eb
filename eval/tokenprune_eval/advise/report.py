"""What `tokenprune advise` prints and writes: the head, the table, the sentences, the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenprune_eval.advise.costs import UNPRUNED, Costs, Row
from tokenprune_eval.advise.words import advice, caveats, in_vllm
from tokenprune_eval.shared.tables import percent, plain_table, three_digits

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tokenprune_eval.advise.measure import Measured
    from tokenprune_eval.advise.memory import Held

FORMAT = 1
"""Of the JSON; it rises when a field changes its meaning or goes."""

NOTES = (
    "Seconds for each request, medians. encode: tower and projector, with what the method gathers "
    "there; select: scoring and choosing, with what the method reads of the language model; "
    "prefill: until the first new token; decode: the others. at most: share of the unpruned time "
    "that would be saved if gathering and selecting cost nothing; saved: what is saved, below 0 "
    "where it takes longer. limit: one token of each image, crop or video."
)

_NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class About:
    """What was measured, and on what.

    Attributes
    ----------
    model
        Name, architecture, parameters, dtype, device, attention.
    machine, versions
        See `tokenprune_eval.shared.machine`.
    request
        What a request is: ``media`` in words, ``visual_tokens``, ``prompt_tokens``, ``new_tokens``
        and ``batch``.
    threads
        Of torch, on the CPU.
    """

    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    request: Mapping[str, Any]
    threads: int

    def lines(self) -> list[str]:
        """Return the head, in words."""
        model, machine, request = self.model, self.machine, self.request
        on_cpu = model["device"] == "cpu"
        where = f"{machine['processor']}, {self.threads} threads" if on_cpu else machine["gpu"]
        releases = ", ".join(
            f"{name} {self.versions[name]}"
            for name in ("tokenprune-vlm", "torch", "transformers")
            if name in self.versions
        )
        text = request["prompt_tokens"] - request["visual_tokens"]
        each = "" if request["batch"] == 1 else f", {request['batch']} requests at once"
        return [
            f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:,.1f} M "
            f"parameters, {model['dtype']}, attention {model['attention']}",
            f"{where}; {releases}",
            f"a request: {request['media']}, {request['visual_tokens']:,} visual and {text:,} "
            f"other tokens, {request['new_tokens']:,} new tokens{each}",
        ]


def table(costs: Costs) -> Table:
    """Return a line for each method and budget, and the limit."""
    made = plain_table()
    for name in ("method", "keep"):
        made.add_column(name, no_wrap=True)
    for name in (
        *("tokens", "encode", "select", "prefill", "decode", "total"),
        *("at most, %", "saved, %"),
    ):
        made.add_column(name, justify="right", no_wrap=True)
    for row in (*costs.rows, costs.limit):
        made.add_row(*cells(row))
    return made


def cells(row: Row) -> list[str]:
    """Return what stands in a row."""
    keep = "all" if row.method == UNPRUNED else str(row.keep)
    seconds = (row.encode, row.select, row.prefill, row.decode, row.total)
    at_most = _NOTHING if row.at_most is None else percent(row.at_most)
    saved = _NOTHING if row.method == UNPRUNED else f"{100 * row.saved:+.1f}"
    return [
        *(row.method, keep, f"{row.tokens:,.0f}"),
        *(three_digits(value) for value in seconds),
        *(at_most, saved),
    ]


def show(
    console: Console, about: About, measured: Measured, costs: Costs, held: Held | None
) -> None:
    """Print everything."""

    def say(text: str, style: str = "") -> None:
        console.print(text, highlight=False, markup=False, style=style)

    for line in about.lines():
        say(line)
    say(how_often(measured))
    console.print()
    console.print(table(costs))
    say(NOTES, "dim")
    console.print()
    for line in (*advice(costs), *measured.left_out, *caveats(costs)):
        say(line)
    console.print()
    for line in in_vllm(costs, held, list(costs.parts.budgets)):
        say(line)


def how_often(measured: Measured) -> str:
    """Return how often parts were measured, and what the processor takes besides."""
    turns = "1 turn" if measured.turns == 1 else f"{measured.turns} turns"
    warm = (
        "after one that warmed up"
        if measured.warmed_up
        else "without one that warmed up, for lack of time: give more --seconds"
    )
    return (
        f"medians of {turns}, {warm}; the processor takes {three_digits(measured.prepare)} s "
        "besides, which is not counted"
    )


def as_json(
    about: About,
    measured: Measured,
    costs: Costs,
    held: Held | None,
    options: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return everything, and every single time, as JSON."""
    parts = asdict(measured.parts)
    # JSON's keys are text, which would not tell 1 from 1.0.
    parts["budgets"] = [
        {"keep": keep, **asdict(read)} for keep, read in measured.parts.budgets.items()
    ]
    new = measured.parts.new_tokens
    content = {
        "format": FORMAT,
        **asdict(about),
        "options": options,
        "turns": measured.turns,
        "warmed_up": measured.warmed_up,
        "prepare": measured.prepare,
        "parts": parts,
        "rows": [_row(row) for row in (*costs.rows, costs.limit)],
        "contradicts_itself": costs.contradiction is not None,
        "can_pay": costs.can_pay,
        "reasons": [] if costs.can_pay else costs.reasons,
        "advice": [*advice(costs), *caveats(costs)],
        "left_out": measured.left_out,
        "kv_cache": None
        if held is None
        else {
            "bytes_per_token": held.per_token,
            "unpruned": held.bytes_of(measured.parts.full.prompt + new),
            "budgets": [
                {"keep": keep, "bytes": held.bytes_of(read.prompt + new)}
                for keep, read in measured.parts.budgets.items()
            ],
        },
        "runs": measured.runs,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "first_token": row.first_token,
        "total": row.total,
        "at_most": row.at_most,
        "saved": row.saved,
    }


def about_of(
    name: str,
    model: Any,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    request: Mapping[str, Any],
    threads: int,
) -> About:
    """Return what is said of a loaded model and its machine."""
    return About(
        {
            "name": name,
            "architecture": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.config._attn_implementation,
        },
        machine,
        versions,
        request,
        threads,
    )
