"""Is `tokenprune.question.prompt` now; this name warns, see `tokenprune.moved`."""

from __future__ import annotations

from tokenprune.moved import moved_names

__getattr__ = moved_names(__name__)
