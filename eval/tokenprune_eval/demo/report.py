"""report.html: one file with everything in it, made from a run's results."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import ImageStat
from torch import Tensor

from tokenprune.media.images import load_image
from tokenprune_eval.data.question import Question
from tokenprune_eval.demo.preset import EASY_VQA, ORACLE, SCENES
from tokenprune_eval.demo.results import Results, Row
from tokenprune_eval.demo.runner import EXAMPLE_KEEP, Example, Panel
from tokenprune_eval.results.drawing import BASELINES, DARK_VEIL, LIGHT_VEIL, style_of
from tokenprune_eval.results.plots import cost_plot
from tokenprune_eval.results.records import UNPRUNED, Seconds, variant
from tokenprune_eval.results.statistics import Accuracy

HEADLINE_KEEP = 0.25

_ABOUT_SETS = {
    SCENES: (
        "Scenes",
        "Three to five small coloured items on a dimmed photograph, and questions about them: "
        "which item is red, what colour is the 7, where, is there, how many. The answer is to be "
        "seen in a few tokens of the image, so this set shows what a method lets go.",
    ),
    EASY_VQA: (
        "easy-VQA",
        "One big shape an image and questions about it, a published set. The encoder spreads the "
        "shape over every token, so even a few tokens drawn at random hold most answers; most of "
        "these are yes or no. This set separates methods far less.",
    ),
}

_UNIFORM_REMARK = (
    " Items stand on a grid of three by three places; with eight tokens uniform's even grid is "
    "nearly the same one, so its peak there is the set's doing."
)


@dataclass(frozen=True)
class _Plotted:
    """A row as `cost_plot` draws it."""

    method: str
    variant: str
    visual_tokens: float
    of_visual_tokens: float
    accuracy: Accuracy
    seconds: Seconds = field(default_factory=Seconds)

    @classmethod
    def of(cls, row: Row) -> _Plotted:
        accuracy = Accuracy(
            correct=row.correct,
            questions=row.questions,
            share=row.accuracy,
            low=row.ci_low,
            high=row.ci_high,
        )
        way = variant(row.positions, False)
        return cls(row.method, way, row.visual_tokens, row.of_visual_tokens, accuracy)


def render(results: Results, examples: Sequence[Example]) -> str:
    """Return the report as HTML; everything that comes from data is escaped.

    Parameters
    ----------
    results
        What the run found; all sets have the same methods and budgets.
    examples
        The questions to show; their images are read.

    Returns
    -------
    str
        One HTML document that needs no other file.

    Raises
    ------
    InputFileError
        If an image cannot be read.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    source = files("tokenprune_eval.demo").joinpath("report.html.j2").read_text("utf-8")
    names = list(dict.fromkeys(row.dataset for row in results.rows))
    by_set = {name: [row for row in results.rows if row.dataset == name] for name in names}
    return environment.from_string(source).render(
        about=results.about,
        headline=_headline(by_set.get(SCENES) or by_set[names[0]]),
        sets=[_set_view(name, rows) for name, rows in by_set.items()],
        positions=_positions_view(results),
        examples=[_example_view(place, example) for place, example in enumerate(examples)],
        example_tokens=_example_tokens(results.rows),
        example_total=results.rows[0].of_visual_tokens,
    )


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.method not in (UNPRUNED, ORACLE)))


def _at(rows: Sequence[Row], method: str, keep: float) -> Row:
    return next(row for row in rows if row.method == method and row.keep == keep)


def _headline(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the row of the unpruned model, of the best method at a quarter, and of random."""
    methods = _methods(rows)
    serious = [method for method in methods if method not in BASELINES] or methods
    best = max(
        (_at(rows, method, HEADLINE_KEEP) for method in serious), key=lambda row: row.accuracy
    )
    random = _at(rows, "random", HEADLINE_KEEP) if "random" in methods else None
    return {
        "set": _ABOUT_SETS.get(rows[0].dataset, (rows[0].dataset, ""))[0],
        "unpruned": next(row for row in rows if row.method == UNPRUNED),
        "best": best,
        "random": None if random is best else random,
        "oracle": next((row for row in rows if row.method == ORACLE), None),
    }


def _set_view(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    methods = _methods(rows)
    keeps = sorted({row.keep for row in rows if row.method not in (UNPRUNED, ORACLE)}, reverse=True)
    pruned = [row for row in rows if row.method in methods and not row.unpruned]
    low, high = min(row.accuracy for row in pruned), max(row.accuracy for row in rows)
    best = {
        keep: max(_at(rows, method, keep).accuracy for method in methods)
        for keep in keeps
        if keep != 1.0
    }
    title, description = _ABOUT_SETS.get(name, (name, ""))
    # Every method's row of all tokens is the unpruned one again.
    plotted = [_Plotted.of(row) for row in rows if row.method == UNPRUNED or not row.unpruned]
    return {
        "name": name,
        "title": title,
        "description": description,
        "remark": _UNIFORM_REMARK if name == SCENES and "uniform" in methods else "",
        "questions": rows[0].questions,
        "plot": cost_plot(plotted, "visual_tokens"),
        "narrow_plot": cost_plot(plotted, "visual_tokens", narrow=True),
        "plot_text": _plot_text(title, rows, keeps),
        "budgets": [_at(rows, methods[0], keep) for keep in keeps],
        "methods": [
            {
                "name": method,
                "color": style_of(method, methods).color,
                "baseline": method in BASELINES,
                "cells": [
                    {
                        "row": (row := _at(rows, method, keep)),
                        "best": row.accuracy == best.get(keep),
                        "shade": f"{0.04 + 0.4 * _between(row.accuracy, low, high):.2f}",
                        "evidence_shade": f"{0.04 + 0.4 * (row.evidence_kept or 0.0):.2f}",
                        "sooner": rows[0].first_token_ms / row.first_token_ms,
                    }
                    for keep in keeps
                ],
            }
            for method in methods
        ],
        "oracle": next((row for row in rows if row.method == ORACLE), None),
        "has_evidence": any(row.evidence_kept is not None for row in rows),
        "costs": [_cost_view(rows, keep) for keep in keeps],
        "encode_ms": rows[0].encode_ms,
        "types": list(rows[0].by_type),
        "by_type": [
            next(row for row in rows if row.method == UNPRUNED),
            *(_at(rows, method, HEADLINE_KEEP) for method in methods),
            *(row for row in rows if row.method == ORACLE),
        ],
    }


def _between(value: float, low: float, high: float) -> float:
    return 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))


def _plot_text(title: str, rows: Sequence[Row], keeps: Sequence[float]) -> str:
    """Return what the plot shows, for those who cannot see it."""
    lines = [
        f"{method}: "
        + ", ".join(
            f"{100 * row.accuracy:.0f} % with {row.visual_tokens:g} tokens"
            for row in (_at(rows, method, keep) for keep in keeps)
        )
        for method in _methods(rows)
    ]
    return f"{title}: right answers by visual tokens. " + "; ".join(lines) + "."


def _cost_view(rows: Sequence[Row], keep: float) -> dict[str, Any]:
    """Return what is the same for every method with as many tokens."""
    at = [row for row in rows if row.keep == keep and row.method not in (UNPRUNED, ORACLE)]
    return {
        "tokens": at[0].visual_tokens,
        "prefill_ms": at[0].prefill_ms,
        "peak_memory_mib": statistics.median(row.peak_memory_mib for row in at),
    }


def _positions_view(results: Results) -> dict[str, Any] | None:
    """Return for each method and budget the main row and the one with the other positions."""
    others = results.other_positions
    if not others:
        return None
    main = {(row.dataset, row.method, row.keep): row for row in results.rows}
    pairs = [(main[row.dataset, row.method, row.keep], row) for row in others]
    pruned = [pair for pair in pairs if pair[0].method != ORACLE]
    return {
        "title": _ABOUT_SETS.get(others[0].dataset, (others[0].dataset, ""))[0],
        "names": [pairs[0][0].positions, others[0].positions],
        "tokens": list(dict.fromkeys(row.visual_tokens for row, _ in pruned)),
        "methods": {
            method: [pair for pair in pruned if pair[0].method == method]
            for method in dict.fromkeys(row.method for row, _ in pruned)
        },
        "oracle": next((pair for pair in pairs if pair[0].method == ORACLE), None),
    }


def _example_tokens(rows: Sequence[Row]) -> int:
    return round(_at(rows, _methods(rows)[0], EXAMPLE_KEEP).visual_tokens)


def _example_view(place: int, example: Example) -> dict[str, Any]:
    picture = load_image(example.question.path)
    width, height = picture.size
    return {
        "id": f"picture-{place}",
        "set": _ABOUT_SETS.get(example.dataset, (example.dataset, ""))[0],
        "question": example.question,
        "width": width,
        "height": height,
        "uri": _image_uri(picture),
        # The veil has to differ from the picture.
        "veil": DARK_VEIL if ImageStat.Stat(picture.convert("L")).mean[0] > 150 else LIGHT_VEIL,
        "boxes": [
            {"x": left, "y": top, "width": right - left, "height": bottom - top}
            for left, top, right, bottom in example.question.evidence
        ],
        "line": f"{max(width, height) / 110:.2f}",
        "panels": [
            _panel_view(panel, example.question, example.grid, width, height)
            for panel in example.panels
        ],
    }


def _panel_view(
    panel: Panel, question: Question, grid: tuple[int, int], width: int, height: int
) -> dict[str, Any]:
    names = {UNPRUNED: "all tokens", ORACLE: "oracle"}
    count = int(panel.kept.sum())
    return {
        "name": names.get(panel.method, panel.method),
        "answer": panel.answer or "(nothing)",
        "right": panel.answer == question.answer.lower(),
        "kept": count,
        "tokens": f"{count} token" + ("" if count == 1 else "s"),
        "dimmed": _cells(~panel.kept, grid, width, height),
    }


def _cells(mask: Tensor, grid: tuple[int, int], width: int, height: int) -> str:
    """Return an SVG path over the cells of a mask [N], one rectangle for each run in a row."""
    rows, columns = grid
    tall, wide = height / rows, width / columns
    parts = []
    for row, line in enumerate(mask.view(rows, columns).tolist()):
        start = 0
        while start < columns:
            if not line[start]:
                start += 1
                continue
            end = start
            while end < columns and line[end]:
                end += 1
            parts.append(
                f"M{start * wide:g} {row * tall:g}h{(end - start) * wide:g}v{tall:g}"
                f"h{(start - end) * wide:g}z"
            )
            start = end
    return "".join(parts)


def _image_uri(picture: Any) -> str:
    """Return a PIL image as a data URI: small ones as they are, others as JPEG."""
    stream = io.BytesIO()
    kind = "png" if max(picture.size) <= 96 else "jpeg"
    picture.save(stream, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")
