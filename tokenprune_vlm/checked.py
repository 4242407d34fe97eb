"""Importing this raises unless Python finds our `tokenprune`; see `tokenprune_vlm`."""

from __future__ import annotations

from tokenprune_vlm import check

check()
