"""What the tasks show for a question."""

from __future__ import annotations

from typing import Any

from PIL import Image


def image(doc: dict[str, Any]) -> list[Image.Image]:
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]


def video(doc: dict[str, Any]) -> list[str]:
    return [doc["video"]]
