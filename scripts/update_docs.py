#!/usr/bin/env python
"""Write the measured numbers into README.md, docs/demo.md and docs/serving.md.

    scripts/demo --full
    .venv/bin/python scripts/bench_selectors.py > docs/bench_selectors.txt
        (or its parts, --cost first, one after another)
    .venv/bin/python scripts/bench_generate.py > docs/bench_generate.txt
    .venv/bin/python scripts/bench_vllm.py > docs/bench_vllm.txt
    .venv/bin/python scripts/bench_speculation.py --work WORK > docs/bench_speculation.txt
    .venv/bin/python scripts/bench_vllm.py --media video > docs/bench_vllm_video.txt
    .venv/bin/python scripts/soak.py > docs/soak.txt
    .venv/bin/tokenprune eval --config scripts/eval.yaml
    .venv/bin/python scripts/real_lm_tables.py ask real-out
    .venv/bin/python scripts/real_lm_tables.py time real-out
    .venv/bin/python scripts/update_docs.py demo-out/full/results.json --eval eval-out \
        --real real-out

Text between the markers ``<!-- name:start -->`` and ``<!-- name:end -->`` of README.md and
docs/serving.md is replaced, and docs/demo.md is written anew; of the evaluation the table and the
report are copied into docs/. What is not given stays as it is. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune.registry import listed

ROOT = Path(__file__).parents[1]
_BENCHES = ("bench_selectors.txt", "bench_generate.txt")
_SERVING = ("bench_vllm.txt", "bench_vllm_video.txt")
_GAP = "\n\n\n"  # between the parts of a benchmark's output
SETS = {"scenes": "scenes", "easy-vqa": "easy-VQA"}
Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown, numbers to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_method(rows: Sequence[Row], cell: Any) -> str:
    """Return methods down, visual tokens across."""
    budgets = sorted({row["keep"] for row in rows if row["method"] != "oracle"}, reverse=True)
    tokens = {k: max(row["visual_tokens"] for row in rows if row["keep"] == k) for k in budgets}
    lines = []

    def told(row: Row) -> str:
        # A smaller picture has as many tokens as its sides allow.
        count = round(row["visual_tokens"])
        if count >= round(tokens[row["keep"]]):
            return str(cell(row))
        return f"{cell(row)} ({count} token{'s' * (count != 1)})"

    for method in dict.fromkeys(row["method"] for row in rows):
        # The unpruned run, "none" to earlier versions, is every method's first column.
        if method in ("unpruned", "none", "oracle"):
            continue
        mine = {row["keep"]: row for row in rows if row["method"] == method}
        lines.append([f"`{method}`", *[told(mine[k]) if k in mine else "" for k in budgets]])
    return markdown(["tokens kept", *[f"{tokens[k]:.0f}" for k in budgets]], lines)


def accuracy(row: Row) -> str:
    """Return a row's accuracy with its interval."""
    return f"{row['accuracy']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"


def first_token(row: Row) -> str:
    """Return a row's milliseconds to the first token, and its parts."""
    prefill, selection = row["prefill_ms"], row["selection_ms"]
    whole = row["encode_ms"] + selection + prefill
    return f"{whole:.0f} ({prefill:.0f} + {selection:.1f})"


def oracle_line(rows: Sequence[Row]) -> str:
    """Return the oracle's row as a sentence, or nothing where the set has none."""
    lines = [
        f"`oracle`, the evidence alone, {row['visual_tokens']:.1f} tokens on average: "
        f"{accuracy(row)}."
        for row in rows
        if row["method"] == "oracle"
    ]
    return "\n".join(lines)


def demo_results(path: Path) -> dict[str, Any]:
    """Return what a complete full run of the demo found; the documents quote no other."""
    results: dict[str, Any] = json.loads(path.read_text())
    run = results.get("run")
    if run != "full":
        which = f"a {run} run" if run else "an older version's run"
        raise SystemExit(
            f"{path} is of {which}, and the documents quote a full one. Run scripts/demo --full "
            "and give demo-out/full/results.json."
        )
    if not results["complete"]:
        raise SystemExit(f"{path} is of a run that did not finish. Run scripts/demo --full again.")
    return results


def demo_page(results: dict[str, Any]) -> str:
    """Return docs/demo.md."""
    parts = [
        "# The demo, number by number",
        "Written by `scripts/update_docs.py` from the `results.json` of one run of "
        "`scripts/demo --full`. The model is the one bundled with tokenprune, trained on these two "
        "sets; it is no public model, and its accuracies say nothing about one. Intervals are "
        f"{results['settings']['intervals']}; they do not cover the choice of the one model.",
    ]
    for name, title in SETS.items():
        rows = [row for row in results["rows"] if row["dataset"] == name]
        if not rows:
            continue
        positions = rows[0]["positions"]
        parts += [
            f"## {title}, {rows[0]['questions']:,} questions, positions {positions}",
            by_method(rows, accuracy),
            oracle_line(rows),
        ]
        if rows[0]["evidence_kept"] is not None:
            share = by_method(rows, lambda row: f"{row['evidence_kept']:.2f}")
            parts += ["Share of the evidence's tokens that were kept:", share]
        parts += [
            "Milliseconds to the first answer token of one question on "
            f"`{results['timed']['name']}`, one core; {rows[0]['encode_ms']:.0f} of them encode "
            "the picture. In brackets prefill and, after the plus sign, selection:",
            by_method(rows, first_token),
        ]
    others = results["other_positions"]
    if others:
        name, how = others[0]["dataset"], others[0]["positions"]
        parts += [
            f"## {SETS.get(name, name)} with {how} positions",
            by_method(others, accuracy),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def positions_table(results: dict[str, Any]) -> str:
    """Return both ways to count positions side by side, where both were run."""
    main = {(row["dataset"], row["method"], row["keep"]): row for row in results["rows"]}
    lines = []
    for other in results["other_positions"]:
        row = main.get((other["dataset"], other["method"], other["keep"]))
        if row is None or other["keep"] == 1.0:
            continue
        pair = {row["positions"]: row, other["positions"]: other}
        lines.append(
            [
                f"`{row['method']}`, {SETS[row['dataset']]}",
                f"{row['visual_tokens']:.0f}",
                accuracy(pair["original"]),
                accuracy(pair["compact"]),
            ]
        )
    return markdown(["method, set", "tokens", "original", "compact"], lines)


def headline(folder: Path) -> str:
    """Return the first paragraph's number: of what `real_lm_tables.py` asked and timed."""
    answers, times = (
        [row for row in complete(folder / name)["rows"] if row["data_set"] == "scenes"]
        for name in ("methods", "time")
    )
    of = {row["method"]: row for row in answers if row["keep"] == 0.25}
    timed = {row["method"]: row for row in times if row["keep"] == 0.25}
    (full,) = (row for row in answers if row["method"] == "unpruned")
    (timed_full,) = (row for row in times if row["method"] == "unpruned")
    # What is recommended has all tokens of the picture to choose from, and saves time.
    every = listed()
    saving = (
        name
        for name, row in timed.items()
        if name in every
        and every[name].kind == "before"
        and row["first_token_speed_up"]["ratio"] > 1
    )
    best = max(saving, key=lambda name: float(of[name]["accuracy"]["share"]))

    def right(row: Row) -> str:
        return f"{100 * row['accuracy']['share']:.1f}%"

    def seconds(row: Row) -> str:
        return f"{row['seconds']['first_token']:.2f} s"

    return (
        "with SmolLM2-135M behind the vision encoder bundled here, on one CPU core, "
        f"`{best}` keeps {of[best]['visual_tokens']:.0f} of {full['visual_tokens']:.0f} "
        f"tokens, answers {right(of[best])} of the questions about our scenes right and begins "
        f"its answer after {seconds(timed[best])}. All tokens give {right(full)} after "
        f"{seconds(timed_full)}, and as many random ones {right(of['random'])}."
    )


def demo_texts(results: dict[str, Any]) -> dict[str, str]:
    """Return what the README shows of the demo, by marker."""
    scenes = [row for row in results["rows"] if row["dataset"] == "scenes"]
    widest = max(row["ci_high"] - row["ci_low"] for row in scenes)
    table = (
        f"Right answers on scenes in %, {scenes[0]['questions']:,} questions (95 % intervals are "
        f"at most {100 * widest:.1f} points wide):\n\n"
        f"{by_method(scenes, lambda row: format(100 * row['accuracy'], '.1f'))}\n\n"
        f"{oracle_line(scenes)}"
    )
    return {
        "table": f"\n{table}\n",
        "positions": f"\n{positions_table(results)}\n",
    }


def complete(folder: Path) -> dict[str, Any]:
    """Return what a complete evaluation found."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    if not results["complete"]:
        raise SystemExit(f"{folder} is of a run that did not finish; run it again")
    return results


def eval_texts(folder: Path) -> dict[str, str]:
    """Return the README's tables of an evaluation; its own table and report go into docs/."""
    results = complete(folder)
    shutil.copyfile(folder / "report.html", ROOT / "docs" / "evaluation_report.html")
    shutil.copyfile(folder / "table.md", ROOT / "docs" / "evaluation_table.md")
    parts = []
    for data_set in results["data"]:
        rows = [row for row in results["rows"] if row["data_set"] == data_set["name"]]
        (unpruned,) = (row for row in rows if row["method"] == "unpruned")
        pruned = [row for row in rows if row is not unpruned]
        methods = list(dict.fromkeys(row["method"] for row in pruned))
        shared = [{**unpruned, "method": method} for method in methods]
        widest = max(row["accuracy"]["high"] - row["accuracy"]["low"] for row in rows)
        parts.append(
            f"{data_set['name']}, {data_set['questions']:,} questions, right answers in % (95 % "
            f"intervals are at most {100 * widest:.1f} points wide):"
        )
        parts.append(
            by_method([*shared, *pruned], lambda row: f"{100 * row['accuracy']['share']:.1f}")
        )
    minutes = results["wall_seconds"] / 60
    parts.append(
        f"The whole run took {minutes:.0f} minutes on {results['machine']['cores']} cores."
    )
    return {"eval": "\n" + "\n\n".join(parts) + "\n"}


def fenced(name: str) -> str:
    """Return the first part of a benchmark's output in docs/, as a block of text."""
    text = (ROOT / "docs" / name).read_text().split(_GAP)[0].strip()
    return f"```text\n{text}\n```"


def serving_line() -> str:
    """Return the README's sentence on the serving benchmark."""
    text = (ROOT / "docs" / "bench_vllm.txt").read_text()
    gain = re.search(
        r"more requests per second than plain at every .*?x([\d.]+) to x([\d.]+)", text
    )
    sizes = re.search(r"an image of (\d+) \(plain\), (\d+) \(pruned\)", text)
    model = re.search(r"\((\d[\d.]*) M\)$", text, flags=re.M)
    if gain is None or sizes is None or model is None:
        raise SystemExit("docs/bench_vllm.txt is no output of a complete scripts/bench_vllm.py")
    return (
        f"With {sizes[2]} of {sizes[1]} tokens kept, a language model of {float(model[1]):.0f} M "
        f"parameters (random weights) on two CPU cores answers {gain[1]} to {gain[2]} times as "
        "many image requests per second, at 1 to 32 concurrent ones, as the same server unpruned."
    )


def fill(path: Path, texts: dict[str, str]) -> None:
    """Replace the text between a document's markers."""
    document = path.read_text()
    for name, text in texts.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        document, count = re.subn(
            f"{start}.*?{end}", lambda _, t=text, s=start, e=end: s + t + e, document, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{path} must hold the markers {start} and {end} once")
    path.write_text(document)


def main() -> None:
    """Read the results and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", type=Path, nargs="?", help="results.json of a complete `scripts/demo --full`"
    )
    parser.add_argument("--eval", type=Path, help="folder of a complete `tokenprune eval`")
    parser.add_argument(
        "--real", type=Path, help="folder of a complete `real_lm_tables.py ask` and `time`"
    )
    arguments = parser.parse_args()
    texts = {"serving": serving_line()}
    texts["cost"] = "\n" + "\n\n".join(map(fenced, _BENCHES)) + "\n"
    if arguments.results is not None:
        results = demo_results(arguments.results)
        texts.update(demo_texts(results))
        (ROOT / "docs" / "demo.md").write_text(demo_page(results))
    if arguments.real is not None:
        texts["headline"] = headline(arguments.real)
    if arguments.eval is not None:
        texts.update(eval_texts(arguments.eval))
    fill(ROOT / "README.md", texts)
    served = [name for name in _SERVING if (ROOT / "docs" / name).exists()]
    blocks = "\n\n".join(map(fenced, served))
    served_texts = {"bench": f"\n{blocks}\n"}
    for name, file in {"soak": "soak.txt", "speculation": "bench_speculation.txt"}.items():
        if (ROOT / "docs" / file).exists():
            served_texts[name] = f"\n{fenced(file)}\n"
    fill(ROOT / "docs" / "serving.md", served_texts)


if __name__ == "__main__":
    main()
