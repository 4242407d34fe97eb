#!/usr/bin/env python
"""Evaluate offline: what each method loses on your questions, at each budget.

    examples/evaluate_offline.py [FOLDER]     (default: evaluation; a run goes on in its folder)

Writes a file of questions as docs/data.md describes it, asks the bundled model all of them under
every method and budget, and reads the accuracies from the results. The folder then holds
report.html as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenprune.cli import main as tokenprune
from tokenprune_eval.bundled.scenes import load_scenes

SCENES = load_scenes()[:60]


def write_questions(file: Path) -> None:
    """Write one question a line, here about pictures that come with the package."""
    lines = [
        {
            "image": scene.image.name,
            "question": scene.question,
            "answer": scene.answer,
            "type": scene.type,
        }
        for scene in SCENES
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def main() -> int:
    """Run the evaluation and print one line for each condition."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    questions, run = folder / "questions.jsonl", folder / "run"
    write_questions(questions)
    # The same as on a command line: tokenprune eval --model bundled --data ...
    command = ["eval", "--model", "bundled", "--data", str(questions), "--out", str(run)]
    command += ["--media", str(SCENES[0].image.parent)]  # the folder with the pictures
    command += ["--method", "relevant-information", "divprune", "random"]
    command += ["--keep", "0.25", "0.125", "--max-new-tokens", "6"]
    if status := tokenprune(command):
        return status
    for row in json.loads((run / "results.json").read_text("utf-8"))["rows"]:
        accuracy = row["accuracy"]
        interval = f"{accuracy['low']:.0%} to {accuracy['high']:.0%}"
        tokens = f"{row['visual_tokens']:.0f} tokens"
        print(f"{row['method']}, {tokens}: {accuracy['share']:.0%} right ({interval})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
