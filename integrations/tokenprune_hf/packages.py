"""What this room imports beside torch and numpy; see `tokenprune.packages`."""

from __future__ import annotations

from tokenprune.packages import TRANSFORMERS as TRANSFORMERS
