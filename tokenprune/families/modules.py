"""Where models keep their tower and their projector, and what layers a projector is made of.

Both engines name the modules alike, and families share a handful of names and shapes. A model with
another one is refused by the methods that need it, and served by all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.tower.projectors import MLPProjector

_TOWERS = ("vision_tower", "visual", "vision_model", "image_tower")
_PROJECTORS = (
    "multi_modal_projector",
    "visual.merger",
    "connector.modality_projection",
    "mlp1",
    "mlp_AR",
    "projector",
    "mm_projector",
    "embed_vision",
)

Plain = Callable[[Any], Any]
"""Returns a linear layer with its whole weight, where an engine has a class of its own for it."""


def find_tower(model: Any) -> nn.Module:
    """Return the vision encoder of a model.

    Raises
    ------
    UnsupportedModelError
        If it is under no known name.
    """
    return _find(model, _TOWERS, "vision tower")


def find_projector(model: Any) -> nn.Module:
    """Return the projector of a model.

    Raises
    ------
    UnsupportedModelError
        If it is under no known name.
    """
    return _find(model, _PROJECTORS, "projector")


def _find(model: Any, paths: Sequence[str], what: str) -> nn.Module:
    # vLLM's Idefics3 has them in a model inside, as transformers' models do.
    for holder in (model, getattr(model, "model", None)):
        for path in paths:
            found: Any = holder
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is not None:
                module: nn.Module = found
                return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no {what} where tokenprune looks ({', '.join(paths)}). Use a "
        "method that needs embeddings only (see `tokenprune methods`)."
    )


def entrance_of(projector: Any) -> nn.Module:
    """Return the module whose input is the tokens' features: the projector, or a part of it."""
    # Gemma 3 pools inside its projector; the norm behind the pooling is given tokens. Gemma 4 calls
    # its projector by name, and the norm by place. PaddleOCR-VL merges patches behind the norm, and
    # LFM2-VL inside, where both are given one picture after another. Aya Vision and Cohere2 Vision
    # shuffle inside, too.
    names = ["mm_soft_emb_norm", "embedding_pre_projection_norm", "pre_norm"]
    names.append("head_linear")  # Ovis2, whose projector is put together of parts
    names.append("soft_embedding_norm")  # Gemma 3n, which calls its projector by name, too
    if hasattr(projector, "pixel_unshuffle") or hasattr(projector, "forward_from_unshuffled"):
        names += ["layer_norm", "linear_1"]
    if hasattr(projector, "pixel_shuffle"):
        names += ["layernorm", "linear_1"]
    found = (getattr(projector, name, None) for name in names)
    module: nn.Module = next((part for part in found if part is not None), projector)
    return module


def layers_of(projector: Any, plain: Plain = lambda layer: layer) -> MLPProjector:
    """Return the layers of a projector as they are now.

    Parameters
    ----------
    projector
        The module that the model calls.
    plain
        See `Plain`.

    Raises
    ------
    UnsupportedModelError
        If their weights are not what they compute with.
    AttributeError, LookupError, ValueError
        If it is made of other layers than the projectors that are known here.
    """
    norm = activation = second = None
    if hasattr(projector, "patch_merger"):
        raise LookupError("it puts patches together in a layer of its own")
    if hasattr(projector, "pixel_shuffle"):
        raise LookupError("a half of its first layer is a gate on the other half")
    if hasattr(projector, "embedding_post_projection_norm"):
        raise LookupError("a norm stands behind its layer")
    if hasattr(projector, "gate_proj") or hasattr(projector, "merged_linear"):  # Molmo 2
        raise LookupError("its first layer has a gate beside it")
    if hasattr(projector, "mm_input_projection_weight"):  # Gemma 3: a bare parameter, transposed
        first: Any = SimpleNamespace(weight=projector.mm_input_projection_weight.mT, bias=None)
        norm = projector.mm_soft_emb_norm
    elif hasattr(projector, "embedding_projection"):  # Gemma 4
        first, norm = projector.embedding_projection, projector.embedding_pre_projection_norm
    elif hasattr(projector, "linear_fc1"):  # Qwen3-VL
        first, activation, second = projector.linear_fc1, projector.act_fn, projector.linear_fc2
        norm = projector.norm
    elif hasattr(projector, "ln_q"):  # Qwen2-VL, Qwen2.5-VL
        first, activation, second = projector.mlp
        norm = projector.ln_q
    elif hasattr(projector, "linear_2"):  # LLaVA, PerceptionLM; InternVL and others with a norm
        first, second = projector.linear_1, projector.linear_2
        activation = projector.act if hasattr(projector, "act") else projector.gelu
        norm = getattr(projector, "layer_norm", getattr(projector, "pre_norm", None))
    elif hasattr(projector, "in_proj"):  # Kimi-K2.5
        first, activation, second = projector.in_proj, projector.act, projector.out_proj
        norm = projector.pre_norm
    elif isinstance(projector, nn.Sequential):  # InternVL in its own format
        norm, first, activation, second = projector
    else:  # Idefics3, SmolVLM, Llama 4; others have further layers beside it
        (first,) = projector.children()
    first = plain(first)
    return MLPProjector(
        first=first,
        activation=activation,
        second=None if second is None else plain(second),
        norm=norm,
        norm_groups=1 if norm is None else _parts(norm, first),
    )


def layers_in_a_row(parts: Sequence[nn.Module], plain: Plain = lambda layer: layer) -> MLPProjector:
    """Return the layers of a projector whose modules run one after the other.

    They are a norm or none, a linear layer and, after an activation, another one.

    Parameters
    ----------
    parts
        Its modules.
    plain
        See `Plain`.

    Raises
    ------
    UnsupportedModelError, AttributeError, LookupError, ValueError
        See `layers_of`.
    """
    linear = ("in_features", "input_size")  # of torch, of vLLM
    places = [n for n, part in enumerate(parts) if any(hasattr(part, name) for name in linear)]
    first, *more = places or [len(parts)]
    if first > 1 or len(parts) != first + (3 if more else 1):
        raise LookupError("its modules are others")
    entrance = plain(parts[first])
    norm = parts[0] if first else None
    if norm is not None and "norm" not in type(norm).__name__.lower():
        raise LookupError("its modules are others")
    return MLPProjector(
        first=entrance,
        activation=parts[first + 1] if more else None,
        second=plain(parts[first + 2]) if more else None,
        norm=norm,
        norm_groups=1 if norm is None else _parts(norm, entrance),
    )


def _parts(norm: Any, first: Any) -> int:
    """Return how many equal parts of a linear layer's input are normalised each on its own."""
    gain = getattr(norm, "weight", None)  # Gemma 4's norm has none
    return 1 if gain is None else int(first.weight.shape[1]) // int(gain.numel())
