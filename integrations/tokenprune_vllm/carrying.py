"""Numbers that travel with kept rows: behind each row in memory, and not in its shape.

vLLM keeps what `embed_multimodal` returned in its cache of encoded images, cuts pieces out of it
along the first dimension, and hands these to `embed_input_ids`: to ours, and then to that of a
drafter, which is a class of vLLM's and wants rows as wide as the model. So rows are returned as
the left part of a wider block. Their shape is the model's own. How far apart two of them lie says
that something stands between, and a piece of them keeps that distance, in both of vLLM's model
runners. So there is no table of what belongs to which rows, and nothing to be forgotten when vLLM
drops them.

A copy loses what stands between, and is noticed: it is contiguous, since torch keeps the strides of
dense tensors alone. Where vLLM sends rows to another process (encoder disaggregation), it copies
them: there they really are wider, and no drafter may read them (`refusals`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError


def carry(rows: Tensor, columns: Tensor, copied: bool = False) -> Tensor:
    """Return rows with columns behind them.

    Parameters
    ----------
    rows
        [n, D].
    columns
        [n, X] of the same dtype, on the same device.
    copied
        Whether rows will be copied on their way.

    Returns
    -------
    Tensor
        [n, D], which `taken` reads the columns from; where rows are copied, [n, D + X].
    """
    wide = torch.cat([rows, columns], dim=1)
    return wide if copied else wide[:, : rows.shape[1]]


def taken(rows: Tensor, count: int, copied: bool = False) -> tuple[Tensor, Tensor]:
    """Return rows [n, D], and the columns [n, count] behind them.

    Parameters
    ----------
    rows
        What `carry` returned, or a piece of it.
    count
        Of columns.
    copied
        As it was in `carry`.

    Raises
    ------
    UnsupportedModelError
        If rows have lost their columns.
    """
    if copied:
        return rows[:, :-count], rows[:, -count:]
    width, between = rows.shape[1], rows.stride(0)
    first = rows.storage_offset() + width
    end = first + (len(rows) - 1) * between + count
    # A single row may be copied with its stride, but the copy's memory ends where the row does.
    there = rows.untyped_storage().nbytes() // rows.element_size()
    if between != width + count or rows.stride(1) != 1 or end > there:
        raise UnsupportedModelError(
            "the rows of an image or video were copied between the encoder and the language model, "
            "and have lost the positions that stand behind them in memory. Serve with "
            "--positions compact, without what copies them, or without tokenprune."
        )
    return rows, rows.as_strided((len(rows), count), (between, 1), first)
