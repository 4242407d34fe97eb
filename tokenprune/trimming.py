"""Which vision tokens a cross-attention layer needs: each head's best, and all heads' together.

Source: Trimmed Llama (arXiv 2504.00557). The attention of the text to the vision tokens is worked
out from q and k of one layer, in float32 and in blocks of queries: no map of all heads, queries
and tokens is ever built.

No code of the authors was found. From the paper: scores are kept apart by head, each head takes its
k best tokens, and the union over heads stays. Reconstructed here: how the queries of a head are
combined (`head_scores`), and what k is a fraction of (`union_of_heads`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.budget import Keep, tokens_kept
from tokenprune.errors import TokensError
from tokenprune.numerics import full_precision

QueryReduction = Literal["sum", "max"]
"""How a head's queries are reduced to one number per token."""

_LOGITS_AT_ONCE = 2**24  # float32 numbers of q kᵀ that exist at one time (64 MiB)


def head_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    seen: Tensor | None = None,
    queries: QueryReduction = "sum",
) -> Tensor:
    """Return how much each head attends to each token: ``softmax(q kᵀ * scale)``, over queries.

    Parameters
    ----------
    query
        [H, Q, d] of the text, any float dtype.
    key
        [G, N, d] of the vision tokens; H is a multiple of G, and every run of H / G heads shares
        one key head.
    scale
        Factor on q kᵀ, usually d ** -0.5.
    seen
        BoolTensor [Q, N], True where the query may see the token, or None for everywhere. The
        softmax is over what is seen; a query that sees nothing adds nothing.
    queries
        ``"sum"`` over the queries, which ranks as their mean does, or their ``"max"``. Which of
        the two the authors took is not known (reconstruction).

    Returns
    -------
    Tensor
        float32 [H, N], 0 for a token that no query sees.
    """
    heads, count, _ = query.shape
    groups, total, _ = key.shape
    key = key.float()
    result = key.new_zeros(heads, total)
    block = max(1, _LOGITS_AT_ONCE // (heads * total))
    with full_precision(key.device):
        for start in range(0, count, block):
            # Heads side by side for each key head, so that keys need not be repeated.
            rows = query[:, start : start + block].float().unflatten(0, (groups, -1))
            logits = torch.einsum("ghqd,gnd->ghqn", rows, key).flatten(0, 1) * scale
            if seen is None:
                attention = logits.softmax(dim=-1)
            else:
                hidden = ~seen[start : start + block]
                attention = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
                attention.masked_fill_(hidden, 0.0)  # also where softmax had nothing to see
            if queries == "max":
                result = torch.maximum(result, attention.amax(dim=1))
            else:
                result += attention.sum(dim=1)
    return result


def union_of_heads(
    scores: Tensor, keep: Keep, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tokens that are among the k best of at least one head.

    k is ``tokens_kept(keep, n)`` for each head, n being the tokens that count, so at least k and at
    most H * k tokens stay. That k is a share of the counted tokens alone, padding left out, is a
    reconstruction.

    Parameters
    ----------
    scores
        float32 [H, N], from `head_scores`. Of equal scores the first wins.
    keep
        The budget of each head.
    counted
        BoolTensor [N], the tokens that may stay, or None for all.

    Returns
    -------
    kept
        LongTensor [K], ascending.
    best
        float32 [N], each token's highest score of any head, 0 where it does not count.

    Raises
    ------
    TokensError
        If a score is not finite.
    BudgetError
        If `keep` is no budget, or no token counts.
    """
    total = scores.shape[1]
    if not bool(scores.isfinite().all()):
        raise TokensError(
            "the attention from which vision tokens are chosen is not finite: q or k of the "
            "choosing layer holds NaN or infinity. Run the model in bfloat16 or float32, or look "
            "for the input that makes it overflow."
        )
    if counted is None:
        counted = scores.new_ones(total, dtype=torch.bool)
    count = tokens_kept(keep, int(counted.sum()))
    ranked = scores.masked_fill(~counted, -1.0)  # below every score, which is never negative
    # torch.topk leaves the order of equal scores open; a stable sort does not.
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :count]
    kept = scores.new_zeros(total, dtype=torch.bool)
    kept[order.flatten()] = True
    return kept.nonzero()[:, 0], scores.amax(dim=0).masked_fill(~counted, 0.0)
