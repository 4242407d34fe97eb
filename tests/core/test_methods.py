"""Each method against a straight-line version of its formula, in numpy and plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tokenprune
from tokenprune import MLPProjector, VisualTokens
from tokenprune.errors import OptionError, TokensError
from tokenprune.registry import build
from tokenprune.selectors.zeroth_order import _with_exact_ties

Array = NDArray[np.float64]
C, H, D = 10, 40, 14
GRID = (2, 3, 8)
N = 48


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(norm: bool) -> MLPProjector:
    first, second = nn.Linear(C, H).double(), nn.Linear(H, D).double()
    layer_norm = nn.LayerNorm(C).double() if norm else None
    for seed, module in enumerate((first, second, layer_norm)):
        for parameter in module.parameters() if module is not None else ():
            parameter.data.copy_(draw(*parameter.shape, seed=seed + parameter.ndim))
    return MLPProjector(first, nn.GELU(), second, layer_norm)


def item(seed: int = 0, norm: bool = False) -> VisualTokens:
    features = draw(N, C, seed=seed) * draw(N, 1, seed=seed + 1).abs()
    mlp = projector(norm)
    with torch.no_grad():
        embeddings = mlp(features)
    attention = draw(5, N + 1, seed=seed + 2).softmax(-1)[:, 1:]
    return VisualTokens(
        grid=GRID,
        features=features,
        embeddings=embeddings,
        cls_attention=attention,
        projector=mlp,
    )


def array(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return np.asarray(tensor.detach().double().numpy(), dtype=np.float64)


def highest(scores: Array, keep: int) -> list[int]:
    """Indices of the highest scores by repeated search, the first of equals."""
    left, kept = list(range(len(scores))), []
    for _ in range(keep):
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        kept.append(best)
    return sorted(kept)


def cosine(a: Array, b: Array) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True))) / (
        math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    )


def project(mlp: MLPProjector, x: Array) -> Array:
    """Compute linear, GELU, linear from the numbers alone."""
    if mlp.norm is not None:
        x = (x - x.mean()) / math.sqrt(float(((x - x.mean()) ** 2).mean()) + 1e-5)
        x = x * array(getattr(mlp.norm, "weight", None)) + array(getattr(mlp.norm, "bias", None))
    z = array(mlp.first.weight) @ x + array(mlp.first.bias)
    a = np.array([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in z])
    assert mlp.second is not None
    result: Array = array(mlp.second.weight) @ a + array(mlp.second.bias)
    return result


def directions(count: int, seed: int) -> Array:
    """Draw as the method does, in float32; only the scaling is done again."""
    drawn = torch.randn(count, C, generator=torch.Generator().manual_seed(seed)).double()
    return array(drawn / drawn.norm(dim=-1, keepdim=True))


def sensitivity(mlp: MLPProjector, features: Array, units: Array, step: float, count: int) -> Array:
    """Average ||[M(x + h u) - M(x - h u)] / 2h|| over the directions, one at a time."""
    scores = []
    for x in features:
        total = 0.0
        for u in units[:count]:
            delta = (project(mlp, x + step * u) - project(mlp, x - step * u)) / (2 * step)
            total += math.sqrt(float(sum(delta**2)))
        scores.append(total / count)
    return np.array(scores)


def aware_of_diversity(scores: Array, z: Array, keep: int) -> list[int]:
    """Sensitivity-aware diversity, straight from the formula."""
    s = (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
    kept = [int(np.argmax(s))]
    while len(kept) < keep:
        best, best_score = -1, -math.inf
        for i in range(len(s)):
            if i in kept:
                continue
            score = s[i] * (1.0 - max(cosine(z[i], z[j]) for j in kept))
            if score > best_score:
                best, best_score = i, score
        kept.append(best)
    return sorted(kept)


def spread_out(z: Array, keep: int) -> list[int]:
    """DivPrune, with the whole matrix of distances."""
    count = len(z)
    distance = np.array([[1.0 - cosine(z[i], z[j]) for j in range(count)] for i in range(count)])
    kept = [int(np.argmax([sorted(distance[:, i])[1] for i in range(count)]))]
    while len(kept) < keep:
        smallest = [
            -1.0 if i in kept else min(float(distance[i, j]) for j in kept) for i in range(count)
        ]
        kept.append(int(np.argmax(smallest)))
    return sorted(kept)


KEEPS = (1, 2, 7, 24, 48)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_cls_attention(seed: int) -> None:
    tokens = item(seed)
    attention = array(tokens.cls_attention)
    expected = np.array([sum(attention[h, i] for h in range(5)) / 5 for i in range(N)])
    for keep in KEEPS:
        selection = tokenprune.select(tokens, "cls-attention", keep)
        assert selection.kept.tolist() == highest(expected, keep)
        np.testing.assert_allclose(array(selection.scores), expected, rtol=1e-6)
    averaged = VisualTokens(grid=GRID, cls_attention=torch.tensor(expected))
    kept = tokenprune.select(averaged, "cls-attention", 7).kept.tolist()
    assert kept == highest(expected, 7)


@pytest.mark.parametrize("seed", [0, 10])
def test_feature_norm(seed: int) -> None:
    tokens = item(seed)
    expected = np.array([math.sqrt(sum(v * v for v in row)) for row in array(tokens.features)])
    for keep in KEEPS:
        selection = tokenprune.select(tokens, "feature-norm", keep)
        assert selection.kept.tolist() == highest(expected, keep)
        np.testing.assert_allclose(array(selection.scores), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_divprune(seed: int) -> None:
    tokens = item(seed)
    for keep in KEEPS:
        selection = tokenprune.select(tokens, "divprune", keep)
        assert selection.kept.tolist() == spread_out(array(tokens.embeddings), keep)
        assert selection.scores is None


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("seed", [0, 10])
def test_zeroth_order_as_published(seed: int, norm: bool) -> None:
    tokens = item(seed, norm)
    mlp = tokens.projector
    assert isinstance(mlp, MLPProjector)
    expected = sensitivity(mlp, array(tokens.features), directions(6, seed), 0.01, 6)
    options: dict[str, Any] = {"estimator": "finite-difference", "directions": 6, "seed": seed}
    for keep in KEEPS:
        selection = tokenprune.select(tokens, "zeroth-order", keep, **options)
        assert selection.scores is not None
        assert selection.scores.dtype == torch.float32
        np.testing.assert_allclose(array(selection.scores), expected, rtol=1e-5)
        assert selection.kept.tolist() == aware_of_diversity(
            expected, array(tokens.embeddings), keep
        )
        plain = tokenprune.select(tokens, "zeroth-order", keep, diversity=False, **options)
        assert plain.kept.tolist() == highest(expected, keep)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("structure", ["MLPProjector", "module", "function"])
def test_jvp_is_the_limit_of_finite_differences(structure: str, norm: bool) -> None:
    tokens = item(0, norm)
    mlp = tokens.projector
    assert isinstance(mlp, MLPProjector)
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "MLPProjector": mlp,
        "module": nn.Sequential(
            mlp.norm or nn.Identity(), _module(mlp.first), nn.GELU(), _module(mlp.second)
        ),
        "function": lambda x: mlp(x),
    }
    tokens = VisualTokens(GRID, tokens.features, tokens.embeddings, projector=shapes[structure])
    batch = tokenprune.tokens.stack([tokens], ("features", "embeddings", "projector"))
    exact = build("zeroth-order", {"estimator": "jvp", "directions": 6, "seed": 3}).score(batch)[0]
    for step, tolerance in ((1e-4, 1e-3), (1e-6, 1e-7)):
        near = sensitivity(mlp, array(tokens.features), directions(6, 3), step, 6)
        np.testing.assert_allclose(array(exact), near, rtol=tolerance)


def _module(layer: object) -> nn.Module:
    assert isinstance(layer, nn.Module)
    return layer


@pytest.mark.parametrize("norm", [False, True])
def test_frobenius_is_the_root_mean_square_over_all_directions(norm: bool) -> None:
    tokens = item(0, norm)
    assert tokens.features is not None
    assert tokens.projector is not None
    jacobian = torch.stack([torch.func.jacrev(tokens.projector)(x) for x in tokens.features])
    expected = array(jacobian.square().sum((1, 2)).div(C).sqrt())
    for keep in KEEPS:
        selection = tokenprune.select(tokens, "zeroth-order", keep)  # the default
        np.testing.assert_allclose(array(selection.scores), expected, rtol=1e-6)
        assert selection.kept.tolist() == aware_of_diversity(
            expected, array(tokens.embeddings), keep
        )


def test_every_estimator_in_float32_and_blocks_agrees_with_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = item(0, True)
    mlp = tokens.projector
    assert isinstance(mlp, MLPProjector)
    expected = {
        estimator: tokenprune.select(tokens, "zeroth-order", N, estimator=estimator).scores
        for estimator in ("frobenius", "jvp", "finite-difference")
    }
    monkeypatch.setattr("tokenprune.tower.projectors._ROWS", 7)
    monkeypatch.setattr("tokenprune.tower.projectors._BLOCK", 9)
    monkeypatch.setattr("tokenprune.tower.projectors._ENTRIES", 9000)
    monkeypatch.setattr("tokenprune.selectors.zeroth_order._ROWS", 500)
    for module in (mlp.first, mlp.second, mlp.norm):
        _module(module).float()
    low = MLPProjector(mlp.first, mlp.activation, mlp.second, mlp.norm)
    assert tokens.features is not None
    tokens = VisualTokens(GRID, tokens.features.float(), tokens.embeddings, projector=low)
    for estimator, scores in expected.items():
        got = tokenprune.select(tokens, "zeroth-order", N, estimator=estimator).scores
        tolerance = 2e-4 if estimator == "finite-difference" else 1e-5
        np.testing.assert_allclose(array(got), array(scores), rtol=tolerance)


def test_tokens_of_no_sensitivity_come_last() -> None:
    first = nn.Linear(2, 2, bias=False)
    first.weight.data.copy_(torch.eye(2))
    second = nn.Linear(2, 3, bias=False)
    second.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    mlp = MLPProjector(first, nn.ReLU(), second)
    # Slopes (0, 0), (1, 0), (1, 1), (1, 1), (0, 0), (0, 0): the third and fourth are copies.
    features = torch.tensor([[-1, -1], [1, -1], [1, 2], [1, 2], [-2, -1], [-3, -3]]).float()
    tokens = VisualTokens((1, 2, 3), features, mlp(features), projector=mlp)
    order: list[int] = []
    for keep in range(1, 7):
        kept = tokenprune.select(tokens, "zeroth-order", keep).kept.tolist()
        order += [index for index in kept if index not in order]
        assert sorted(order) == kept
    assert order == [2, 1, 3, 0, 4, 5]


def test_divprune_takes_no_token_twice() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    tokens = VisualTokens((1, 1, 5), embeddings=rows.half())
    # The row of zeros is at distance 1 from all, and so is the third.
    for keep, kept in ((1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        assert tokenprune.select(tokens, "divprune", keep).kept.tolist() == kept


def test_random_is_a_permutation_of_its_seed() -> None:
    tokens = VisualTokens((1, 10, 50))
    kept = {
        seed: set(tokenprune.select(tokens, "random", 100, seed=seed).kept.tolist())
        for seed in range(20)
    }
    assert all(len(places) == 100 for places in kept.values())
    shared = [len(kept[a] & kept[b]) for a in kept for b in kept if a < b]
    assert 17 < sum(shared) / len(shared) < 23  # 100 * 100 / 500 = 20 where independent


@pytest.mark.parametrize(
    "grid", [(1, 24, 24), (1, 7, 13), (1, 16, 1), (1, 1, 9), (8, 5, 7), (3, 1, 1), (5, 4, 12)]
)
def test_uniform_is_even(grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    total = frames * rows * columns
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    looked_at = {*range(1, total + 1, max(1, total // 60)), total}
    for keep in range(1, total + 1):
        mask = tokenprune.select(VisualTokens(grid), "uniform", keep).grid_mask
        assert int(mask.sum()) == keep
        if keep not in looked_at:
            continue
        in_frames = mask.sum((1, 2))
        assert int((in_frames > 0).sum()) == min(keep, frames)
        for counts in (in_frames, *(frame.sum(1) for frame in mask)):
            used = counts[counts > 0]
            assert used.numel() == 0 or int(used.max() - used.min()) <= 1
            assert _gaps_differ_by_at_most_one(counts.nonzero()[:, 0])
        for line in mask.flatten(0, 1):
            assert _gaps_differ_by_at_most_one(line.nonzero()[:, 0])
        for frame in mask[in_frames > 0]:
            # No place is farther from a kept one than the side of the cell that is kept for it.
            count = int(frame.sum())
            cell = max(math.sqrt(rows * columns / count), rows / count, columns / count)
            away = (places[:, None] - frame.nonzero()[None]).abs().amax(-1).amin(-1)
            assert int(away.max()) <= math.ceil(cell)


def _gaps_differ_by_at_most_one(places: Tensor) -> bool:
    gaps = places.diff()
    return gaps.numel() == 0 or int(gaps.max() - gaps.min()) <= 1


def test_frobenius_says_what_to_do_without_weights() -> None:
    tokens = item()
    opaque = VisualTokens(GRID, tokens.features, tokens.embeddings, projector=lambda x: x)
    with pytest.raises(OptionError, match=r"function does not show.*estimator='jvp'.*MLPProjector"):
        tokenprune.select(opaque, "zeroth-order", 4, estimator="frobenius")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("estimator", ["frobenius", "jvp", "finite-difference"])
def test_a_projector_cut_to_a_rank(estimator: str, norm: bool) -> None:
    tokens = item(0, norm)
    mlp, cut = projector(norm), projector(norm)
    assert mlp.second is not None
    assert cut.second is not None
    options: dict[str, Any] = {"estimator": estimator, "directions": 6}
    for scale in (1.0, 3.0):  # weights that change are cut anew
        for layer, own in ((mlp.first, cut.first), (mlp.second, cut.second)):
            layer.weight.data.mul_(scale)
            left, values, right = np.linalg.svd(array(layer.weight))
            low = sum(values[i] * np.outer(left[:, i], right[i]) for i in range(3))
            own.weight.data.copy_(torch.tensor(low))
        scores = [
            array(tokenprune.select(given, "zeroth-order", 5, rank=rank, **options).scores)
            for given, rank in (
                (dataclasses.replace(tokens, projector=mlp), 3),
                (dataclasses.replace(tokens, projector=cut), None),
                (dataclasses.replace(tokens, projector=mlp), 400),
                (dataclasses.replace(tokens, projector=mlp), None),
            )
        ]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)
        np.testing.assert_allclose(scores[2], scores[3], rtol=1e-6)
        assert not np.allclose(scores[0], scores[2], rtol=0.05)


def test_a_rank_needs_weights() -> None:
    tokens = dataclasses.replace(item(), projector=lambda x: x)
    with pytest.raises(OptionError, match=r"rank=2 .* needs the projector's weights.*Leave the"):
        tokenprune.select(tokens, "zeroth-order", 4, rank=2)
    with pytest.raises(OptionError, match=r"rank=0 .* must be at least 1 \(the authors have 128"):
        build("zeroth-order", {"rank": 0})


@pytest.mark.parametrize("estimator", ["jvp", "finite-difference"])
def test_half_precision_projectors_are_lifted_or_refused(estimator: str) -> None:
    tokens = item()
    mlp = tokens.projector
    assert isinstance(mlp, MLPProjector)
    module = nn.Sequential(_module(mlp.first), nn.GELU(), _module(mlp.second)).bfloat16()
    assert tokens.features is not None
    scores = {}
    for name, shape in (("module", module), ("mlp", mlp)):
        low = VisualTokens(GRID, tokens.features.bfloat16(), tokens.embeddings, projector=shape)
        scores[name] = array(
            tokenprune.select(low, "zeroth-order", 4, estimator=estimator, directions=8).scores
        )
    np.testing.assert_allclose(scores["module"], scores["mlp"], rtol=1e-3)
    assert next(module.parameters()).dtype == torch.bfloat16
    for opaque in (lambda x: module(x), lambda x: module(x.bfloat16())):
        low = VisualTokens(GRID, tokens.features, tokens.embeddings, projector=opaque)
        with pytest.raises(OptionError, match="MLPProjector"):
            tokenprune.select(low, "zeroth-order", 4, estimator=estimator)


def test_a_projector_that_overflows_is_named() -> None:
    tokens = item()
    mlp = projector(False)
    assert mlp.second is not None
    mlp.second.weight.data.fill_(math.inf)
    bad = VisualTokens(GRID, tokens.features, tokens.embeddings, projector=mlp, label="image 3")
    with pytest.raises(TokensError, match=r"image 3.*zeroth-order.*NaN or infinite"):
        tokenprune.select(bad, "zeroth-order", 4)


def test_copies_tie_even_where_arithmetic_depends_on_position() -> None:
    source = torch.tensor([0, 1, 0, 2, 1, 0])
    rows = torch.randn(3, C, generator=torch.Generator().manual_seed(0))[source]
    [scores] = _with_exact_ties(lambda x: torch.arange(len(x)) * 1e-7 + x.sum(-1), rows[None])
    assert torch.equal(scores, scores[torch.tensor([0, 1, 0, 3, 1, 0])])


def most_information(
    embeddings: Array, noise: float, keep: int, weights: Array | None = None
) -> list[int]:
    """Greedy log det(I + K_S / σ²), each determinant computed from nothing."""
    lengths = np.linalg.norm(embeddings, axis=1)
    rows = embeddings / np.sqrt(lengths)[:, None]  # so that K_ij = cos * sqrt(length * length)
    if weights is not None:
        rows = rows * np.sqrt(weights)[:, None]
    level = noise * float(np.mean(np.sum(rows**2, axis=1)))
    kept: list[int] = []
    while len(kept) < keep:
        gains = [
            -math.inf
            if i in kept
            else float(
                np.linalg.slogdet(
                    np.eye(len(kept) + 1) + rows[[*kept, i]] @ rows[[*kept, i]].T / level
                )[1]
            )
            for i in range(len(rows))
        ]
        kept.append(int(np.argmax(gains)))
    return sorted(kept)


@pytest.mark.parametrize("noise", [0.1, 1.0, 7.0])
def test_information_maximises_the_determinant(noise: float) -> None:
    tokens = item(seed=3)
    rows = array(tokens.embeddings)
    for keep in (1, 5, 13, 30):  # 30 is above D = 14, the rank
        selection = tokenprune.select(tokens, "information", keep, noise=noise)
        assert selection.kept.tolist() == most_information(rows, noise, keep, 1 + changed(rows))
        assert selection.scores is None


def test_information_counts_how_far_a_token_of_an_image_is_from_the_mean() -> None:
    image = VisualTokens(grid=(1, 5, 6), embeddings=draw(30, D, seed=7) + 2 * draw(D, seed=8))
    rows = array(image.embeddings)
    distances = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    weights = 1 + distances / np.linalg.norm(rows, axis=1)
    by_length = 0
    for keep in (1, 4, 9, 20):
        kept = tokenprune.select(image, "information", keep).kept.tolist()
        assert kept == most_information(rows, 0.2, keep, weights)
        by_length += kept == most_information(rows, 0.2, keep)
    assert by_length < 4


def test_relevant_information_weighs_by_the_last_tokens_attention() -> None:
    tokens = dataclasses.replace(
        item(seed=4), query_attention=draw(4, 3, N + 2, seed=9).softmax(-1)[..., 2:]
    )
    given = tokens.query_attention
    assert isinstance(given, Tensor)
    looked_at = array(given)[:, -1].mean(axis=0)
    weights = 1 + looked_at / looked_at.mean()
    rows = array(tokens.embeddings)
    for keep in (1, 5, 13):
        selection = tokenprune.select(tokens, "relevant-information", keep)
        counted = weights + changed(rows)
        assert selection.kept.tolist() == most_information(rows, 0.2, keep, counted)
        np.testing.assert_allclose(array(selection.scores), weights, rtol=1e-5)


def test_an_unread_token_weighs_as_the_most_similar_read_one() -> None:
    tokens = dataclasses.replace(
        item(seed=4), query_attention=draw(4, 3, N + 2, seed=9).softmax(-1)[..., 2:]
    )
    given = tokens.query_attention
    assert isinstance(given, Tensor)
    looked_at = array(given)[:, -1].mean(axis=0)
    rows = array(tokens.embeddings)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for share, least, count in ((0.25, 5, 12), (0.05, 7, 7)):
        read = most_information(rows, 0.2, count, 1 + changed(rows))
        weights = 1 + looked_at[read] / looked_at[read].mean()
        weights = weights[(unit @ unit[read].T).argmax(axis=1)]
        options = {"candidates": share, "min_candidates": least}
        selection = tokenprune.select(tokens, "relevant-information", 5, **options)
        np.testing.assert_allclose(array(selection.scores), weights, rtol=1e-5)
        counted = weights + changed(rows)
        assert selection.kept.tolist() == most_information(rows, 0.2, 5, counted)
    with pytest.raises(OptionError, match=r"candidates=0\.0 .* above 0 and at most 1\.0"):
        build("relevant-information", {"candidates": 0.0})
    with pytest.raises(OptionError, match=r"min_candidates=0 .* at least 1"):
        build("relevant-information", {"min_candidates": 0})


def test_of_a_long_video_every_set_of_frames_has_its_share() -> None:
    frames = draw(6, 8, D, seed=5)
    frames[3, 2:6] = frames[1, 2:6]  # still for one step of a set
    video = VisualTokens(grid=(6, 2, 4), embeddings=frames.flatten(0, 1))
    kept = tokenprune.select(video, "information", 9, frames_per_set=3).kept.tolist()
    expected = []
    for first, share in ((0, 5), (1, 4)):  # frames 0, 2, 4 and frames 1, 3, 5
        own = [frame * 8 + token for frame in (first, first + 2, first + 4) for token in range(8)]
        rows = array(video.embeddings)[own]
        expected += [own[i] for i in most_information(rows, 0.2, share, 1 + changed(rows, 3))]
    assert kept == sorted(expected)


def changed(rows: Array, frames: int = GRID[0]) -> Array:
    """How much each token of a video changed, over the mean; the first frame has the mean."""
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).reshape(frames, -1, D)
    change = np.array(
        [[1 - unit[t, i] @ unit[t - 1, i] for i in range(unit.shape[1])] for t in range(1, frames)]
    )
    change /= change.mean()
    return np.concatenate([np.ones(unit.shape[1]), change.ravel()])


def test_what_stands_still_is_known() -> None:
    """Of a still video one frame's tokens are kept, and those of another where it differs."""
    picture = draw(12, D, seed=8)
    frames = picture.repeat(4, 1, 1) + 1e-3 * draw(4, 12, D, seed=9)
    frames[2, 5:8] = draw(3, D, seed=10)
    video = VisualTokens(grid=(4, 3, 4), embeddings=frames.flatten(0, 1))
    kept = tokenprune.select(video, "information", 15)
    assert set(kept.kept.tolist()) >= {29, 30, 31}
    places = {token % 12 if token not in (29, 30, 31) else token for token in kept.kept.tolist()}
    assert len(places) >= 14
    same = VisualTokens(grid=(4, 3, 4), embeddings=picture.repeat(4, 1))
    assert {
        token % 12 for token in tokenprune.select(same, "information", 12).kept.tolist()
    } == set(range(12))


@pytest.mark.parametrize("options", [{"noise": 0.0}, {"noise": -1.0}])
@pytest.mark.parametrize("method", ["information", "relevant-information"])
def test_noise_must_be_above_0(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"noise=.* must be above 0; the default is 0\.2"):
        build(method, options)
