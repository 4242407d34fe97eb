"""Settings that vLLM reads from the environment, for this process and those that it starts."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

os.environ.update(
    # A share of all memory otherwise, which two engines at a time do not find.
    VLLM_CPU_KVCACHE_SPACE="1",
    # Engines of two tests that run at a time would be bound to one core.
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
    # Workers import tests.vllm.recording.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)
