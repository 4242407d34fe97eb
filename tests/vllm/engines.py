"""Starting vLLM's real engine for tests, on the CPU, and asking it things."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import tokenprune_vllm
from tests.vllm.processes import forked_processes

RECORDING = "tests.vllm.recording.Recording"
_OF_RANKS = {"tensor_parallel_size", "pipeline_parallel_size"}


@contextmanager
def engine(
    model: Path, method: str | None = None, keep: Any = None, *, forked: bool = True, **options: Any
) -> Iterator[Any]:
    """Start `vllm.LLM`, pruned or masked where a method or masks are given, and stop it afterwards.

    Engine and worker share one forked process (`tests.vllm.processes`), which writes where the
    first one wrote; several ranks have one each. With `forked=False` vLLM makes its own.
    """
    import vllm
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from tests.vllm import frozen  # noqa: F401

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 128 << 20,  # which are written once at the start
        "worker_extension_cls": RECORDING,
        "disable_log_stats": True,
        **options,
    }
    pruning = {
        name: settings.pop(name)
        for name in (
            *("positions", "options", "scope", "request_methods"),
            *("masks", "apply", "proportional_attention"),
        )
        if name in settings
    }
    ours = method is not None or "masks" in pruning
    if not ours:
        arguments = {"model": str(model), **settings}
    else:
        arguments = tokenprune_vllm.engine_args(model, method, keep, **pruning, **settings)
    forked &= "distributed_executor_backend" not in settings
    if forked and not _OF_RANKS & set(settings):
        # By its class: vLLM takes the name "uni" for "mp" on a CPU.
        arguments["distributed_executor_backend"] = UniProcExecutor
    with (
        pytest.MonkeyPatch.context() as patch,
        forked_processes() if forked else nullcontext(),
    ):
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # comes before its argument
        llm = vllm.LLM(**arguments)
    try:
        if ours:
            llm.collective_rpc("start_recording")
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(tokens: int = 8, words: Sequence[int] | None = None, **options: Any) -> Any:
    """Return sampling parameters that take the likeliest token, of `words` where given."""
    import vllm

    return vllm.SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        allowed_token_ids=None if words is None else list(words),
        **options,
    )


def answer(llm: Any, requests: Sequence[dict[str, Any]], sampling: Any) -> list[list[int]]:
    """Return the tokens generated for each request, all requests handed over at once."""
    outputs = llm.generate(list(requests), sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def kept(llm: Any) -> list[list[list[int]]]:
    """Return what was kept since the last call, by item and segment; ranks agree."""
    ranks = [rank for rank in llm.collective_rpc("recorded") if rank is not None]
    assert all(rank == ranks[0] for rank in ranks)
    llm.collective_rpc("start_recording")
    return list(ranks[0])
