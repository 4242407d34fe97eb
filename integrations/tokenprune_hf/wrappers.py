"""The model of transformers inside what was put around it: PEFT, `torch.compile`, DDP."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import UnsupportedModelError

_REFUSED = {
    "DataParallel": "copies the model to every device at each call, and the copies are not pruned. "
    "Pass the model inside it and start one process a device",
    "FullyShardedDataParallel": "keeps the weights in pieces, which the vision encoder is called "
    "without. Pass a model that is loaded whole",
    "DeepSpeedEngine": "runs a model that it has changed. Pass the model inside it",
}
"""Wrappers by the name of their class -> why the model inside them cannot be pruned."""


def model_inside(model: Any) -> Any:
    """Return the model of transformers inside a wrapper, which runs whatever the wrapper is asked.

    Anything that is no known wrapper is returned as it is.

    Parameters
    ----------
    model
        A model, a PEFT model, what `torch.compile` returned, or a DistributedDataParallel.

    Raises
    ------
    UnsupportedModelError
        If the wrapper runs something else than the model inside it.
    """
    while True:
        for kind in type(model).__mro__:
            if kind.__name__ in _REFUSED:
                raise UnsupportedModelError(
                    f"{kind.__name__} {_REFUSED[kind.__name__]}, and prune that."
                )
        inside = _unwrapped(model)
        if inside is None:
            return model
        model = inside


def _unwrapped(model: Any) -> Any:
    """Return what one wrapper holds, or None."""
    modules = getattr(model, "_modules", {})
    if "base_model" in modules and hasattr(type(model), "get_base_model"):  # PEFT
        active = getattr(model, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"this {type(model).__name__} puts learned embeddings in front of the prompt "
                f"({type(active).__name__}), where visual tokens cannot be found by their ids. "
                "Use an adapter that changes weights, such as LoRA."
            )
        return model.get_base_model()
    if "_orig_mod" in modules:  # torch.compile
        return modules["_orig_mod"]
    if type(model).__name__ == "DistributedDataParallel":
        return modules["module"]
    return None
