"""Reading videos and images, with no engine in it: both adapters and the evaluation read here.

What reads a file needs packages of its own (PyAV, Pillow), so nothing is imported before its use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.media.images import load_image as load_image
    from tokenprune.media.video import Video as Video
    from tokenprune.media.video import read_video as read_video

_HOMES = {"Video": "video", "load_image": "images", "read_video": "video"}

__all__, __getattr__, __dir__ = lazy_names("tokenprune.media", _HOMES)
