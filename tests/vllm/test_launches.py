"""What an encoder batch launches in vLLM's worker, and where it waits for the device; no engine."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.worker_calls import Worker
from tokenprune.launches import Counted, Launch, counting
from tokenprune.tower.layouts import Grid
from tokenprune_vllm import metrics

ALIKE: list[Grid] = [(1, 6, 4)] * 3
DIFFERENT: list[Grid] = [(1, 6, 4), (1, 3, 5), (1, 8, 2)]


@pytest.fixture(autouse=True)
def times(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path_factory.mktemp("times")))


def ours(launch: Launch) -> bool:
    """Say whether the adapter or the library launches it, and not the encoder."""
    return launch.made_by("tokenprune", "tokenprune_vllm")


def counted_call(worker: Worker) -> tuple[list[torch.Tensor], Counted]:
    """Return the second call's rows, and what it launched."""
    for _ in range(2):  # the first call works out what holds for the model
        with torch.no_grad(), counting() as counted:
            rows = worker.call()
    return rows, counted.where(ours)


@pytest.mark.parametrize("keep", [5, 0.3])
@pytest.mark.parametrize("grids", [ALIKE[:1], ALIKE, DIFFERENT], ids=["one", "alike", "different"])
@pytest.mark.parametrize("method", ["feature-norm", "random", "uniform", "divprune"])
def test_an_encoder_batch_waits_once(method: str, grids: list[Grid], keep: float) -> None:
    rows, counted = counted_call(Worker(method, keep, grids, width=16))
    expected = Worker(method, keep, grids, width=16, cuda=False).call()
    for one, other in zip(rows, expected, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other)
    assert counted.waits == 1, counted.waiting()
    if method != "divprune":
        # Of the selection as many as one image's, and two of each image: its rows and positions.
        assert counted.kernels <= 35 + 2 * len(grids)


def test_rows_that_are_no_numbers_count_as_zero_and_end_nothing() -> None:
    for cuda in (True, False):
        worker = Worker("divprune", 5, ALIKE, width=16, cuda=cuda)
        patches = worker.patches.on_cpu if cuda else worker.patches  # type: ignore[attr-defined]
        patches[4 * 24] = torch.nan
        with torch.no_grad(), counting():
            rows = worker.call()
        assert [len(of_image) for of_image in rows] == [5] * 3
        assert all(bool(of_image.isfinite().all()) for of_image in rows)
