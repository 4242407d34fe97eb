"""What `tokenprune advise` says of the costs: which part rules, what the limit is, what pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenprune_eval.advise.costs import WORTH, Costs, Row
from tokenprune_eval.advise.memory import BLOCK, Held
from tokenprune_eval.shared.tables import percent, three_digits

_MEBIBYTE = 2**20

_RULES = {
    "encoding": "The vision tower reads every patch whatever is kept, so pruning saves nothing of "
    "it; a smaller picture does.",
    "prefill": "It is what pruning shortens.",
    "decoding": "A decoding step reads all weights once for one token; a shorter cache saves "
    "little of it.",
}


def seconds(value: float) -> str:
    """Return seconds with their unit."""
    return f"{three_digits(value)} s"


def share(value: float) -> str:
    """Return a share in whole per cent."""
    return f"{percent(value, 0)} %"


def named(row: Row) -> str:
    """Return what a row is called in a sentence."""
    return f"{row.method} at keep {row.keep}"


def advice(costs: Costs) -> list[str]:
    """Return the sentences under the table, the most important first.

    Parameters
    ----------
    costs
        Of one kind of request.
    """
    if (row := costs.contradiction) is not None:
        return [_split(costs), _contradicts(costs, row)]
    return [_split(costs), _limit(costs), *_pays(costs), *_slower(costs), *_resized(costs)]


def _split(costs: Costs) -> str:
    shares = costs.shares
    parts = ", ".join(f"{name} {share(part)}" for name, part in shares.items())
    return (
        f"Unpruned, a request takes {seconds(costs.unpruned.total)}: {parts}. "
        f"The largest part is {costs.largest}. {_RULES[costs.largest]}"
    )


def _contradicts(costs: Costs, row: Row) -> str:
    return (
        f"These times contradict each other: with {row.tokens:,.0f} visual tokens "
        f"{share(row.at_most or 0.0)} would be saved at most, and with {costs.limit.tokens:,.0f} "
        f"{share(costs.limit.saved)}. Something else kept the machine busy, and nothing follows "
        "from the table. Measure again when the machine is idle, or with more --seconds."
    )


def _limit(costs: Costs) -> str:
    limit = costs.limit
    if limit.saved <= 0:
        return (
            "The limit: with one token of each image, crop or video, and a selection that costs "
            "nothing, a request takes no less. Nothing can be saved."
        )
    return (
        "The limit: with one token of each image, crop or video, and a selection that costs "
        f"nothing, {share(limit.saved)} of the time is saved (x{limit.speed_up:.2f}); of the time "
        f"to the first token {share(max(0.0, costs.first_token_limit))}."
    )


def _pays(costs: Costs) -> list[str]:
    lines = []
    if not costs.can_pay:
        said = "Pruning cannot pay here: "
        if costs.noise > WORTH:
            said = "As far as times tell that vary so much, pruning cannot pay here: "
        lines.append(said + "; ".join(_reasons(costs)) + ".")
        if costs.first_token_limit >= WORTH and "decoding" in costs.reasons:
            lines.append(
                "It can shorten the time to the first token, and with fewer new tokens "
                "(--new-tokens) that is more of the whole."
            )
    best = costs.best
    if best is None:
        return lines
    if best.saved <= costs.noise:
        lines.append(
            "No method and budget measured saves time beyond the noise: the best is "
            f"{named(best)} with {share(best.saved)}."
        )
    else:
        lines.append(
            f"The largest saving measured is {share(best.saved)} (x{best.speed_up:.2f}): "
            f"{named(best)}."
        )
    return lines


def _reasons(costs: Costs) -> list[str]:
    parts, shares = costs.parts, costs.shares
    full, least = parts.full, parts.least
    text: dict[str, Callable[[], str]] = {
        "tower": lambda: f"the vision tower takes {share(shares['encoding'])} of the time",
        "decoding": lambda: (
            f"decoding {parts.new_tokens:,} tokens takes {share(shares['decoding'])} of it"
        ),
        "few": lambda: (
            f"only {full.visual:,.0f} of the prompt's {full.prompt:,.0f} tokens are visual"
        ),
        "short": lambda: (
            f"the prompt is short, and reading {full.prompt:,.0f} tokens takes "
            f"x{full.prefill / least.prefill:.2f} as long as reading {least.prompt:,.0f}"
        ),
    }
    said = [text[reason]() for reason in costs.reasons]
    return said or [f"prefill is {share(shares['prefill'])} of the time"]


def _slower(costs: Costs) -> list[str]:
    """Return a sentence for each method that is slower than not pruning at some budget."""
    lines = []
    slower: dict[str, list[Row]] = {}
    for row in costs.pruned:
        if row.saved < -costs.noise:
            slower.setdefault(row.method, []).append(row)
    for method, rows in slower.items():
        worst = min(rows, key=lambda row: row.saved)
        keeps = ", ".join(str(row.keep) for row in rows)
        saves = _model_saves(costs, worst)
        less = f"get {seconds(saves)} shorter" if saves > 0 else "get no shorter"
        lines.append(
            f"{method} is slower than not pruning at keep {keeps}: at {worst.keep} gathering and "
            f"selecting take {seconds(worst.select + worst.encode - costs.unpruned.encode)}, and "
            f"prefill and decoding {less}."
        )
    return lines


def _model_saves(costs: Costs, row: Row) -> float:
    """Return by how many seconds prefill and decoding are shorter."""
    whole = costs.unpruned
    return whole.prefill + whole.decode - row.prefill - row.decode


def _resized(costs: Costs) -> list[str]:
    resized, best = costs.best_resized, costs.best
    saved = 0.0 if best is None else max(best.saved, 0.0)
    if resized is None or resized.saved <= saved + costs.noise:
        return []
    return [
        f"Making the picture smaller saves more: {share(resized.saved)} with {named(resized)}, as "
        "the tower reads fewer patches too."
    ]


def caveats(costs: Costs) -> list[str]:
    """Return what the numbers leave open."""
    noise = costs.parts.noise
    said = (
        "Turns were too few to tell the noise, and differences of less than "
        f"{percent(costs.noise, 0)} % are taken for it. Give more --seconds."
        if noise is None
        else f"By how requests varied from turn to turn, differences of less than {percent(noise)} "
        "% mean nothing."
    )
    return [said, "Accuracy is not measured here; `tokenprune eval` does, resize included."]


def in_vllm(costs: Costs, held: Held | None, keeps: Sequence[int | float]) -> list[str]:
    """Return what of this holds for vLLM, and how many more requests its cache has room for.

    Parameters
    ----------
    costs
        Of one kind of request.
    held
        Bytes of keys and values by number of tokens; None where the config does not tell.
    keeps
        The budgets.
    """
    lines = [
        "In vLLM a request has the same parts: the tower reads every patch there too, selecting is "
        "paid once for each image, and prefill and decoding read as many tokens fewer. Which part "
        "is the largest transfers roughly, as kernels differ; the seconds do not.",
        "What does not transfer is batching: a server decodes many requests in one step and reads "
        "the weights once for all, and the prefill of one delays the others. There the room that "
        "keys and values leave counts as well.",
    ]
    if held is None:
        return [*lines, "How much room they take is not known from this model's config."]
    new = costs.parts.new_tokens
    whole = held.bytes_of(costs.parts.full.prompt + new)
    if whole == 0:
        return [*lines, "This model keeps no keys and values that grow with the prompt."]
    parts = []
    for keep in keeps:
        read = costs.parts.budgets[keep]
        bytes_ = held.bytes_of(read.prompt + new)
        parts.append(f"{bytes_ / _MEBIBYTE:.2f} MiB at keep {keep} (x{whole / bytes_:.2f})")
    return [
        *lines,
        "Computed from the config, not measured: keys and values take "
        f"{held.per_token / 1024:.2f} KiB a token in {held.dtype}, and {whole / _MEBIBYTE:.2f} MiB "
        f"for a request of {costs.parts.full.prompt:,.0f} + {new:,} tokens in blocks of {BLOCK}; "
        f"{', '.join(parts)}. The factors say how many times as many requests fit into one cache.",
    ]
