"""What drafters of speculative decoding are told about pruned prompts.

A drafter guesses the next tokens, and the model says which of them are right: whatever a drafter is
told, the answer is the model's. With bad positions it guesses badly.

vLLM hands a drafter the model's rows (`carrying`) and positions. In its first model runner these
positions are the runner's own, and its drafters also look up by them where in their cache a token
is (vLLM's issue 54498). So a position must be the token's place in the prompt that vLLM knows, the
pruned one: with those of the unpruned prompt, a drafter of more than one token writes into blocks
that belong to other requests, in a hybrid model into their states. In the second model runner vLLM
itself counts places for every drafter. Here the first runner's drafters are told the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError

_TOLD = "target_positions"
_BATCH = "common_attn_metadata"


def is_drafted(vllm_config: Any) -> bool:
    """Say whether a model beside the served one guesses tokens."""
    speculative = vllm_config.speculative_config
    return speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model())


def prepare(model: Any, original: bool) -> None:
    """Make a pruned model ready for a drafter. Called before vLLM loads the drafter.

    Parameters
    ----------
    model
        The pruned one, whose process serves no other.
    original
        Whether kept tokens have the positions of the unpruned prompt.

    Raises
    ------
    UnsupportedModelError
        If this vLLM tells its drafters positions in another way.
    """
    # By the name of a model's class vLLM knows where its config has the id of image tokens, and
    # copies it for the drafter. Ours is none of those names, for which it looks here.
    if getattr(model.config, "image_token_index", None) is None:
        model.config.image_token_index = getattr(model.config, "image_token_id", None)
    if original:
        try:
            from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
            from vllm.v1.spec_decode.step3p5 import Step3p5MTPProposer
        except ImportError as error:
            raise _changed(str(error)) from error
        for proposer in (SpecDecodeBaseProposer, Step3p5MTPProposer):
            _tell_places(proposer)


def places(batch: Any, tokens: int) -> Tensor:
    """Return where each token of a batch stands in its prompt and answer: LongTensor [tokens].

    Parameters
    ----------
    batch
        vLLM's CommonAttentionMetadata.
    tokens
        Of the batch.
    """
    starts: Tensor = batch.query_start_loc[: batch.num_reqs + 1].long()
    lengths = starts.diff()
    ahead: Tensor = batch.seq_lens[: batch.num_reqs].long() - starts[1:]
    # With its size given, nothing waits for the device.
    ahead = ahead.repeat_interleave(lengths, output_size=tokens)
    return torch.arange(tokens, device=ahead.device) + ahead


def _tell_places(proposer: Any) -> None:
    """Put `places` in place of the positions with which a proposer of vLLM's is called."""
    propose: Callable[..., Any] = vars(proposer).get("propose", lambda: None)
    if getattr(propose, "tells_places", False):
        return
    signature = inspect.signature(propose)
    if not {_TOLD, _BATCH, "target_token_ids"} <= set(signature.parameters):
        raise _changed(f"{proposer.__name__}.propose takes {', '.join(signature.parameters)}")

    @functools.wraps(propose)
    def by_place(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        told = given.arguments
        if told[_TOLD].ndim > 1:
            found = places(told[_BATCH], len(told["target_token_ids"]))
            # vLLM takes the first row where the drafter counts on one axis, but reads the memory
            # itself where there are more tokens than were given.
            told[_TOLD] = found if self.needs_extra_input_slots else found.expand(3, -1)
        return propose(*given.args, **given.kwargs)

    by_place.tells_places = True  # type: ignore[attr-defined]
    proposer.propose = by_place


def _changed(how: str) -> UnsupportedModelError:
    from vllm import __version__

    return UnsupportedModelError(
        f"vLLM {__version__} tells drafters positions in a way that tokenprune does not know "
        f"({how}), so drafts would be wrong. Serve with --positions compact, without "
        "--speculative-config, or with a version of vLLM that `tokenprune docs serving` names."
    )
