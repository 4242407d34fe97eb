"""report.html: one file with everything in it, made from a run's results."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from tokenprune.errors import TokenPruneError
from tokenprune.media.images import load_image
from tokenprune.media.video import read_video
from tokenprune_eval.data.question import LETTERS
from tokenprune_eval.results import words
from tokenprune_eval.results.drawing import BASELINES, DARK_VEIL, LIGHT_VEIL
from tokenprune_eval.results.plots import cost_plot, curves, styles
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.scores import FIGURES, ScoreDifference
from tokenprune_eval.results.statistics import Accuracy, Paired
from tokenprune_eval.results.summary import DataInfo, GivenAnswer, Loss, QuestionInfo, Results, Row

THUMBNAIL = 160
"""Longer side of a thumbnail, in pixels."""

HEADLINE_SHARE = 0.25
"""The headline and the table by type show the budget nearest to this share of visual tokens."""

_MOST_CUT = 0.05
"""Share of cut answers up to which a condition may be in the headline."""

_FRAMES_TO_SEARCH = 64
_LONGEST = 300


def render(results: Results) -> str:
    """Return the report as HTML; everything that comes from data is escaped.

    Parameters
    ----------
    results
        What a run found. The pictures and videos of its losses are read; one that cannot be read
        is replaced by a note that says why.

    Returns
    -------
    str
        One HTML document that needs no other file and no network.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters.update(percent=words.percent, number=words.number)
    source = files("tokenprune_eval.results").joinpath("report.html.j2").read_text("utf-8")
    sets = [_set_view(results, one) for one in results.data]
    answered = sum(row.answered for row in results.rows)
    errors = sum(row.errors for row in results.rows)
    return environment.from_string(source).render(
        results=results,
        questions=words.questions,
        sets=sets,
        headline=next((one["headline"] for one in sets if one["headline"]), None),
        answered=answered,
        errors=errors,
        cut=sum(row.cut for row in results.rows),
        cut_note=words.CUT,
        failed=sum(one.failed for one in results.data),
        failed_note=words.failed(sum(one.failed for one in results.data)),
        missing=sum(row.missing for row in results.rows),
        methods=list(
            dict.fromkeys(one.method for one in results.conditions if one.method != UNPRUNED)
        ),
        bundled_note=words.BUNDLED,
        losses={
            one.name: views
            for one in results.data
            if (
                views := [
                    _loss_view(loss, results)
                    for loss in results.losses
                    if loss.item.data_set == one.name
                ]
            )
        },
        settings=_flat(results.settings),
        versions=_flat(results.versions),
        machine=_flat(results.machine),
    )


# A data set -------------------------------------------------------------------------------------


def _set_view(results: Results, data: DataInfo) -> dict[str, Any]:
    name = data.name
    rows = [row for row in results.rows if row.data_set == name]
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    budgets = _budgets(rows)
    main = _nearest(budgets)
    return {
        "name": name,
        "questions": words.questions(data.questions, data.of_questions),
        "answered": any(row.answered for row in rows),
        "headline": _headline(unpruned, main),
        "plots": _plots(name, rows),
        "columns": _columns(rows),
        "rows": [_row_view(row, rows) for row in rows],
        "types": list(rows[0].by_type) if rows else [],
        "by_type": [
            {
                "rows": [*([unpruned] if unpruned else []), *of_budget],
                "tokens": _mean_tokens(of_budget),
                "keep": of_budget[0].keep,
                "main": of_budget is main,
            }
            for of_budget in budgets
        ]
        or ([{"rows": [unpruned], "tokens": None, "keep": None, "main": True}] if unpruned else []),
        "type_counts": unpruned.by_type if unpruned else {},
        "metric": words.metric_of([row.scores for row in rows if row.scores is not None]),
    }


def _budgets(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the pruned rows with the same `keep` and the main positions, most tokens first.

    Those with proportional attention are among them.
    """
    pruned = [row for row in rows if row.method != UNPRUNED]
    if not pruned:
        return []
    main = "original" if any(row.positions == "original" for row in pruned) else "compact"
    groups: dict[tuple[type, float], list[Row]] = {}
    for row in pruned:
        if row.positions == main:
            groups.setdefault((type(row.keep), row.keep), []).append(row)
    return sorted(groups.values(), key=lambda group: -(_mean_tokens(group) or 0.0))


def _mean_tokens(rows: Sequence[Row]) -> float | None:
    known = [row.visual_tokens for row in rows if row.visual_tokens is not None]
    return sum(known) / len(known) if known else None


def _nearest(budgets: Sequence[list[Row]]) -> list[Row] | None:
    """Return the budget nearest to `HEADLINE_SHARE`, by ratio."""

    def distance(group: Sequence[Row]) -> float:
        shares = [
            row.visual_tokens / row.of_visual_tokens
            for row in group
            if row.visual_tokens and row.of_visual_tokens
        ]
        return abs(math.log(sum(shares) / len(shares) / HEADLINE_SHARE)) if shares else math.inf

    known = [group for group in budgets if distance(group) < math.inf]
    return min(known, key=distance) if known else None


def _headline(unpruned: Row | None, main: Sequence[Row] | None) -> dict[str, Any] | None:
    """Return the unpruned row, the best of the main budget, and random at the same budget.

    Only conditions that are through count: the others have answered other questions. So have those
    with many answers cut off.
    """
    known = [row for row in main or () if row.accuracy is not None and _through(row)]
    if unpruned is None or unpruned.accuracy is None or not _through(unpruned) or not known:
        return None
    serious = [row for row in known if row.method not in BASELINES] or known
    best = max(serious, key=lambda row: row.accuracy.share if row.accuracy else 0.0)
    return {
        "set": best.data_set,
        "unpruned": unpruned,
        "best": best,
        "of": len(serious),
        "random": next((row for row in known if row.method == "random" and row is not best), None),
    }


def _through(row: Row) -> bool:
    return not row.missing and row.cut <= _MOST_CUT * (row.answered + row.cut)


def _plots(name: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the curves of a data set, with what they show in words."""
    made = []
    for cost, unit in (("visual_tokens", "visual tokens"), ("first_token", "s")):
        wide = cost_plot(rows, cost)  # type: ignore[arg-type]
        narrow = cost_plot(rows, cost, narrow=True)  # type: ignore[arg-type]
        if wide is None or narrow is None:
            continue
        lines = []
        unpruned = [row for row in rows if row.method == UNPRUNED]
        for key, of_key in {(UNPRUNED, ""): unpruned, **curves(rows)}.items():
            parts = [
                f"{words.percent(row.accuracy.share)} % at {value} {unit}"
                for row in of_key
                if row.accuracy
                for value in [
                    words.number(row.visual_tokens)
                    if cost == "visual_tokens"
                    else words.seconds(row.seconds.first_token)
                ]
            ]
            lines.append(f"{words.label(*key)}: {', '.join(parts) or 'not measured'}")
        title = (
            "Accuracy against visual tokens"
            if cost == "visual_tokens"
            else "Accuracy against the time to the first token, encoding and selecting included"
        )
        text = f"{name}. {title}. {'; '.join(lines)}."
        made.append({"title": title, "wide": wide, "narrow": narrow, "text": text})
    return made


_Column = tuple[str, str, str]
"""Title, what it means, and the name under which `_row_view` has its cells."""


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """Return the columns in which something stands."""
    everything: list[tuple[_Column, bool]] = [
        (("tokens", "visual tokens the language model read, mean", "tokens"), True),
        (("right, %", "share of right answers of those answered", "accuracy"), True),
        (
            ("difference", "to unpruned, in percentage points", "difference"),
            any(row.against_unpruned for row in rows),
        ),
        (
            ("p", "exact McNemar test against unpruned", "p"),
            any(row.against_unpruned for row in rows),
        ),
        (
            ("same, %", "questions answered the same as unpruned", "same"),
            any(row.against_unpruned for row in rows),
        ),
        (
            (
                "group A, %",
                "right of the questions that are right unpruned and wrong with resize at the same "
                "budget",
                "group_a",
            ),
            any(row.group_a is not None for row in rows),
        ),
        *((column, True) for column in _score_columns(rows)),
        (
            ("select, ms", "scoring and choosing tokens, median", "select"),
            any(row.seconds.select is not None for row in rows),
        ),
        (
            (
                "first token, s",
                "seconds until it, encoding and selecting included, median",
                "first",
            ),
            any(row.seconds.first_token is not None for row in rows),
        ),
        (
            (
                "speed-up",
                "seconds to the first token unpruned over those here, median over the questions of "
                "both",
                "speed_up",
            ),
            any(row.first_token_speed_up is not None for row in rows),
        ),
        (
            ("answers/s", "answers per second of work, encoding and selecting included", "rate"),
            any(row.items_per_second is not None for row in rows),
        ),
        (
            ("KV, MiB", "keys and values in the cache when the answer began, mean", "kv"),
            any(row.kv_bytes is not None for row in rows),
        ),
        (
            ("peak, MiB", "most memory held beyond the weights", "peak"),
            any(row.peak_bytes is not None for row in rows),
        ),
        (
            ("mass, %", "share of the scores on the kept tokens, mean", "mass"),
            any(row.mass_kept is not None for row in rows),
        ),
        (
            ("cut", "answers cut off before they named anything", "cut"),
            any(row.cut for row in rows),
        ),
        (
            ("at least, %", "share of right answers if all that were cut were wrong", "at_least"),
            any(row.cut for row in rows),
        ),
        (("errors", "questions without an answer", "errors"), any(row.errors for row in rows)),
        (("open", "questions not yet asked", "open"), any(row.missing for row in rows)),
    ]
    return [column for column, shown in everything if shown]


def _score_columns(rows: Sequence[Row]) -> list[_Column]:
    """Return the columns of the data set's own measure and its further figures."""
    scores = [row.scores for row in rows if row.scores is not None]
    columns: list[_Column] = []
    if metric := words.metric_of(scores):
        columns = [
            (f"{metric}, %", words.metric_meaning(metric), "score"),
            (f"{metric} difference", "to unpruned, in points", "score_difference"),
        ]
    columns += [
        (words.figure_title(name), FIGURES[name].meaning, name)
        for name in words.figures_shown(scores)
    ]
    return columns


def _row_view(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    style = styles(rows).get((row.method, row.variant))
    pair = row.against_unpruned

    def cell(value: float | None, text: str, below: str = "") -> dict[str, Any]:
        return {"value": value, "text": text, "below": below}

    def share(right: Accuracy | None) -> dict[str, Any]:
        if right is None:
            return cell(None, words.percent(None))
        interval = f"{words.percent(right.low)}{words.NOTHING}{words.percent(right.high)}"
        return cell(right.share, words.percent(right.share), interval)

    minus = "\N{MINUS SIGN}"

    def change(pair: Paired | ScoreDifference | None) -> dict[str, Any]:
        if pair is None:
            return cell(None, words.points(None))
        between = f"{words.points(pair.low)} to {words.points(pair.high)}"
        return cell(
            pair.difference,
            words.points(pair.difference).replace("-", minus),
            between.replace("-", minus),
        )

    def score() -> dict[str, Any]:
        if row.scores is None or row.scores.value is None:
            return cell(None, words.percent(None))
        interval = f"{words.percent(row.scores.low)}{words.NOTHING}{words.percent(row.scores.high)}"
        return cell(row.scores.value, words.percent(row.scores.value), interval)

    figures = row.scores.figures if row.scores else {}
    score_pair = row.scores.against_unpruned if row.scores else None
    pairs = {"difference": pair, "score_difference": score_pair}
    fast = row.first_token_speed_up
    return {
        "name": words.label(row.method, row.variant),
        "slower": words.slower(row.method, fast, row.answer_speed_up),
        "color": style.color if style else "#8a6d1f",
        "keep": words.keep_text(row.method, row.keep),
        "keep_value": row.keep,
        # Coloured only where the interval is on one side of zero.
        "worse": {name for name, one in pairs.items() if one is not None and one.high < 0},
        "better": {name for name, one in pairs.items() if one is not None and one.low > 0},
        "cells": {
            "tokens": cell(row.visual_tokens, words.number(row.visual_tokens)),
            "accuracy": share(row.accuracy),
            "difference": change(pair),
            "score": score(),
            "score_difference": change(score_pair),
            **{
                name: cell(figures.get(name), words.figure(name, figures.get(name)))
                for name in FIGURES
            },
            "p": cell(pair.p_value if pair else None, words.p_value(pair)),
            "same": cell(pair.agreement if pair else None, words.agreement(pair)),
            "group_a": share(row.group_a),
            "select": cell(row.seconds.select, words.milliseconds(row.seconds.select)),
            "first": cell(row.seconds.first_token, words.seconds(row.seconds.first_token)),
            "speed_up": cell(
                fast.ratio if fast else None,
                words.speed_up(fast),
                f"{fast.low:.2f}{words.NOTHING}{fast.high:.2f}"
                if fast and fast.low is not None and fast.high is not None
                else "",
            ),
            "rate": cell(row.items_per_second, words.rate(row.items_per_second)),
            "kv": cell(row.kv_bytes, words.mebibytes(row.kv_bytes)),
            "peak": cell(row.peak_bytes, words.mebibytes(row.peak_bytes)),
            "mass": cell(row.mass_kept, words.percent(row.mass_kept)),
            "cut": cell(row.cut, f"{row.cut:,}"),
            "at_least": cell(row.at_least, words.percent(row.at_least)),
            "errors": cell(row.errors, str(row.errors)),
            "open": cell(row.missing, f"{row.missing:,}"),
        },
    }


# A lost question --------------------------------------------------------------------------------


def _loss_view(loss: Loss, results: Results) -> dict[str, Any]:
    question = loss.item
    by_key = {condition.key: condition for condition in results.conditions}
    shown = by_key[loss.shown]
    keeps = sorted(
        {(type(by_key[key].keep).__name__, by_key[key].keep) for key in loss.said},
        key=lambda keep: (keep[0], -keep[1]),
    )
    names = list(dict.fromkeys((by_key[key].method, by_key[key].variant) for key in loss.said))
    answers = {
        (
            by_key[key].method,
            by_key[key].variant,
            type(by_key[key].keep).__name__,
            by_key[key].keep,
        ): said
        for key, said in loss.said.items()
    }
    return {
        "item": question,
        "right": _right_answer(question),
        "wrong": loss.wrong,
        "answered": loss.answered,
        "unpruned": _said_view(loss.unpruned, question),
        "shown": _said_view(loss.said[loss.shown], question),
        "shown_name": words.label(shown.method, shown.variant),
        "shown_keep": words.keep_text(shown.method, shown.keep),
        "tokens": loss.visual_tokens,
        "of_tokens": loss.of_visual_tokens,
        "keeps": [str(keep) for _, keep in keeps],
        "said": [
            {
                "name": words.label(*name),
                "cells": [
                    _said_view(answers[key], question)
                    if (key := (*name, *keep)) in answers
                    else None
                    for keep in keeps
                ],
            }
            for name in names
        ],
        **_picture_view(loss, bool(results.settings.get("allow_truncated"))),
    }


def _right_answer(question: QuestionInfo) -> str:
    place = LETTERS.find(question.answer) if len(question.answer) == 1 else -1
    if 0 <= place < len(question.choices):
        return f"{question.answer}: {question.choices[place]}"
    return question.answer


def _said_view(said: GivenAnswer, question: QuestionInfo) -> dict[str, Any]:
    text = " ".join((said.text or "").split())
    full = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    short = (said.choice or full) if question.choices else full
    return {"text": full or "(nothing)", "short": short or "(nothing)", "right": said.correct}


def _picture_view(loss: Loss, allow_truncated: bool) -> dict[str, Any]:
    """Return the thumbnail with its veil, or why there is none."""
    view: dict[str, Any] = {"uri": None, "note": "", "dimmed": "", "veil": "", "caption": ""}
    try:
        picture, frame, view["caption"] = _load(loss, allow_truncated)
    except TokenPruneError as error:
        return view | {"note": f"No picture: {error}"}
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    view["width"], view["height"] = picture.size
    # Pictures of a few pixels are shown as large as the others.
    view["across"] = round(THUMBNAIL * picture.width / max(picture.size))
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=82)
    view["uri"] = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    if loss.kept is None or loss.grid is None:
        return view | {"note": "Which tokens were kept was not noted."}
    frames, rows, columns = loss.grid
    if loss.item.kind == "image" and frames != 1:
        return view | {"note": "The tokens are those of several crops, which are not drawn."}
    total = frames * rows * columns
    if any(not 0 <= index < total for index in loss.kept):
        return view | {"note": "The kept tokens do not fit the grid that was noted."}
    mask = np.zeros(total, dtype=bool)
    mask[loss.kept] = True
    bright = float(np.asarray(picture.convert("L")).mean()) > 150
    return view | {
        "dimmed": _cells(~mask.reshape(loss.grid)[frame], *picture.size),
        # The veil has to differ from the picture.
        "veil": DARK_VEIL if bright else LIGHT_VEIL,
    }


def _load(loss: Loss, allow_truncated: bool) -> tuple[Image.Image, int, str]:
    """Return the picture, which row of frames in the grid it shows, and what it is.

    Raises
    ------
    TokenPruneError
        If the file cannot be read.
    """
    question = loss.item
    if question.kind == "image":
        return load_image(question.path), 0, ""
    frames = loss.grid[0] if loss.grid else 1
    reading = partial(
        read_video, question.path, max_side=2 * THUMBNAIL, allow_truncated=allow_truncated
    )
    frame = _fullest(loss.kept, loss.grid) if loss.kept and loss.grid else 0
    if question.times:
        # Models that read several frames as one have fewer rows of frames than there are times.
        wanted = question.times[(2 * frame + 1) * len(question.times) // (2 * frames)]
        video = reading(frames=_FRAMES_TO_SEARCH)
        place = int(np.abs(video.times - wanted).argmin())
    else:
        video = reading(frames=frames)
        place = (2 * frame + 1) * len(video.times) // (2 * frames)
    caption = f"frame at {video.times[place]:.1f} s"
    if frames > 1:
        caption += f", time step {frame + 1} of {frames}"
    return Image.fromarray(video.frames[place]), frame, caption


def _fullest(kept: Sequence[int], grid: tuple[int, int, int]) -> int:
    """Return the row of frames with the most kept tokens, the first of equals."""
    frames, rows, columns = grid
    inside = [index // (rows * columns) for index in kept if 0 <= index < math.prod(grid)]
    return int(np.bincount(inside, minlength=frames).argmax()) if inside else 0


def _cells(mask: NDArray[np.bool_], width: int, height: int) -> str:
    """Return an SVG path over the cells of a mask [R, W], one rectangle for each run in a row."""
    tall, wide = height / mask.shape[0], width / mask.shape[1]
    parts = []
    for row, line in enumerate(mask.tolist()):
        start = 0
        for filled, run in groupby(line):
            count = len(list(run))
            if filled:
                across = f"{count * wide:.4g}"
                parts.append(f"M{start * wide:.4g} {row * tall:.4g}h{across}v{tall:.4g}h-{across}z")
            start += count
    return "".join(parts)


# Settings ---------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return names and values for people; what is nested gets its names joined by dots."""
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and all(
            isinstance(one, str | int | float) for one in value
        ):
            flat.append((f"{prefix}{name}", ", ".join(str(one) for one in value) or words.NOTHING))
        elif isinstance(value, str):
            flat.append((f"{prefix}{name}", value))
        else:
            text = words.NOTHING if value is None else json.dumps(value, default=str)
            flat.append((f"{prefix}{name}", text))
    return flat
