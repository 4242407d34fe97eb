"""`check_selector`: tests of the contract that every selector keeps, for authors of selectors.

Each check makes items of random numbers, selects, and raises `SelectorError` where the contract is
broken. It needs torch alone; call it from any test runner:

    from tokenprune.testing import check_selector

    def test_my_method():
        check_selector(MyMethod())
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenprune.budget import tokens_kept
from tokenprune.errors import SelectorError, TokensError, did_you_mean
from tokenprune.selecting import select_many
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.tokens import Projector, VisualTokens
from tokenprune.tower.projectors import MLPProjector

C, D, HEADS, JOINT, TAPS = 13, 17, 16, 7, 2
"""Widths of the features and embeddings that `make_item` makes, heads of its attention, the width
of what it has of images and text in one space, and how many deepstack taps it has."""

GRIDS = ((1, 1, 1), (1, 3, 5), (2, 4, 9), (1, 23, 25))
_QUESTION = (3, 1, 4, 1, 5)
_MANY = 5000  # tokens; of up to 4,096 a matrix of all pairs is allowed


class ItemMaker(Protocol):
    """Makes an item with everything in the selector's `needs`."""

    def __call__(
        self,
        grid: tuple[int, int, int],
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        source: Tensor | None = None,
        label: str = "the item",
    ) -> VisualTokens:
        """Return the item; the same arguments give the same numbers.

        Parameters
        ----------
        grid
            (frames, rows, columns).
        seed
            Of the numbers.
        dtype
            Of all floating point tensors.
        source
            LongTensor [N], which token each one is an exact copy of; None for no copies.
        label
            The item's.
        """


def make_projector() -> MLPProjector:
    """Return a projector C -> D with a layer norm in front, always the same."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    first, second, norm = nn.Linear(C, 29), nn.Linear(29, D), nn.LayerNorm(C)
    torch.random.set_rng_state(state)
    return MLPProjector(first.requires_grad_(False), nn.GELU(), second.requires_grad_(False), norm)


def make_item(
    grid: tuple[int, int, int],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    source: Tensor | None = None,
    label: str = "the item",
    projector: Projector | None = None,
) -> VisualTokens:
    """Return an item with every input there is; see `ItemMaker`.

    Parameters
    ----------
    grid, seed, dtype, source, label
        See `ItemMaker`.
    projector
        None for `make_projector`'s.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]
    copies = torch.arange(total, device="cpu") if source is None else source

    def drawn(*shape: int, normal: bool = True) -> Tensor:
        draw = torch.randn if normal else torch.rand
        return draw(*shape, generator=generator, dtype=torch.float32, device="cpu")

    features, embeddings = drawn(total, C)[copies], drawn(total, D)[copies]
    attention = drawn(HEADS, total, normal=False)[:, copies]
    question = drawn(HEADS, 3, total, normal=False)[..., copies]
    others: dict[str, Any] = {
        "received_attention": drawn(HEADS, total, normal=False)[:, copies],
        "middle_attention": drawn(HEADS, total, normal=False)[:, copies],
        "wide_attention": drawn(total, normal=False)[copies],
        "keys": drawn(HEADS, total, 5)[:, copies],
        "question_embeddings": drawn(len(_QUESTION), D),
        "image_embeddings": drawn(total, JOINT)[copies],
        "text_embeddings": drawn(2, JOINT),
        "frame_features": drawn(grid[0], C),
        "pooling_attention": drawn(total, normal=False)[copies],
        "deepstack": drawn(TAPS, total, D)[:, copies],
    }
    return VisualTokens(
        grid=grid,
        features=features.to(dtype),
        embeddings=embeddings.to(dtype),
        cls_attention=attention.to(dtype),
        projector=_PROJECTOR if projector is None else projector,
        query_attention=question.to(dtype),
        question=torch.tensor(_QUESTION, device="cpu"),
        label=label,
        **{name: value.to(dtype) for name, value in others.items()},
    )


_PROJECTOR = make_projector()


def check_selector(
    selector: Selector, *, make: ItemMaker = make_item, skip: Collection[str] = ()
) -> None:
    """Run every check of `CHECKS` on a selector.

    Parameters
    ----------
    selector
        With the options to check.
    make
        Makes its items, where those of `make_item` do not fit.
    skip
        Names out of `CHECKS` that do not apply to the method. For example, a method that uses a
        token's position cannot promise that the first of equal tokens wins.

    Raises
    ------
    SelectorError
        For the first check that fails; the message has its name.
    """
    for name in skip:
        if name not in CHECKS:
            raise SelectorError(f"there is no check {name!r} to skip. {did_you_mean(name, CHECKS)}")
    for name, check in CHECKS.items():
        if name not in skip:
            check(selector, make)


def exactly_keep(selector: Selector, make: ItemMaker) -> None:
    """Keep exactly `keep` tokens, ascending, the same twice in a row, in any float dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for grid in GRIDS:
            tokens = make(grid, dtype=dtype)
            total = tokens.total
            for keep in (1, max(1, total // 7), max(1, total - 1), total, total + 5, 0.3):
                case = f"exactly_keep: grid {grid}, keep {keep}, {dtype}"
                selection = _select(selector, tokens, keep)
                wanted = tokens_kept(keep, total)
                if len(selection) != wanted:
                    raise SelectorError(f"{case}: {len(selection)} tokens stay, not {wanted}.")
                _same(case, "twice in a row", selection, _select(selector, tokens, keep))


def same_in_any_batch(selector: Selector, make: ItemMaker) -> None:
    """Prune an item in a batch of others as it is pruned alone."""
    for dtype in (torch.float32, torch.bfloat16):
        items = [make(GRIDS[index % 4], index, dtype=dtype) for index in (3, 1, 7, 0, 2, 5, 11)]
        for keep in (0.2, 5, 1.0):
            together = select_many(items, selector, keep)
            for tokens, selection in zip(items, together, strict=True):
                case = f"same_in_any_batch: grid {tokens.grid}, keep {keep}, {dtype}"
                _same(case, "in a batch and alone", selection, _select(selector, tokens, keep))


def same_whatever_is_known(selector: Selector, make: ItemMaker) -> None:
    """Let what is known from another budget change nothing."""
    items = [make(GRIDS[index % 4], index) for index in (3, 1, 7, 2)]
    known: Sequence[Selection | None] = select_many(items, selector, 0.5)
    known = [known[0], None, *known[2:]]
    for keep in (1, 0.2, 0.5, 1.0):
        again = select_many(items, selector, keep, known=known)
        fresh = select_many(items, selector, keep)
        for selection, expected in zip(again, fresh, strict=True):
            _same(f"same_whatever_is_known: keep {keep}", "with scores known", selection, expected)


def first_of_equal_tokens(selector: Selector, make: ItemMaker) -> None:
    """Keep the first of tokens that are exact copies of each other."""
    _check_copies("first_of_equal_tokens", selector, make, ((0, (1, 23, 25)), (1, (1, 7, 11))))
    for total in (1, 2, 7, 33, 577):
        tokens = make((1, 1, total), source=torch.zeros(total, dtype=torch.int64, device="cpu"))
        for keep in (1, min(5, total), total):
            kept = _select(selector, tokens, keep).kept.tolist()
            if kept != list(range(keep)):
                raise SelectorError(
                    f"first_of_equal_tokens: of {total} equal tokens {kept} stay, and not the "
                    f"first {keep}. Let the lowest index win a tie "
                    "(tokenprune.selectors.base.top_k does) and compute scores with "
                    "tokenprune.numerics."
                )


def first_of_equal_tokens_in_time(selector: Selector, make: ItemMaker) -> None:
    """Keep the first of copies in several frames; not for methods that compare frames."""
    _check_copies("first_of_equal_tokens_in_time", selector, make, ((2, (3, 2, 19)),))


def not_finite_is_named(selector: Selector, make: ItemMaker) -> None:
    """Name the item in an error where an input holds NaN or infinity."""
    whole = ("projector", "question")
    inputs = selector.inputs_of(make((1, 3, 5)))
    for name in (need for need in inputs if need not in whole):
        for value in (float("nan"), float("inf")):
            items = [make((1, 3, 5), label=f"image {number}") for number in (1, 2, 3)]
            tensor = getattr(items[1], name)
            if not isinstance(tensor, Tensor):
                continue
            tensor.view(-1)[3] = value
            try:
                select_many(items, selector, 3)
            except TokensError as error:
                if str(error).startswith("image 2"):
                    continue
                raise SelectorError(
                    f"not_finite_is_named: {value} in {name} of image 2 gave: {error}"
                ) from error
            raise SelectorError(f"not_finite_is_named: {value} in {name} gave no error.")


def same_in_any_surroundings(selector: Selector, make: ItemMaker) -> None:
    """Let grad modes, autocast, default device and default dtype change nothing."""
    tokens = make((1, 23, 25))
    expected = _select(selector, tokens, 40)
    for name, surroundings in _surroundings():
        with surroundings:
            selection = _select(selector, tokens, 40)
        _same("same_in_any_surroundings", f"under {name}", selection, expected)


def same_for_any_strides(selector: Selector, make: ItemMaker) -> None:
    """Let strides of the inputs change nothing, and keep no gradients."""
    plain, moved = make((1, 23, 25)), make((1, 23, 25))
    for name in selector.inputs_of(moved):
        tensor = getattr(moved, name)
        if isinstance(tensor, Tensor) and tensor.ndim > 1:
            strided = tensor.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
            object.__setattr__(moved, name, strided)  # frozen, but the check's own
    selection = _select(selector, moved, 40)
    _same("same_for_any_strides", "other strides", selection, _select(selector, plain, 40))
    if selection.scores is not None and selection.scores.requires_grad:
        raise SelectorError("same_for_any_strides: the scores hold on to gradients.")


def leaves_all_alone(selector: Selector, make: ItemMaker) -> None:
    """Draw nothing from the global generator, and leave the inputs what they were."""
    tokens, before = make((1, 5, 7)), make((1, 5, 7))
    state = torch.random.get_rng_state()
    _select(selector, tokens, 9)
    if not torch.equal(torch.random.get_rng_state(), state):
        raise SelectorError(
            "leaves_all_alone: something was drawn from torch's global generator. Draw from a "
            "torch.Generator of the method's own, with a fixed seed."
        )
    for name in selector.inputs_of(tokens):
        tensor, original = getattr(tokens, name), getattr(before, name)
        if isinstance(tensor, Tensor) and not torch.equal(tensor, original):
            raise SelectorError(f"leaves_all_alone: {name} was changed. Work on a copy.")


def no_matrix_of_all_pairs(selector: Selector, make: ItemMaker) -> None:
    """Make no tensor with an entry for each pair of more than 4,096 tokens: memory is linear."""
    tokens = make((1, 50, _MANY // 50))
    with Largest() as largest:
        _select(selector, tokens, 12)
    if largest.elements > _MANY * _MANY // 10:
        raise SelectorError(
            f"no_matrix_of_all_pairs: with {_MANY} tokens an operation returned a tensor of "
            f"{largest.elements} elements. Work in blocks of rows (tokenprune.numerics.blocks_of)."
        )


CHECKS: dict[str, Callable[[Selector, ItemMaker], None]] = {
    check.__name__: check
    for check in (
        exactly_keep,
        same_in_any_batch,
        same_whatever_is_known,
        first_of_equal_tokens,
        first_of_equal_tokens_in_time,
        not_finite_is_named,
        same_in_any_surroundings,
        same_for_any_strides,
        leaves_all_alone,
        no_matrix_of_all_pairs,
    )
}
"""Name -> check: each takes a selector and a maker of items."""


def _select(selector: Selector, tokens: VisualTokens, keep: int | float) -> Selection:
    return select_many([tokens], selector, keep)[0]


def _same(case: str, what: str, selection: Selection, expected: Selection) -> None:
    """Raise SelectorError unless two selections are the same, bit for bit."""
    if selection.kept.tolist() != expected.kept.tolist():
        raise SelectorError(
            f"{case}: {what}, other tokens stay: {selection.kept.tolist()} and "
            f"{expected.kept.tolist()}."
        )
    if (selection.scores is None) != (expected.scores is None):
        raise SelectorError(f"{case}: {what}, there are scores in one case only.")
    if selection.scores is not None and expected.scores is not None:
        apart = (selection.scores != expected.scores).nonzero()[:, 0]
        if len(apart):
            raise SelectorError(
                f"{case}: {what}, the scores of {len(apart)} tokens differ, first that of token "
                f"{int(apart[0])}. Sums and products of a library depend on shape and place: "
                "compute scores with tokenprune.numerics."
            )

    if (selection.merge is None) != (expected.merge is None):
        raise SelectorError(f"{case}: {what}, tokens are merged in one case only.")
    if selection.merge is not None and expected.merge is not None:
        for part in ("into", "of", "weight"):
            if not torch.equal(getattr(selection.merge, part), getattr(expected.merge, part)):
                raise SelectorError(f"{case}: {what}, other tokens are merged, see `{part}`.")


def _check_copies(
    name: str,
    selector: Selector,
    make: ItemMaker,
    cases: Sequence[tuple[int, tuple[int, int, int]]],
) -> None:
    for seed, grid in cases:
        total = grid[0] * grid[1] * grid[2]
        generator = torch.Generator(device="cpu").manual_seed(seed)
        source = torch.randint(0, total // 3, (total,), generator=generator, device="cpu")
        tokens = make(grid, seed, source=source)
        for keep in (1, total // 6, total // 2, total - 1):
            mask = _select(selector, tokens, keep).mask
            for token in source.unique():
                if bool((mask[source == token].int().diff() > 0).any()):
                    copies = (source == token).nonzero()[:, 0].tolist()
                    raise SelectorError(
                        f"{name}: grid {grid}, keep {keep}: tokens {copies} are equal, and a later "
                        "one stays without an earlier one. The lowest index must win a tie."
                    )


def _surroundings() -> Iterator[tuple[str, Any]]:
    yield "torch.inference_mode()", torch.inference_mode()
    yield "torch.enable_grad()", torch.enable_grad()
    yield "torch.autocast", torch.autocast("cpu", dtype=torch.bfloat16)
    yield "another default device", torch.device("meta")
    yield "float64 as default dtype", _default_dtype(torch.float64)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                # What it holds in memory: an expanded view holds no more than its source.
                self.elements = max(
                    self.elements, value.untyped_storage().nbytes() // value.element_size()
                )
        return result
