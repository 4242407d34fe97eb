"""vLLM's Model Runner V2, the default on GPUs, run for real on a CPU.

Its kernels are Triton's, which the package on PyPI compiles for GPUs alone. In a process of its own
they run in Triton's interpreter, behind a backend that vLLM takes for one for CPUs
(`tests.vllm.interpreted_triton`). vLLM brings all else: its own CI runs this runner on CPUs.
"""

from __future__ import annotations

import site
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import Case, request, start

BACKEND = "tests.vllm.interpreted_triton"
RUNNER = "vllm.v1.worker.cpu.model_runner"
"""The module of the runner's class."""


@dataclass(frozen=True)
class Asked:
    """What an engine answered.

    Attributes
    ----------
    runner
        The module of the model runner's class.
    alone
        Of each request, asked after the one before, the tokens answered and the indices kept of
        each item.
    together
        Of each request, asked in one batch, the tokens answered.
    preemptions
        How often requests of the batch were pushed out and began again.
    """

    runner: str
    alone: list[tuple[list[int], list[list[int]]]]
    together: list[list[int]]
    preemptions: int


@contextmanager
def a_process_of_runner_v2(folder: Path) -> Iterator[ProcessPoolExecutor]:
    """Start a process in which vLLM takes Model Runner V2.

    Parameters
    ----------
    folder
        For a file that is to be found on the path.
    """
    metadata = folder / "interpreted_triton-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: interpreted-triton\nVersion: 1\n"
    )
    (metadata / "entry_points.txt").write_text(f"[triton.backends]\ncpu = {BACKEND}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        # Engine and worker in this same process, which has to import everything anew once.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with ProcessPoolExecutor(
            1, get_context("spawn"), initializer=site.addsitedir, initargs=(str(folder),)
        ) as executor:
            yield executor


def ask(family: str, folder: Path, cases: Sequence[Case]) -> Asked:
    """Ask an engine in this process, one case after another and then all at once.

    Parameters
    ----------
    family, folder
        As for `tests.vllm.test_families.start`.
    cases
        What is asked.
    """
    from vllm.model_executor.models import registry
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    with pytest.MonkeyPatch.context() as patch:
        # vLLM looks at a model's class in another process, so that this one stays without CUDA.
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        executor = {"forked": False, "distributed_executor_backend": UniProcExecutor}
        with start(family, folder, **executor) as llm:
            (runner,) = llm.collective_rpc("runner")
            alone = []
            for case in cases:
                (tokens,) = answer(llm, [request(family, case)], greedy(words=WORDS))
                alone.append((tokens, [segment for item in kept(llm) for segment in item]))
            llm.reset_prefix_cache()
            requests = [request(family, case) for case in cases]
            together = answer(llm, requests, greedy(words=WORDS))
            counted = {metric.name: metric for metric in llm.get_metrics()}
            return Asked(runner, alone, together, int(counted["vllm:num_preemptions"].value))
