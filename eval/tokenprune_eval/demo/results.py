"""The rows of a run, their intervals, and results.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune_eval.data.question import Question
from tokenprune_eval.demo.costs import Cost
from tokenprune_eval.results.records import Record
from tokenprune_eval.results.statistics import independent, wilson
from tokenprune_eval.shared.output import write_whole


@dataclass(frozen=True)
class Row:
    """One condition: a set of questions, a method and a budget.

    Attributes
    ----------
    dataset, method, positions
        What was run. ``"unpruned"`` is the model with all tokens, ``"oracle"`` the evidence alone.
    keep
        Share of the visual tokens kept; of the oracle, whose number differs from question to
        question, the mean.
    accuracy, ci_low, ci_high
        Share of right answers and its 95 % Wilson interval, of as many questions as these are
        worth, see `independent`.
    questions, correct
        How many were asked and how many answered right.
    visual_tokens, of_visual_tokens
        Visual tokens the language model read of each image (of the oracle the mean), and of how
        many.
    encode_ms, selection_ms, prefill_ms, peak_memory_mib
        See `Cost`; of the model that is timed, and of the oracle on a question with a typical
        number of tokens.
    evidence_kept
        Share of the tokens that show the answer that were kept, mean over questions; None where
        the set does not say where that is.
    by_type
        Type of question -> accuracy and number of questions.
    unpruned
        True where this is the run of the unpruned model, shown for the method as its 1.0.
    """

    dataset: str
    method: str
    keep: float
    accuracy: float
    ci_low: float
    ci_high: float
    questions: int
    correct: int
    visual_tokens: float
    of_visual_tokens: int
    encode_ms: float
    selection_ms: float
    prefill_ms: float
    peak_memory_mib: float
    evidence_kept: float | None
    positions: str
    by_type: dict[str, dict[str, float]]
    unpruned: bool = False

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from the image to the first answer token."""
        return self.encode_ms + self.selection_ms + self.prefill_ms


def said(record: Record) -> str:
    """Return an answer as it is compared and shown: in lower case, on one line."""
    return " ".join((record.text or "").lower().split())


def kept(record: Record) -> Tensor:
    """Return BoolTensor [N], the visual tokens that were kept."""
    mask = torch.zeros(record.of_visual_tokens or 0, dtype=torch.bool)
    mask[record.kept or []] = True
    return mask


def make_row(
    dataset: str,
    method: str,
    positions: str,
    questions: Sequence[Question],
    records: Sequence[Record],
    evidence: Tensor | None,
    cost: Cost,
) -> Row:
    """Count what was right and what was kept.

    Parameters
    ----------
    dataset, method, positions
        See `Row`.
    questions, records
        The questions and their answers, in the same order.
    evidence
        BoolTensor [Q, N] or None.
    cost
        What one question costs.
    """
    # An answer that was cut off before it named anything is not right.
    right = [bool(record.correct) for record in records]
    by_type: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        by_type.setdefault(question.type, []).append(is_right)
    share = sum(right) / len(right)
    worth = independent(right, [question.path for question in questions])
    low, high = wilson(share * worth, worth)
    masks = torch.stack([kept(record) for record in records])
    total = masks.shape[1]
    tokens = float(masks.sum(dim=1).double().mean())
    shares = None
    if evidence is not None:
        found = (masks & evidence).sum(dim=1).double() / evidence.sum(dim=1)
        shares = float(found.mean())
    return Row(
        dataset=dataset,
        method=method,
        keep=tokens / total,
        accuracy=share,
        ci_low=min(low, share),
        ci_high=max(high, share),
        questions=len(right),
        correct=sum(right),
        visual_tokens=tokens,
        of_visual_tokens=total,
        encode_ms=cost.encode_ms,
        selection_ms=cost.selection_ms,
        prefill_ms=cost.prefill_ms,
        peak_memory_mib=cost.peak_memory_mib,
        evidence_kept=shares,
        positions=positions,
        by_type={
            kind: {"accuracy": sum(values) / len(values), "questions": len(values)}
            for kind, values in by_type.items()
        },
    )


@dataclass
class Results:
    """What a run found so far.

    Attributes
    ----------
    file
        ``results.json``; `save` writes it after every set.
    about
        Settings, versions, machine and which questions were asked.
    rows
        The main rows.
    other_positions
        Rows with the other way to count positions.
    complete
        Whether all rows are there.
    """

    file: Path
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    other_positions: list[Row] = field(default_factory=list)
    complete: bool = False

    def save(self) -> None:
        """Write the file as a whole.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        content = {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "other_positions": [dataclasses.asdict(row) for row in self.other_positions],
            "complete": self.complete,
            **self.about,
        }
        write_whole(self.file, json.dumps(content, indent=1) + "\n")
