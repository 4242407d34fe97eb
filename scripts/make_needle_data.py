#!/usr/bin/env python
"""Render training videos for the bundled model's selector, and list their questions.

    python scripts/make_needle_data.py --out DATA
    tokenprune train-selector bundled --data DATA/data.jsonl --out SELECTOR ...

The videos are of the training split: neither their pictures nor their footage are in the test set.
They are H.264 files of 32 and of 64 frames with cards of two frames.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenprune_eval.bundled.needles import needle_set


def main() -> None:
    """Render and list."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=160, help="of each length")
    options = parser.parse_args()
    lines = []
    for frames in (32, 64):
        for asked in needle_set(
            options.out, videos=options.videos, frames=frames, show=2, split="train"
        ):
            path = asked.video.relative_to(options.out)
            lines.append(json.dumps({"video": str(path), "question": asked.question}))
    (options.out / "data.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines)} questions about {2 * options.videos} videos in {options.out}/data.jsonl")


if __name__ == "__main__":
    main()
