"""What a request takes under each budget, and the most that pruning can save: arithmetic alone.

`Parts` holds what was measured. A request is encoding, selecting, prefill, and one decoding step
for each answer token but the first, which the prefill gives. What pruning cannot touch bounds what
it saves (Amdahl, "Validity of the single processor approach", AFIPS 1967): here that bound is
measured, with one token of each item kept, and not extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tokenprune.baselines import RESIZE

UNPRUNED = "unpruned"

WORTH = 0.1
"""Share of a request's time from which on saving it is worth while."""

_RULES = 0.5
"""Share of the time from which on a part rules."""

_HARDLY = 1.25
"""How many times as long a long prompt's prefill takes as a short one's, where it hardly grows."""

_UNKNOWN_NOISE = 0.1
"""Share of the time that is taken for noise where turns are too few to tell it."""

_FEW = 1 / 3
"""Share of visual tokens in the prompt below which they are few."""

Budget = int | float
"""A number of tokens of each item, or a share of them; 1 and 1.0 differ."""


@dataclass(frozen=True)
class Read:
    """What the language model takes for a prompt of one length, all for each request.

    Attributes
    ----------
    visual
        Visual tokens that it reads.
    prompt
        All tokens that it reads.
    prefill
        Seconds until the first answer token.
    step
        Seconds of each further one.
    """

    visual: float
    prompt: float
    prefill: float
    step: float


@dataclass(frozen=True)
class Chosen:
    """What a method takes at a budget, for each request.

    Attributes
    ----------
    method, keep
        Its name and the budget.
    encode
        Seconds of the encoder where it also gathers what the method looks at.
    select
        Seconds of scoring and choosing.
    """

    method: str
    keep: Budget
    encode: float
    select: float


@dataclass(frozen=True)
class Smaller:
    """What a request takes whose picture is made smaller in place of pruning.

    Attributes
    ----------
    keep
        The budget that it was made small enough for.
    encode
        Seconds of the encoder.
    read
        What the language model takes.
    """

    keep: Budget
    encode: float
    read: Read


@dataclass(frozen=True)
class Parts:
    """What was measured of one kind of request: seconds for each request, medians of the turns.

    Attributes
    ----------
    encode
        Tower and projector, gathering nothing for a method.
    full
        The prompt with all visual tokens.
    least
        The prompt with one token of each image, crop or video.
    budgets
        The budgets' prompts.
    chosen
        Each method at each budget.
    smaller
        Pictures made smaller to each budget, where that was measured.
    new_tokens
        Tokens of an answer.
    noise
        How far a median may be off, as a share of the unpruned request's time, at the length where
        that is the most; None with fewer than three turns.
    """

    encode: float
    full: Read
    least: Read
    budgets: Mapping[Budget, Read]
    chosen: Sequence[Chosen] = ()
    smaller: Sequence[Smaller] = ()
    new_tokens: int = 64
    noise: float | None = None


@dataclass(frozen=True)
class Row:
    """A request under one condition.

    Attributes
    ----------
    method, keep
        ``"unpruned"`` (1.0), a method, or ``"resize"``.
    tokens
        Visual tokens that the language model reads.
    encode, select, prefill, decode
        Seconds.
    of_total
        Seconds of the unpruned request.
    bound
        Seconds it would take if selecting cost nothing and the encoder gathered nothing; None where
        nothing is selected.
    """

    method: str
    keep: Budget
    tokens: float
    encode: float
    select: float
    prefill: float
    decode: float
    of_total: float
    bound: float | None = None

    @property
    def first_token(self) -> float:
        """Seconds until the first answer token."""
        return self.encode + self.select + self.prefill

    @property
    def total(self) -> float:
        """Seconds until the answer's end."""
        return self.first_token + self.decode

    @property
    def saved(self) -> float:
        """Share of the unpruned request's time that it saves; below 0 where it takes longer."""
        return 1 - self.total / self.of_total

    @property
    def at_most(self) -> float | None:
        """Share that would be saved if selecting cost nothing; None where nothing is selected."""
        return None if self.bound is None else 1 - self.bound / self.of_total

    @property
    def speed_up(self) -> float:
        """How many times as fast as the unpruned request."""
        return self.of_total / self.total


@dataclass(frozen=True)
class Costs:
    """Everything that follows from what was measured.

    Attributes
    ----------
    parts
        What was measured.
    unpruned
        The request with all tokens.
    limit
        The request with one token of each item, and a selection that costs nothing: no method and
        no budget can be faster.
    rows
        The unpruned request, and every method and budget in the order they were given.
    """

    parts: Parts
    unpruned: Row = field(init=False)
    limit: Row = field(init=False)
    rows: tuple[Row, ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = self.parts
        total = parts.encode + parts.full.prefill + self._decode(parts.full)
        unpruned = self._row(UNPRUNED, 1.0, parts.encode, 0.0, parts.full, total)
        limit = self._row("limit", 1, parts.encode, 0.0, parts.least, total)
        object.__setattr__(self, "unpruned", unpruned)
        object.__setattr__(self, "limit", limit)
        object.__setattr__(self, "rows", (unpruned, *self._pruned(total), *self._resized(total)))

    def _pruned(self, total: float) -> Iterator[Row]:
        for one in self.parts.chosen:
            read = self.parts.budgets[one.keep]
            bound = self.parts.encode + read.prefill + self._decode(read)
            yield self._row(one.method, one.keep, one.encode, one.select, read, total, bound)

    def _resized(self, total: float) -> Iterator[Row]:
        for one in self.parts.smaller:
            yield self._row(RESIZE, one.keep, one.encode, 0.0, one.read, total)

    def _row(
        self,
        method: str,
        keep: Budget,
        encode: float,
        select: float,
        read: Read,
        total: float,
        bound: float | None = None,
    ) -> Row:
        decode = self._decode(read)
        return Row(method, keep, read.visual, encode, select, read.prefill, decode, total, bound)

    def _decode(self, read: Read) -> float:
        return (self.parts.new_tokens - 1) * read.step

    @property
    def pruned(self) -> list[Row]:
        """The rows of methods."""
        return [row for row in self.rows if row.method not in (UNPRUNED, RESIZE)]

    @property
    def best(self) -> Row | None:
        """The pruned row that saves the most; None where no method was measured."""
        return max(self.pruned, key=lambda row: row.saved, default=None)

    @property
    def best_resized(self) -> Row | None:
        """The resized row that saves the most; None where none was measured."""
        resized = [row for row in self.rows if row.method == RESIZE]
        return max(resized, key=lambda row: row.saved, default=None)

    @property
    def shares(self) -> dict[str, float]:
        """What part of the unpruned request's time each part takes."""
        row = self.unpruned
        parts = {"encoding": row.encode, "prefill": row.prefill, "decoding": row.decode}
        return {name: seconds / row.total for name, seconds in parts.items()}

    @property
    def largest(self) -> str:
        """The part that takes the most."""
        shares = self.shares
        return max(shares, key=shares.__getitem__)

    @property
    def noise(self) -> float:
        """Share of the unpruned time up to which a difference means nothing."""
        return _UNKNOWN_NOISE if self.parts.noise is None else self.parts.noise

    @property
    def contradiction(self) -> Row | None:
        """A row whose bound saves more than the limit does, beyond the noise; None without one.

        Fewer tokens cannot take longer than more, so something else had a part in the times.
        """
        known = [(row.at_most, row) for row in self.pruned if row.at_most is not None]
        most, row = max(known, key=lambda pair: pair[0], default=(0.0, None))
        return row if most > max(0.0, self.limit.saved) + self.noise else None

    @property
    def can_pay(self) -> bool:
        """Whether the limit of pruning is worth while."""
        return self.limit.saved >= WORTH

    @property
    def first_token_limit(self) -> float:
        """Share of the time to the first token that can be saved at most."""
        return 1 - self.limit.first_token / self.unpruned.first_token

    @property
    def reasons(self) -> list[str]:
        """What keeps pruning from paying: ``"tower"``, ``"decoding"``, ``"few"``, ``"short"``.

        The tower or decoding takes most of the time; few tokens of the prompt are visual; or the
        whole prompt takes hardly longer to read than what is left of it.
        """
        shares, full, least = self.shares, self.parts.full, self.parts.least
        known = {
            "tower": shares["encoding"] >= _RULES,
            "decoding": shares["decoding"] >= _RULES,
            "few": full.visual < _FEW * full.prompt,
            "short": full.prefill < _HARDLY * least.prefill,
        }
        return [name for name, holds in known.items() if holds]
