"""What this room imports beside torch and numpy; see `tokenprune.packages`."""

from __future__ import annotations

from tokenprune.packages import Package

VIDEO = (Package("av"),)
"""What reading videos needs; decord is used where it is there."""
