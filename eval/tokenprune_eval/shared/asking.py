"""One question put to a model by `generate`, where no run keeps its answer."""

from __future__ import annotations

from typing import Any


def answer(
    model: Any, processor: Any, inputs: Any, *, max_new_tokens: int, **arguments: Any
) -> str:
    """Return what a model says to one prompt, greedily, on one line.

    Parameters
    ----------
    model, processor
        As `tokenprune_hf.loading.load` returns them; the model may be pruned.
    inputs
        A batch of one prompt, as `tokenprune_hf.ask` returns it.
    max_new_tokens
        Of the answer.
    **arguments
        Further ones of ``generate``, such as ``encoded``.
    """
    output = model.generate(**inputs, **arguments, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return " ".join(text.split())
