#!/usr/bin/env python
"""Render the scenes test set: 400 WebP images, questions.jsonl and items.jsonl.

    pip install scikit-image scikit-learn        # and Debian's package dataset-fashion-mnist
    python scripts/render_scenes.py              # writes into the package's folder
    python scripts/render_scenes.py --check      # renders anew and compares with what is there

What is reproduced: questions.jsonl and items.jsonl byte for byte, and the pixels before WebP
compression exactly (their SHA-256 is in items.jsonl). The decoded pixels are identical where
Pillow carries the same libwebp; another libwebp may round differently, which ``--check`` reports
as the largest difference in grey levels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tokenprune_eval.bundled import scenes

QUALITY = 90
"""WebP quality; about 8 kB an image."""


def render(folder: Path, fashion: Path | None) -> None:
    """Write the whole test set into a folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions: list[str] = []
    items: list[str] = []
    for number in range(scenes.TEST_SCENES):
        scene = scenes.render_scene("test", number, fashion=fashion)
        name = f"images/{number:03d}.webp"
        Image.fromarray(scene.pixels).save(folder / name, quality=QUALITY, method=6)
        for index, asked in enumerate(scenes.test_questions(scene, number)):
            row = {
                "id": f"scenes-{number:03d}-{index}",
                "image": name,
                "question": asked.question,
                "answer": asked.answer,
                "type": asked.type,
                "evidence": asked.evidence,
            }
            questions.append(json.dumps(row))
        items.append(
            json.dumps(
                {
                    "image": name,
                    "sha256": hashlib.sha256(scene.pixels.tobytes()).hexdigest(),
                    "photograph": scene.photograph,
                    "crop": scene.crop,
                    "items": [
                        {
                            "kind": item.kind,
                            "color": item.color,
                            "place": item.place,
                            "box": item.box,
                            "source": item.source,
                        }
                        for item in scene.items
                    ],
                }
            )
        )
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n", encoding="utf-8")
    (folder / "items.jsonl").write_text("\n".join(items) + "\n", encoding="utf-8")


def compare(fresh: Path, committed: Path) -> list[str]:
    """Say what differs between two folders, one line each; empty where nothing does."""
    differences = [
        f"{name} differs"
        for name in ("questions.jsonl", "items.jsonl")
        if (fresh / name).read_bytes() != (committed / name).read_bytes()
    ]
    largest = 0
    for file in sorted((fresh / "images").iterdir()):
        with Image.open(file) as a, Image.open(committed / "images" / file.name) as b:
            gap = np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)
        largest = max(largest, int(np.abs(gap).max()))
    if largest:
        differences.append(f"decoded pixels differ by up to {largest} grey levels")
    return differences


def main() -> int:
    """Render, or compare with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=scenes.TEST_SET)
    parser.add_argument("--fashion", type=Path, default=scenes.FASHION_FOLDER)
    parser.add_argument("--without-garments", action="store_true", help="no Fashion-MNIST")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    fashion = None if options.without_garments else options.fashion
    if not options.check:
        render(options.out, fashion)
        return 0
    with tempfile.TemporaryDirectory() as name:
        render(Path(name), fashion)
        differences = compare(Path(name), options.out)
    print("\n".join(differences) if differences else "identical")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
