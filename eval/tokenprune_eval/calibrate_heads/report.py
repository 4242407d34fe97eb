"""What `tokenprune calibrate-heads` prints about a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune_eval.shared.tables import percent, plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tokenprune.masks.heads import HeadCategories
    from tokenprune.masks.sinks import Sinks
    from tokenprune_eval.calibrate_heads.measure import HeadCoverage

_ALPHAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""What else --alpha might have been."""


def print_report(
    console: Console,
    measured: HeadCoverage,
    heads: HeadCategories,
    alpha: Sequence[float] | None,
    file: Path,
) -> None:
    """Print the tables and what is said about them.

    Parameters
    ----------
    console
        Where.
    measured, heads
        What was measured, and the categories that were chosen.
    alpha
        As it was given; None for the default.
    file
        Where the heads are.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say("")
    console.print(_layers(heads))
    say("")
    console.print(_sweep(measured, heads, alpha))
    say("")
    for line in _about_sinks(heads, measured.sinks):
        say(line)
    say(f"attention held, the median over heads: {_held(measured)}")
    say(
        f"density: {percent(heads.density)} % of the causal blocks of {heads.block} are computed, "
        f"the mean over {heads.prompts} prompts"
    )
    if all(bool((one.density >= one.density[:, -1:]).all()) for one in measured.prompts):
        say(
            f"no mask skips a block of {heads.block} in these prompts, whatever --alpha is: give "
            "larger or more images, or a smaller --block"
        )
    elif heads.counts()["dense"] == heads.model.heads * heads.model.layers:
        say("all heads are dense, so nothing is skipped: a lower --alpha takes more masks")
    say(f"the heads are in {file}; use them with: tokenprune_hf.sparse(model, {str(file)!r})")


def _held(measured: HeadCoverage) -> str:
    import torch

    from tokenprune.masks.patterns import CATEGORIES

    heads = torch.stack([one.held for one in measured.prompts]).mean(dim=0).flatten(0, 1)
    middle = heads.quantile(0.5, dim=0).tolist()[:-1]
    named = zip(CATEGORIES[:-1], middle, strict=True)
    return ", ".join(f"{name} {percent(share)} %" for name, share in named)


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layers(heads: HeadCategories) -> Table:
    from collections import Counter

    from tokenprune.masks.patterns import CATEGORIES

    table = _table("heads of each category", "layer", "alpha", *CATEGORIES)
    shares = heads.thresholds.alpha
    for number, (layer, share) in enumerate(zip(heads.categories, shares, strict=True)):
        found: Any = Counter(layer)
        cells = (str(found[name]) if found[name] else "" for name in CATEGORIES)
        table.add_row(str(number), f"{share:.3g}", *cells)
    table.add_section()
    table.add_row("all", "", *(str(count) for count in heads.counts().values()), style="bold")
    return table


def _sweep(measured: HeadCoverage, heads: HeadCategories, alpha: Sequence[float] | None) -> Table:
    """Return what other alphas would have given; the measurement is the same."""
    from dataclasses import replace

    from tokenprune.masks.patterns import CATEGORIES

    table = _table("other alphas, from the same measurement", "alpha", "density, %", *CATEGORIES)
    table.add_column("", no_wrap=True)
    own = f"{heads.thresholds.alpha[0]:.3g}"
    if alpha is not None and len(set(alpha)) > 1:
        own = f"{alpha[0]:.3g} to {alpha[-1]:.3g}"
    layers = heads.model.layers
    rows = [
        (share, f"{share:.3g}", measured.choose(replace(heads.thresholds, alpha=(share,) * layers)))
        for share in _ALPHAS
        if f"{share:.3g}" != own
    ]
    rows.append((sum(heads.thresholds.alpha) / layers, own, heads))
    for _, name, one in sorted(rows, key=lambda row: row[0]):
        cells = (name, percent(one.density), *map(str, one.counts().values()))
        if one is heads:
            table.add_row(*cells, "chosen", style="bold green")
        else:
            table.add_row(*cells)
    return table


def _about_sinks(heads: HeadCategories, sinks: Sinks) -> Iterator[str]:
    """Yield what was found, and what could not be looked for."""
    if heads.sinks:
        places = (f"{one}" if one < 0 else f"+{one}" for one in heads.sinks)
        yield f"sinks in an image (+0 its first token, -1 its last): {', '.join(places)}"
    else:
        yield "sinks in an image: no place is one in half of the images"
    if not sinks.attended_in:
        yield "attention by later images could not be compared: images of 10 tokens or fewer"
    if not sinks.can_be_massive:
        yield (
            f"massive activations could not be looked for: hidden states of {sinks.width} numbers "
            f"cannot be {sinks.tau:g} times their root mean square"
        )
    elif not sinks.dimensions:
        yield "massive activations: none, in the first token and at the ends of images"
    elif not sinks.tokens:
        yield f"massive activations: dimensions {_list(sinks.dimensions)}; none inside images"
    else:
        share = percent(sinks.covered / sinks.tokens)
        yield (
            f"massive activations: dimensions {_list(sinks.dimensions)}; {sinks.tokens} tokens of "
            f"{sinks.images} images, {share} % of them at these places"
        )


def _list(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
