"""tokenprune_lmms_eval: lmms-eval's tasks on a pruned model of transformers.

    lmms-eval --model tokenprune_hf --model_args pretrained=...,method=...,keep=... --tasks ...

lmms-eval finds `manifest` through its entry point group ``lmms_eval.models``. Of the modules here
only `model` imports lmms-eval, and lmms-eval imports it only when the model is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenprune_vlm.checked  # noqa: F401  # raises where `tokenprune` is another project's

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> ModelManifest:
    """Return what lmms-eval's registry asks for: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="tokenprune_hf", chat_class_path="tokenprune_lmms_eval.model.PrunedModel"
    )
