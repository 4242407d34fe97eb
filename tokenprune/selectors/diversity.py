"""Has moved to the greedy engine; what is imported from here warns, see `tokenprune.moved`."""

from __future__ import annotations

from tokenprune.moved import moved_names

__getattr__ = moved_names(__name__)
