"""What this room imports beside torch and numpy; see `tokenprune.packages`."""

from __future__ import annotations

from tokenprune.packages import DISTRIBUTION, Package

VLLM = (
    Package(
        "vllm",
        install=f"'{DISTRIBUTION}[vllm]'",
        hint="That is vLLM for a GPU; `tokenprune docs serving` says how to install its CPU build.",
    ),
)
