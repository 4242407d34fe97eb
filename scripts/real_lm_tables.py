#!/usr/bin/env python
"""What a pretrained language model changes: the tables of docs/real-lm.md.

    scripts/real_lm_tables.py ask OUT      # every method, both ways to count positions; hours
    scripts/real_lm_tables.py time OUT     # how soon some methods answer; on a quiet machine
    scripts/real_lm_tables.py look OUT     # layers, sinks, dominance and heads; twenty minutes
    scripts/real_lm_tables.py write OUT [--training WORK/run]

``ask`` runs the evaluation of ``methods.yaml`` on fewer questions about images, on `bundled` into
OUT/small and on `bundled-smollm2` into OUT/methods, and a part of it with compact positions into
OUT/compact. All go on where they ended.
``time`` asks fewer questions, one at a time, under some of the methods, into OUT/time.
``look`` reads questions about scenes with both bundled models, one at a time, runs `tokenprune
find-layer` on them, and writes OUT/look.
``write`` replaces the text between the markers of docs/real-lm.md; ``--training`` is the run of
``train_real_lm.py``. What there is nothing of stays as it is.

In ``look`` a layer's attention is that of the prompt's last token, from which the answer comes,
mean over heads and questions. *Recall* is the share of the K tokens that ``flexselect`` ranks
highest at a layer that show the item in question, where K of them do. A sink is a visual token
whose hidden state, after an RMS norm without weight, exceeds 20 in one dimension: ``drop_sinks``
with its default. Dominance is MDI, attention per text token over attention per visual token, while
an answer is generated. Heads are those of ``tokenprune calibrate-heads`` on prompts of two scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from compare_sets import written
from methods_table import accuracy
from PIL import Image
from rich.console import Console
from run_tables import by_group, markdown, right
from scipy.stats import spearmanr
from update_docs import complete, fill

import tokenprune_hf
from tokenprune import cli
from tokenprune.activations import largest_number
from tokenprune.masks.coverage import thresholds
from tokenprune.providers import BUNDLED_MODELS, BUNDLED_SMOLLM2
from tokenprune.question.reader import PromptReader
from tokenprune.selectors.base import top_k
from tokenprune.selectors.flexselect import FlexSelect
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import default_cache_dir
from tokenprune_eval.bundled.needles import clip_path
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.calibrate_heads import Prompt, find_sinks, measure_heads
from tokenprune_eval.demo.evidence import evidence_mask
from tokenprune_eval.demo.preset import POSITION_KEEPS, POSITION_METHODS, image_size
from tokenprune_eval.dominance import measure_dominance
from tokenprune_eval.evaluation import runner
from tokenprune_eval.evaluation.settings import read_settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import accuracy_of
from tokenprune_eval.results.summary import Row, summarise
from tokenprune_eval.shared.asking import answer, laid_out
from tokenprune_eval.shared.progress import RunProgress
from tokenprune_hf.encoder_inputs import VIDEO_FRAMES
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.vision import vision_model

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "real-lm.md"
LIMIT = {"scenes": 400, "easy-vqa": 200}
"""Of what ``methods.yaml`` asks: an hour and a half of two cores."""

TIMED_METHODS = (
    "resize",
    "random",
    "cls-attention",
    "divprune",
    "information",
    "zeroth-order",
    "cdpruner-llm",
    "flexselect",
    "mmtok",
    "relevant-information",
    "fastv",
    "pyramid-drop",
)
TIMED = 24
"""What is timed: a method of each kind, and questions about scenes, one at a time."""

OF_ONE_ITEM = ("kind", "color", "place")
"""Types of questions about scenes whose evidence is one item."""

LOOKED_AT, PAIRS, CALIBRATED = 90, 200, 32
"""Questions about one scene, questions about two, and prompts that heads are calibrated on."""

HAYSTACKS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
"""Clips that `tokenprune find-layer` hides needles in."""

NEW_TOKENS = 6


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, meaning in (
        ("ask", "ask the model under every condition"),
        ("time", "ask it one question at a time under some of them"),
        ("look", "look into the language models"),
        ("write", "write docs/real-lm.md"),
    ):
        action = actions.add_parser(name, help=meaning)
        action.add_argument("out", type=Path, help="folder of all that is measured")
    writing = actions.choices["write"]
    writing.add_argument("--training", type=Path, help="folder of the run's checkpoints")
    arguments = parser.parse_args()
    if arguments.action == "ask":
        ask(arguments.out)
    elif arguments.action == "time":
        ask_one_by_one(arguments.out)
    elif arguments.action == "look":
        look(arguments.out / "look")
    else:
        write(arguments.out, arguments.training)


# Asking ------------------------------------------------------------------------------------------


def ask(out: Path) -> None:
    """Ask both models under every method and budget, and the larger with compact positions too."""
    images: dict[str, Any] = {"data": list(LIMIT), "limit": LIMIT, "method": of_images()}
    evaluate(out / "methods", batch=16, **images)
    evaluate(
        out / "compact",
        data=["scenes"],
        limit=LIMIT["scenes"],
        method=list(POSITION_METHODS),
        keep=list(POSITION_KEEPS),
        positions="compact",
        batch=16,
    )
    run_file(out / "small", **images)


def ask_one_by_one(out: Path) -> None:
    """Ask the model as somebody does who waits for each answer, on one core as the demo does."""
    torch.set_num_threads(1)
    methods = list(TIMED_METHODS)
    evaluate(out / "time", data=["scenes"], limit=TIMED, method=methods, batch=1, workers=1)


def evaluate(out: Path, **settings: Any) -> None:
    """Run the evaluation of ``methods.yaml`` on the pretrained model with other settings."""
    # No options: the layer that ranks best is another one in each model.
    run_file(out, model=BUNDLED_SMOLLM2, options={}, **settings)


def run_file(out: Path, **settings: Any) -> None:
    """Run the evaluation of ``methods.yaml`` with other settings."""
    with RunProgress(Console(stderr=True)) as progress:
        runner.run(read_settings({"out": str(out), **settings}, HERE / "methods.yaml"), progress)


def of_images() -> list[str]:
    """Return the methods of ``methods.yaml`` but those for videos."""
    for_videos = {one.name for _, group in by_group() for one in group if one.for_videos}
    every = read_settings({}, HERE / "methods.yaml").method
    return [name for name in every if name not in for_videos]


# Looking -----------------------------------------------------------------------------------------


def look(out: Path) -> None:
    """Look into both models, and write what is seen of each as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    for name in BUNDLED_MODELS:
        model, processor = tokenprune_hf.load(name)
        model.set_attn_implementation("eager")  # the only one that returns attention
        for part, look_at in (("layers", layers_of), ("heads", partial(heads_of, folder=out))):
            file = out / f"{name}-{part}.json"
            file.write_text(json.dumps(look_at(model, processor), indent=1) + "\n", "utf-8")
            print(file, flush=True)
        videos = [str(clip_path(clip)) for clip in HAYSTACKS]
        command = ["find-layer", name, "--frames", "16", "--video", *videos]
        if code := cli.main([*command, "--out", str(out / f"{name}-needles")]):
            raise SystemExit(code)


def layers_of(model: Any, processor: Any) -> list[dict[str, float]]:
    """Return what each layer attends to, finds and holds, from the first layer on."""
    questions = [one for one in scenes.load_scenes() if one.type in OF_ONE_ITEM]
    drawn = np.random.default_rng(0).choice(len(questions), LOOKED_AT, replace=False)
    chosen = [questions[int(number)] for number in drawn]
    with torch.inference_mode(), measure_dominance(model) as dominance:
        for question in chosen:
            inputs = tokenprune_hf.ask(
                processor, question.question, image=Image.open(question.image)
            )
            model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    with torch.inference_mode():
        rows = [of_question(model, processor, question) for question in chosen]
    mdi = {number: one.mdi for number, one in dominance.result.layers.items()}
    return [
        {
            **{name: float(np.mean([row[number][name] for row in rows])) for name in rows[0][0]},
            "mdi": mdi[number],
        }
        for number in range(len(rows[0]))
    ]


def of_question(model: Any, processor: Any, question: Question) -> list[dict[str, float]]:
    """Return what is seen at each layer with one question."""
    inputs = tokenprune_hf.ask(processor, question.question, image=Image.open(question.image))
    read = model(**inputs, output_attentions=True, output_hidden_states=True)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    items = prompt_items(
        vision_model(model), inputs, tokenprune_hf.encode(model, **inputs), ("query_attention",)
    )
    ((item,),) = items.values()
    _, rows, columns = item.grid
    evidence = evidence_mask(question.evidence, image_size(question.image), (rows, columns))
    count = int(evidence.sum())
    reader = cast(PromptReader, item.query_attention)
    every = range(len(read.attentions))
    (keys,) = reader.read_layers([torch.arange(rows * columns)], every, False, True)
    found = []
    for layer, attention in enumerate(read.attentions):
        last = attention[0, :, -1].mean(dim=0)
        largest = largest_number(read.hidden_states[layer][0])
        row = {
            "first": float(last[0]),
            "visual": float(last[visual].sum()),
            "largest_first": float(largest[0]),
            "largest_visual": float(largest[visual].max()),
            "sinks": float((largest[visual] > FlexSelect.sink_threshold).sum()),
        }
        for name, drop in (("recall", False), ("recall_without_sinks", True)):
            scores = FlexSelect(drop_sinks=drop).score_keys(keys[layer])
            kept = top_k(scores[None], count)[0]
            row[name] = float(evidence[kept].sum()) / count
        found.append(row)
    return found


def heads_of(model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """Calibrate heads on prompts of two scenes, and ask questions about two with their masks."""
    model.set_attn_implementation("sdpa")
    pairs = written(
        default_cache_dir() / "real-lm", "two-images", scenes.STYLES["standard"], "test", PAIRS
    )
    lines = [json.loads(line) for line in pairs.read_text("utf-8").splitlines()][:PAIRS]
    prompts = calibration_prompts(folder / "pictures")
    sinks = find_sinks(model, processor, prompts)
    measured = measure_heads(model, processor, prompts, sinks)
    heads = measured.choose(thresholds(measured.model.layers))
    every = [category for layer in heads.categories for category in layer]
    return {
        "sinks": list(sinks.places),
        "categories": {name: every.count(name) for name in sorted(set(every))},
        "density": heads.density,
        "questions": len(lines),
        "right": correct(model, processor, pairs.parent, lines, None),
        "right_masked": correct(model, processor, pairs.parent, lines, heads),
    }


def calibration_prompts(folder: Path) -> list[Prompt]:
    """Render validation scenes and put two together, with a question about the first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    prompts = []
    for number in range(CALIBRATED):
        drawn = [scenes.render_scene("validation", 2 * number + place) for place in (0, 1)]
        files = tuple(folder / f"validation-{2 * number + place}.png" for place in (0, 1))
        for file, scene in zip(files, drawn, strict=True):
            Image.fromarray(scene.pixels).save(file)
        (asked,) = scenes.ask(drawn[0], [str(rng.choice(OF_ONE_ITEM))], rng)
        prompts.append(Prompt(files, asked.question))
    return prompts


def correct(model: Any, processor: Any, folder: Path, lines: Sequence[Any], heads: Any) -> int:
    """Return how many questions about two images are answered right, with masks or without."""
    count = 0
    for line in lines:
        images = [Image.open(folder / name).convert("RGB") for name in line["images"]]
        inputs = laid_out(model, processor, line["question"], images)
        del inputs[VIDEO_FRAMES]  # which only a pruned model takes
        if heads is None:
            said = answer(model, processor, inputs, max_new_tokens=NEW_TOKENS)
        else:
            with tokenprune_hf.sparse(model, heads):
                said = answer(model, processor, inputs, max_new_tokens=NEW_TOKENS)
        count += said.lower() == line["answer"].lower()
    return count


# Tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What `look` saw of one model.

    Attributes
    ----------
    layers
        Of each layer what `of_question` returns, mean over questions, and ``mdi``.
    needles
        Of each layer the recall of needles in videos.
    heads
        What `heads_of` returns.
    """

    layers: list[dict[str, float]]
    needles: list[float]
    heads: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> Seen:
        """Return what lies in a folder of a model."""

        def stored(file: str) -> Any:
            return json.loads((folder / f"{name}-{file}").read_text("utf-8"))

        needles = [layer["recall"] for layer in stored("needles/layer_recall.json")["layers"]]
        return cls(stored("layers.json"), needles, stored("heads.json"))


_RUNS = {"small": "small", "real": "methods"}


def write(out: Path, training: Path | None) -> None:
    """Put the tables that there is data for into the page."""
    texts: dict[str, str] = {}
    if (out / "methods").is_dir():
        runs = {name: rows_of(out / folder) for name, folder in _RUNS.items()}
        texts["accuracy"] = "\n\n".join(accuracies(runs, data) for data in LIMIT)
        texts["carries"] = carries_over(runs)
        if (out / "compact").is_dir():
            texts["positions"] = positions(runs["real"], rows_of(out / "compact"))
    if (out / "time").is_dir():
        texts["time"] = times(rows_of(out / "time"))
    if (out / "look").is_dir():
        seen = {name: Seen.read(out / "look", name) for name in BUNDLED_MODELS}
        texts["layers"] = layers(seen)
        texts["heads"] = heads_table(seen)
    if training is not None:
        texts["training"] = training_curve(training)
    fill(PAGE, {name: f"\n{text}\n" for name, text in texts.items()})


Rows = dict[tuple[str, str, float], Row]
"""By data set, method and budget."""


def rows_of(run: Path) -> Rows:
    """Return a run's rows; one that did not finish is refused, as it is for the README."""
    complete(run)
    stored = read_run(run)
    found = summarise(stored.about, stored.questions, stored.conditions, stored.records).rows
    return {(row.data_set, row.method, float(row.keep)): row for row in found}


def budgets_of(rows: Rows) -> list[float]:
    """Return the budgets of a run, the largest first."""
    return sorted({keep for _, method, keep in rows if method != UNPRUNED}, reverse=True)


def accuracies(runs: dict[str, Rows], data: str) -> str:
    """Return a data set's table: for each budget the small model and the real one."""
    budgets = budgets_of(runs["real"])
    tokens = [runs["real"][data, "random", keep].visual_tokens or 0 for keep in budgets]
    headings = ["method"]
    headings += [f"{count:.0f}, {name}" for count in tokens for name in ("small", "SmolLM2")]
    lines = []
    named = {one.name for _, group in by_group() for one in group}
    known = dict.fromkeys(method for _, method, _ in runs["real"] if method != UNPRUNED)
    groups = [("a smaller picture", [name for name in known if name not in named])]
    groups += [(group, [one.name for one in found]) for group, found in by_group()]
    for group, names in groups:
        mine = [name for name in names if name in known]
        if mine:
            lines.append([f"**{group}**", *[""] * (len(headings) - 1)])
        for name in mine:
            cells = [
                right(accuracy(runs[which].get((data, name, keep))))
                for keep in budgets
                for which in ("small", "real")
            ]
            lines.append([f"`{name}`", *cells])
    whole = [
        f"{title} {right(accuracy(rows[data, UNPRUNED, 1.0]))}"
        for title, rows in (("the small model", runs["small"]), ("with SmolLM2", runs["real"]))
    ]
    count = runs["real"][data, UNPRUNED, 1.0].questions
    return (
        f"### {data}\n\n{count:,} questions; unpruned, % right: {', '.join(whole)}.\n\n"
        + markdown(headings, 1, lines)
    )


def carries_over(runs: dict[str, Rows]) -> str:
    """Return how alike the two models rank the methods, and which change most."""
    lines = []
    for data in LIMIT:
        for keep in budgets_of(runs["real"]):
            both = [
                method
                for of, method, budget in runs["real"]
                if (of, budget) == (data, keep) and (data, method, keep) in runs["small"]
            ]
            both = [name for name in both if name != UNPRUNED]
            small, real = (
                np.array([_share(runs[which][data, name, keep]) for name in both])
                for which in ("small", "real")
            )
            gap = _ranks(real) - _ranks(small)
            rises, falls = np.argsort(gap)[:2], np.argsort(-gap)[:2]
            lines.append(
                [
                    data,
                    f"{keep:g}",
                    f"{len(both)}",
                    f"{spearmanr(small, real).statistic:.2f}",
                    ", ".join(f"`{both[i]}` {-gap[i]:+.0f}" for i in rises),
                    ", ".join(f"`{both[i]}` {-gap[i]:+.0f}" for i in falls),
                ]
            )
    headings = ("set", "keep", "methods", "rank correlation", "rise most", "fall most")
    return markdown(headings, 1, lines)


def _share(row: Row) -> float:
    return 0.0 if row.accuracy is None else row.accuracy.share


def _ranks(shares: Any) -> Any:
    """Return each one's place, the best having 0."""
    return np.argsort(np.argsort(-shares, kind="stable"), kind="stable")


def times(rows: Rows) -> str:
    """Return milliseconds until each method's first answer token, and what they are made of."""
    lines = []
    for (_, method, _), row in rows.items():
        parts = ("encode", "select", "prefill", "first_token")
        sooner = row.first_token_speed_up
        lines.append(
            [
                f"`{method}`",
                f"{row.visual_tokens:.0f}",
                *(f"{1000 * (getattr(row.seconds, part) or 0.0):.0f}" for part in parts),
                "" if sooner is None else f"x{sooner.ratio:.2f}",
            ]
        )
    headings = ("method", "tokens", "encode", "select", "prefill", "first token", "as soon")
    return markdown(headings, 1, lines)


def positions(original: Rows, compact: Rows) -> str:
    """Return right answers with both ways to count positions."""
    lines = [
        [
            f"`{method}`",
            f"{row.visual_tokens:.0f}",
            right(accuracy(original.get((data, method, keep)))),
            right(accuracy(row)),
        ]
        for (data, method, keep), row in compact.items()
        if method != UNPRUNED and (data, method, keep) in original
    ]
    return markdown(("method", "tokens", "original", "compact"), 1, lines)


def layers(seen: dict[str, Seen]) -> str:
    """Return a table of layers for each model."""
    columns: dict[str, Callable[[dict[str, float]], str]] = {
        "first token, %": lambda row: f"{100 * row['first']:.0f}",
        "visual tokens, %": lambda row: f"{100 * row['visual']:.0f}",
        "MDI": lambda row: f"{row['mdi']:.1f}",
        "recall, %": lambda row: f"{100 * row['recall']:.0f}",
        "without sinks": lambda row: f"{100 * row['recall_without_sinks']:.0f}",
        "sinks": lambda row: f"{row['sinks']:.1f}",
        "largest, first token": lambda row: f"{row['largest_first']:.1f}",
        "largest, visual": lambda row: f"{row['largest_visual']:.1f}",
    }
    parts = []
    for name, found in seen.items():
        lines = [
            [str(number), *(cell(row) for cell in columns.values()), f"{100 * needles:.0f}"]
            for number, (row, needles) in enumerate(zip(found.layers, found.needles, strict=True))
        ]
        headings = ("layer", *columns, "needles, %")
        parts.append(f"`{name}`:\n\n" + markdown(headings, 0, lines))
    return "\n\n".join(parts)


def heads_table(seen: dict[str, Seen]) -> str:
    """Return what masks the heads of both models can do with."""
    names = sorted({name for found in seen.values() for name in found.heads["categories"]})
    lines = []
    for model, found in seen.items():
        heads = found.heads
        shares = [
            accuracy_of([True] * heads[key] + [False] * (heads["questions"] - heads[key]))
            for key in ("right", "right_masked")
        ]
        lines.append(
            [
                f"`{model}`",
                ", ".join(map(str, heads["sinks"])) or "none",
                *(str(heads["categories"].get(name, 0)) for name in names),
                f"{heads['density']:.2f}",
                *map(right, shares),
            ]
        )
    headings = ("model", "sinks' places", *names, "density", "right, %", "with masks")
    return markdown(headings, 2, lines)


def training_curve(run: Path) -> str:
    """Return the shares of right answers on validation scenes as training went on."""
    newest = max(run.glob("checkpoint-*"))
    state = json.loads((newest / "state.json").read_text("utf-8"))
    curve = state["curve"]
    step = -(-len(curve) // 16)  # at most 16 rows, the last one among them
    chosen = [row for number, row in enumerate(curve) if (len(curve) - 1 - number) % step == 0]
    kinds = [name for name in curve[0] if name not in ("images", "hours", "accuracy")]
    lines = [
        [
            f"{row['images']:,.0f}",
            f"{row['hours']:.2f}",
            f"{100 * row['accuracy']:.0f}",
            *(f"{100 * row[kind]:.0f}" for kind in kinds),
        ]
        for row in chosen
    ]
    return markdown(("pictures", "hours", "right, %", *kinds), 0, lines)


if __name__ == "__main__":
    main()
