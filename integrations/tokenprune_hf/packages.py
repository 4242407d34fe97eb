"""What this room imports beside torch and numpy; see `tokenprune.packages`."""

from __future__ import annotations

from tokenprune.packages import Package

TRANSFORMERS = (
    Package("transformers"),
    Package("torchvision"),
    Package("PIL"),
)
"""What a model of transformers and its processor need."""
