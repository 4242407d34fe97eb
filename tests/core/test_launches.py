"""`tokenprune.launches`: what is counted, and what each method may launch and wait for."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.core.test_properties import options_of
from tokenprune import Picks, Selector, VisualTokens
from tokenprune.errors import SelectorError, TokensError, WeightsChangedError
from tokenprune.greedy import engine
from tokenprune.launches import Counted, DeviceTensor, counting, on_device
from tokenprune.registry import build
from tokenprune.selecting import select_many, select_unchecked
from tokenprune.selectors.base import top_of_sizes
from tokenprune.testing import make_item, make_projector
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_host

ROOT = Path(__file__).parents[2]
NUMBERS = torch.arange(12.0).reshape(3, 4)
MASK = NUMBERS[:, 0] > 1

OPERATIONS: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "views": (lambda x: x[1:].T.unsqueeze(0).expand(2, 4, 2).detach(), 0, 0),
    "allocation": (lambda x: torch.empty_like(x), 0, 0),
    "sizes": (lambda x: (x.shape, len(x), x.device, x.numel()), 0, 0),
    "nothing to do": (lambda x: x[:0] + 1, 0, 0),
    "arithmetic": (lambda x: x + 1, 1, 0),
    "in place": (lambda x: x.clone()[0].mul_(2), 2, 0),
    "a copy": (lambda x: x.T.contiguous(), 1, 0),
    "another dtype": (lambda x: x.double(), 1, 0),
    "made there": (lambda x: torch.arange(3, device=x.device), 1, 0),
    "made alike": (lambda x: x.new_zeros(2, device=x.device), 1, 0),
    "sort": (lambda x: x.sort(dim=-1), 4, 0),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        1,
        0,
    ),
    "item": (lambda x: x[0, 0].item(), 1, 1),
    "bool": (lambda x: bool((x > 0).all()), 3, 1),
    "to the host": (lambda x: x.cpu(), 1, 1),
    "as numbers": (lambda x: x.tolist(), 1, 1),
    "from the host": (lambda x: MASK.to(x.device), 1, 1),
    "like one there": (lambda x: NUMBERS.to(x), 1, 1),
    "from numbers": (lambda x: torch.tensor([1, 2], device=x.device), 1, 1),
    "from the host, pinned": (
        lambda x: MASK.pin_memory().to(x.device, non_blocking=True),
        1,
        0,
    ),
    "equal": (lambda x: torch.equal(x, x), 1, 1),
    "nonzero": (lambda x: x[0].nonzero(), 3, 1),
    "by a mask": (lambda x: x[x[:, 0] > 1], 5, 1),
    "by a mask of the host": (lambda x: x[MASK], 2, 1),
    "by a list": (lambda x: x[[0, 2]], 2, 1),
    "by indices": (lambda x: x[x[0, :2].long()], 2, 0),
    "filled by a mask": (lambda x: x.clone().__setitem__(x > 1, 0.0), 3, 0),
    "repeated": (lambda x: x[0].repeat_interleave(x[0].long()), 4, 1),
    "an event, with nothing behind it": (
        lambda x: torch.cuda.current_stream(x.device).record_event().synchronize(),
        0,
        1,
    ),
    "an event, with work behind it": (
        lambda x: (torch.cuda.current_stream(x.device).record_event(), x + 1)[0].synchronize(),
        1,
        0,
    ),
    "to the host together": (lambda x: to_host([x, x[0]]), 2, 1),
    "repeated to a known size": (
        lambda x: x[0].repeat_interleave(x[0].long(), output_size=6),
        3,
        0,
    ),
}
"""What is done to a tensor [3, 4] -> launches and waits."""


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_counted(name: str, inference: bool) -> None:
    work, kernels, waits = OPERATIONS[name]
    there = on_device(NUMBERS.clone())
    with torch.inference_mode(inference), counting() as counted:
        result = work(there)
    with torch.inference_mode(inference):
        expected = MASK if "pinned" in name or "event" in name else work(NUMBERS)
    if isinstance(result, Tensor) and name != "allocation":
        assert torch.equal(result.cpu(), expected)
    said = [(launch.operation, launch.kernels) for launch in counted.launches]
    assert (counted.kernels, counted.waits) == (kernels, waits), said
    assert all(launch.inside(lambda each: each.file == __file__) for launch in counted.launches)


def test_tensors_say_that_they_are_on_the_device() -> None:
    there = on_device({"a": [NUMBERS]})["a"][0]
    assert there.device == torch.device("cuda", 0)
    assert there.is_cuda
    assert isinstance(there + 1, DeviceTensor)
    assert not isinstance(there.cpu(), DeviceTensor)
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        there.numpy()


def test_what_a_gpu_refuses_is_refused() -> None:
    there = on_device(NUMBERS)
    with counting(), pytest.raises(NotImplementedError, match="Move them to one device"):
        there + NUMBERS
    with counting() as counted:
        there * torch.tensor(2.0)  # one number of the CPU travels with the kernel
    assert (counted.kernels, counted.waits) == (1, 0)


def test_places_are_named() -> None:
    there = on_device(NUMBERS)
    with counting() as counted:
        for row in there:
            float(row.sum())
    [(place, count)] = counted.waiting()
    assert count == 3
    assert "core/test_launches.py" in place
    assert "test_places_are_named (aten::_local_scalar_dense)" in place
    assert counted.where(lambda launch: launch.operation == "aten::sum").kernels == 3


KERNEL = """
import torch, triton, triton.language as tl
from tokenprune.launches import counting, on_device

@triton.jit
def double(source, target, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(target + place, 2 * tl.load(source + place))

source = on_device(torch.arange(8.0))
with counting() as counted:
    target = torch.empty_like(source)
    double[(1,)](source, target, 8)
assert target.tolist() == [0, 2, 4, 6, 8, 10, 12, 14], target
assert [launch.operation for launch in counted.launches] == ["triton::double"]
assert (counted.kernels, counted.waits) == (1, 0)
with counting(run_kernels=False) as counted:
    target = torch.empty_like(source)
    double[(1,)](source, target, 8)
assert target.tolist() == [0] * 8, target
assert counted.kernels == 1
"""


def test_triton_kernels_run_interpreted_and_count_as_one(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    # With what compiles kernels for a GPU, and with what never does.
    for interpret in ("0", "1"):
        run = subprocess.run(
            [sys.executable, script],
            env={**os.environ, "TRITON_INTERPRET": interpret},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert run.returncode == 0, run.stderr


@dataclass(frozen=True)
class Bound:
    """At most so many launches, so many more for each further image, and waits."""

    kernels: int
    an_image: int = 0
    waits: int = 1


@contextmanager
def counting_alone(method: str, few: bool = False) -> Iterator[Counted]:
    """Count a method's launches; what kernels choose is compared where they are interpreted."""
    with counting(run_kernels=is_computed(method, few)) as counted, suppress(SelectorError):
        yield counted


GREEDY = (
    *("divprune", "zeroth-order", "information", "relevant-information"),
    *("id-selection", "score-k-center", "visionzip", "prumerge-plus", "holov"),
    *("mmtok", "scope", "dart", "cdpruner", "cdpruner-llm", "prunesid", "fastvid", "vidcom2"),
)
"""Methods whose tokens Triton kernels choose on a GPU, or that make or compare rounded numbers."""

SUMMED = ("feature-norm", "evs")
"""Methods of one kernel, a sum: interpreted for few tokens, and for many in `test_kernels`."""


def is_computed(method: str, few: bool = False) -> bool:
    """Say whether what a method keeps is computed while its launches are counted."""
    return method not in GREEDY and (few or method not in SUMMED)


BOUNDS = {
    "cls-attention": Bound(24),
    "feature-norm": Bound(24),
    "random": Bound(24),
    "uniform": Bound(24),
    "divprune": Bound(24),
    "evs": Bound(24),
    # Of each item peaks, centres and a merge; of a video the segments are waited for, too.
    "fastvid": Bound(145, 125),
    "information": Bound(24),
    # Each image's sensitivity is a product of its own, so that it is the same in any batch.
    "zeroth-order": Bound(24, 10),
    "flexselect": Bound(24),
    "mmtok": Bound(24),
    "scope": Bound(24),
    # Stacking four items is two launches more.
    "dart": Bound(24, 1),
    "cdpruner": Bound(24),
    "cdpruner-llm": Bound(24),
    # A decomposition for each image, and quotas that depend on how large its groups are.
    "prunesid": Bound(88, 20, waits=2),
    # Candidates are chosen before the question is read: 26 launches of these.
    "relevant-information": Bound(51, 1),
    # Means, likeness and counts one after another: each needs all of the one before.
    "vidcom2": Bound(84, 1),
    "hiprune": Bound(24, 1),
    "id-selection": Bound(24),
    "score-k-center": Bound(24),
    # What is merged is a sort and a dozen small steps, and is checked for each image: ten launches.
    "visionzip": Bound(47, 11),
    "prumerge-plus": Bound(65, 11),
    # Quotas and variances of runs are 80 small steps of torch.
    "holov": Bound(100, 1),
    # Ten launches in each of 70 rounds: a single program for an image would take longer.
    "vispruner": Bound(758, 1),
}
"""What one image, and four in a batch, may launch and wait for, once the model is known."""


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("images", [1, 4])
def test_launches_and_waits_of_every_method(method: str, images: int) -> None:
    projector = make_projector()
    for layer in (projector.first, projector.second, projector.norm):
        cast(nn.Module, layer).eval()
    on_cpu = [make_item((1, 23, 25), seed) for seed in range(images)]
    there = [on_device(make_item((1, 23, 25), seed, projector=projector)) for seed in range(images)]
    selector, bound = build(method, options_of(method)), BOUNDS[method]
    for keep in (16, 256):
        for _ in range(2):  # the first call works out what holds for the model
            with counting_alone(method) as counted:
                selections = select_many(there, selector, keep)
        if is_computed(method):
            for one, expected in zip(selections, select_many(on_cpu, selector, keep), strict=True):
                assert one.kept.is_cuda
                assert torch.equal(one.kept.cpu(), expected.kept)
        most = bound.kernels + (images - 1) * bound.an_image
        assert counted.kernels <= most, [launch.operation for launch in counted.launches]
        assert counted.waits <= bound.waits, counted.waiting()


@pytest.mark.parametrize(
    ("method", "kernels", "an_item", "waits"),
    # fastvid's segments depend on the data, and so does how much there is to launch.
    [("evs", 24, 1, 1), ("fastvid", 232, 200, 2), ("vidcom2", 84, 1, 1)],
)
@pytest.mark.parametrize("videos", [1, 4])
def test_launches_and_waits_of_videos(
    method: str, kernels: int, an_item: int, waits: int, videos: int
) -> None:
    on_cpu = [without_projector((8, 6, 6), seed) for seed in range(videos)]
    selector = build(method, options_of(method))
    few = videos == 1
    with counting_alone(method, few) as counted:
        selections = select_many([on_device(one) for one in on_cpu], selector, 128)
    if is_computed(method, few):
        for one, expected in zip(selections, select_many(on_cpu, selector, 128), strict=True):
            assert torch.equal(one.kept.cpu(), expected.kept)
    most = kernels + (videos - 1) * an_item
    assert counted.kernels <= most, [launch.operation for launch in counted.launches]
    assert counted.waits <= waits, counted.waiting()


def without_projector(grid: tuple[int, int, int], seed: int) -> VisualTokens:
    """Return an item that may be put on the device; others share their projector."""
    return replace(make_item(grid, seed), projector=None)


@pytest.mark.parametrize(
    "method", ["cls-attention", "feature-norm", "random", "uniform", "divprune", "information"]
)
@pytest.mark.parametrize("keep", [7, 0.3])
def test_items_of_different_sizes_are_selected_together(method: str, keep: float) -> None:
    grids = [(1, 5, 4), (1, 3, 3), (1, 5, 4), (1, 7, 8), (1, 2, 4)]
    on_cpu = [without_projector(grid, seed) for seed, grid in enumerate(grids)]
    selector = build(method, options_of(method))
    alone = [select_many([item], selector, keep)[0] for item in on_cpu]
    for _ in range(2):
        with counting_alone(method, few=True) as counted:
            together = select_many([on_device(item) for item in on_cpu], selector, keep)
    for one, expected in zip(
        together if is_computed(method, few=True) else (), alone, strict=False
    ):
        assert one.grid == expected.grid
        assert one.kept.tolist() == expected.kept.tolist()
        assert (one.scores is None) == (expected.scores is None)
        if one.scores is not None and expected.scores is not None:
            assert torch.equal(one.scores.cpu(), expected.scores)
    assert counted.kernels <= 28, [launch.operation for launch in counted.launches]
    assert counted.waits == 1


def test_a_tie_at_the_lowest_score_goes_to_the_item_and_not_to_its_padding() -> None:
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf, 5.0], [1.0, 2.0, 3.0, 4.0]])
    assert top_of_sizes(scores, (3, 4), (3, 2)).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert top_of_sizes(scores, (3, 4), (2, 2)).tolist() == [[0, 1], [2, 3]]


class Third(Selector):
    """Somebody's own, which returns what it is told."""

    name: ClassVar[str] = "third"
    summary: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("features",)
    picks: ClassVar[Any] = None

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        picks: Picks = self.picks
        return picks


@pytest.mark.parametrize(
    ("kept", "scores", "says"),
    [
        ([[0, 1, 99]], None, r"\[0, 1, 99\]; they must ascend"),
        ([[1, 0, 2]], None, r"\[1, 0, 2\]; they must ascend"),
        ([[-1, 0, 2]], None, r"\[-1, 0, 2\]; they must ascend"),
        ([[0, 1, 2]], torch.full((1, 9), torch.nan), "hold NaN"),
    ],
)
def test_what_is_wrong_is_told_when_the_device_has_computed_it(
    kept: Any, scores: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks = Picks(on_device(torch.tensor(kept)), on_device(scores))
    monkeypatch.setattr(Third, "picks", picks)
    item = on_device(VisualTokens((1, 3, 3), features=torch.ones(9, 4), label="image 5"))
    with counting() as counted:
        unchecked = select_unchecked([item], Third(), 3)
    assert counted.waits == 0
    # Used as an index before it is checked, it must not end the process.
    assert (
        0 <= int(unchecked.selections[0].kept.min()) <= int(unchecked.selections[0].kept.max()) < 9
    )
    with counting(), pytest.raises(SelectorError, match=f"image 5: .*'third'.*{says}"):
        unchecked.checked()


@pytest.mark.parametrize("method", ["feature-norm", "divprune", "information"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_of_the_encoder_that_are_none_raise_the_same_error(method: str, bad: float) -> None:
    item = without_projector((1, 4, 4), 0)
    broken = replace(without_projector((1, 4, 4), 1), label="image 8")
    for name in ("features", "embeddings"):
        getattr(broken, name)[3, 1] = bad
    selector = build(method, options_of(method))
    errors = []
    for items in ([item, broken], on_device([item, broken])):
        with counting(run_kernels=False), pytest.raises(TokensError) as raised:
            select_many(items, selector, 4)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert re.match(r"image 8: (features|embeddings) holds 1 NaN or infinite values", errors[0])


def test_a_method_of_any_sizes_has_to_say_how_it_selects_them() -> None:
    with pytest.raises(SelectorError, match=r"says takes_sizes .* Define `select_sizes`"):
        type("Half", (Third,), {"takes_sizes": True})


def test_weights_that_are_edited_behind_torchs_back_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "fuses", lambda _: False)  # what is computed is compared
    projector = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8))
    there: Any = on_device(copy.deepcopy(projector.eval()))
    item = without_projector((1, 4, 4), 3)
    item = replace(
        item,
        features=torch.randn(16, 12),
        embeddings=torch.randn(16, 8),
        question_embeddings=torch.randn(5, 8),
    )
    selector = build("zeroth-order", {"diversity": False})
    for edited in (False, True, False):
        if edited:
            factors = torch.linspace(0.1, 3.0, 12)
            cast(nn.Linear, projector[1]).weight.data.mul_(factors)
            there[1].weight.data.on_cpu.mul_(factors)
        expected = select_many([replace(item, projector=projector)], selector, 5)[0]
        with counting():
            [found] = select_many([replace(on_device(item), projector=there)], selector, 5)
        assert expected.scores is not None
        assert found.scores is not None
        torch.testing.assert_close(found.scores.cpu(), expected.scores)
    with counting():
        unchecked = select_unchecked([replace(on_device(item), projector=there)], selector, 5)
        there[1].weight.data.on_cpu.mul_(2.0)
        unchecked.checked()
        unchecked = select_unchecked([replace(on_device(item), projector=there)], selector, 5)
    with counting(), pytest.raises(WeightsChangedError, match="Call again"):
        unchecked.checked()


def test_every_method_has_a_bound() -> None:
    # flexselect-lite runs layers of transformers, which launch what they launch.
    assert {*BOUNDS, "flexselect-lite"} == set(tokenprune.methods())
