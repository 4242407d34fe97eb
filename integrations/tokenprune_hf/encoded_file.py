"""Encoded images and videos in files, so that another run need not encode them again.

One safetensors file holds an `Encoded`: its tensors, each in its own dtype, and the rest as JSON in
the file's metadata. The projector is a module of the model and not in the file; a model that reads
the file gives its own.

A file belongs to one vision encoder and is refused by any other, see `encoder_fingerprint`.
`encoded_key` names a file after all that the encoder's output depends on. It is a hash of the
encoder's arguments themselves, pixels included, so it also tells another sampling of a video, other
settings of the processor and a changed media file; in return the pixels have to be there.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenprune.errors import InputFileError, PromptError, TokensError, reason_of
from tokenprune.files import replacing
from tokenprune.formats import check_format
from tokenprune.tokens import VisualTokens
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.vision import ENCODED, EncodedModality, Item, VisionModel, vision_model

_Read = TypeVar("_Read")

LAYOUT = 1
"""Rises when the layout of the file, or of any family's items, changes."""

_METADATA = "tokenprune_encoded"

_NOT_ENCODING = frozenset({"_name_or_path", "transformers_version"})
"""Entries of a config that say nothing about the model."""

_FINGERPRINTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def encoder_fingerprint(model: Any) -> str:
    """Return a hash of a model's config and of all its weights but the language model's.

    It is worked out once for each model object: weights that are changed later are not noticed.
    The version of transformers is part of it.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    """
    if model not in _FINGERPRINTS:
        import transformers

        spoken = [model.get_decoder(), model.get_output_embeddings()]
        not_seen = {
            id(tensor)
            for module in spoken
            if module is not None
            for tensor in module.state_dict(keep_vars=True).values()
        }
        digest = hashlib.sha256(transformers.__version__.encode())
        config = _told(model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(str(getattr(model.config, "_attn_implementation", None)).encode())
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if id(tensor) not in not_seen:
                digest.update(name.encode())
                _add(digest, tensor)
        _FINGERPRINTS[model] = digest.hexdigest()[:32]
    return _FINGERPRINTS[model]


def encoded_key(model: Any, needs: Sequence[str], inputs: Mapping[str, Any]) -> str:
    """Return a text that is the same only where `tokenprune_hf.encode` would do the same work.

    The device's name is part of it, since the time that encoding took there is in the file.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    needs
        What is to be gathered.
    inputs
        What the processor returned; arguments the encoder does not read change nothing.

    Raises
    ------
    UnsupportedModelError, PromptError
        If the model cannot be pruned, or there is no image or video among the inputs.
    """
    of_modalities = vision_model(model).encoder_inputs(dict(inputs))
    if not of_modalities:
        raise PromptError("there are no pixel values among the inputs: nothing to encode.")
    device = model.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(model.device)
    wanted = sorted(set(needs) & set(ENCODED))
    digest = hashlib.sha256(repr((LAYOUT, encoder_fingerprint(model), device, wanted)).encode())
    for given in of_modalities:
        digest.update(repr((given.modality, given.video_frames)).encode())
        for name in sorted(given.arguments):
            digest.update(name.encode())
            _add(digest, given.arguments[name])
    return digest.hexdigest()[:32]


def save_encoded(file: Path, encoded: Encoded, model: Any, *, seconds: float = 0.0) -> None:
    """Write what an encoder made; a reader never meets half a file.

    Parameters
    ----------
    file
        Where to; a file that is there is replaced.
    encoded
        What `tokenprune_hf.encode` returned.
    model
        The model that encoded.
    seconds
        How long it took, for `encoding_seconds`.

    Raises
    ------
    OSError
        If it cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    modalities: dict[str, Any] = {}
    for modality, media in encoded.modalities.items():
        tensors[f"{modality}.rows"] = media.rows
        for number, layer in enumerate(media.deepstack):
            tensors[f"{modality}.deepstack.{number}"] = layer
        items = []
        for number, item in enumerate(media.items):
            name, tokens = f"{modality}.items.{number}", item.tokens
            tensors[f"{name}.rows"] = item.rows
            own = {"features": tokens.features, "cls_attention": tokens.cls_attention}
            # As a rule they are rows that are in the file already.
            are_rows = tokens.embeddings is not None and torch.equal(
                tokens.embeddings, media.rows[item.rows]
            )
            if not are_rows:
                own["embeddings"] = tokens.embeddings
            there = {key: value for key, value in own.items() if value is not None}
            tensors.update({f"{name}.{key}": value for key, value in there.items()})
            items.append(
                {
                    "grid": tokens.grid,
                    "is_picture": tokens.is_picture,
                    "label": tokens.label,
                    "tensors": sorted(there),
                    "embeddings_are_rows": are_rows,
                }
            )
        modalities[modality] = {
            "sizes": media.sizes,
            "stacked": media.stacked,
            "deepstack": len(media.deepstack),
            "videos_told": media.videos_told,
            "items": items,
        }
    head = {
        "layout": LAYOUT,
        "encoder": encoder_fingerprint(model),
        "seconds": seconds,
        "needs": encoded.needs,
        "modalities": modalities,
    }
    try:
        with replacing(file) as part:
            save_file(_apart(tensors), part, {_METADATA: json.dumps(head)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_encoded(file: Path, model: Any) -> Encoded:
    """Read what `save_encoded` wrote, onto the model's device.

    Parameters
    ----------
    file
        The file.
    model
        A model with the vision encoder that made it. Where `Encoded.needs` has the projector, it
        is this model's.

    Raises
    ------
    InputFileError
        If the file is missing, damaged, of another layout, or made by another vision encoder.
    """

    def read(opened: Any) -> Encoded:
        head = _head(file, opened.metadata())
        if head["encoder"] != encoder_fingerprint(model):
            raise InputFileError(
                f"{file} was made by another model, or with another version of transformers, than "
                f"this {type(model).__name__}. Use the model that made it, or encode again."
            )
        needs = head["needs"]
        _check(set(needs) <= set(ENCODED), "its needs")
        vision = vision_model(model)
        modalities = {
            modality: _modality(opened.get_tensor, modality, said, vision, needs)
            for modality, said in head["modalities"].items()
        }
        _check(bool(modalities) and set(modalities) <= {"image", "video"}, "its modalities")
        return Encoded(modalities, tuple(needs))

    return _opened(file, str(model.device), read)


def encoding_seconds(file: Path) -> float:
    """Return how long it took to encode what is in a file.

    Raises
    ------
    InputFileError
        If the file is missing, damaged or of another layout.
    """

    def read(opened: Any) -> float:
        seconds = float(_head(file, opened.metadata())["seconds"])
        _check(math.isfinite(seconds) and seconds >= 0, "its seconds")
        return seconds

    return _opened(file, "cpu", read)


def _opened(file: Path, device: str, read: Callable[[Any], _Read]) -> _Read:
    """Return what `read` makes of a safetensors file.

    Raises
    ------
    InputFileError
        Also for whatever can go wrong in `read`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", device=device) as opened:
            return read(opened)
    except InputFileError:
        raise
    except OSError as error:
        raise InputFileError(
            f"{file} cannot be read: {reason_of(error)}. Check the path and its permissions."
        ) from None
    except (SafetensorError, TokensError, LookupError, TypeError, ValueError) as error:
        raise InputFileError(
            f"{file} is damaged, or holds no encoded image or video ({reason_of(error)}). Delete "
            "it and encode again."
        ) from None


def _head(file: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the JSON of a file of this layout."""
    head: dict[str, Any] = json.loads((metadata or {})[_METADATA])
    return check_format(head, LAYOUT, file, "Or delete it and encode again.", key="layout")


def _modality(
    tensor: Callable[[str], Tensor],
    modality: str,
    said: dict[str, Any],
    vision: VisionModel,
    needs: Sequence[str],
) -> EncodedModality:
    """Put images or videos together again.

    Parameters
    ----------
    tensor
        Reads one by name.
    modality, said
        Its name, and what the file's JSON says of it.
    vision
        Of the model.
    needs
        What the items must have.
    """
    rows = tensor(f"{modality}.rows")
    sizes, count = [int(size) for size in said["sizes"]], len(rows)
    _check(rows.ndim == 2 and sum(sizes) == count, f"the rows of its {modality}s")
    deepstack = [tensor(f"{modality}.deepstack.{n}") for n in range(said["deepstack"])]
    _check(all(len(layer) == count for layer in deepstack), "its features for deeper layers")
    items = []
    for number, one in enumerate(said["items"]):
        name = f"{modality}.items.{number}"
        own = tensor(f"{name}.rows")
        _check(own.ndim == 1 and own.dtype == torch.long, f"the rows of {modality} {number}")
        # Beyond the rows, or from the end, would be another item's.
        within = bool(((own >= 0) & (own < count)).all())
        _check(within and len(own) == math.prod(one["grid"]), f"the rows of {modality} {number}")
        there: dict[str, Any] = {key: tensor(f"{name}.{key}") for key in one["tensors"]}
        if one["embeddings_are_rows"]:
            there["embeddings"] = rows[own]
        if "projector" in needs:
            there["projector"] = vision.projector(modality)
        _check(set(needs) <= set(there), f"what is there of {modality} {number}")
        items.append(
            Item(
                own,
                VisualTokens(
                    grid=tuple(one["grid"]),
                    label=str(one["label"]),
                    is_picture=bool(one.get("is_picture", True)),
                    **there,
                ),
            )
        )
    return EncodedModality(
        rows, sizes, bool(said["stacked"]), deepstack, items, bool(said["videos_told"])
    )


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} do not fit the rest")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, none sharing memory."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        if one.untyped_storage().data_ptr() in seen:
            one = one.clone()
        seen.add(one.untyped_storage().data_ptr())
        apart[name] = one
    return apart


def _told(config: Any) -> Any:
    """Return a config without where it came from."""
    if not isinstance(config, dict):
        return config
    return {name: _told(value) for name, value in config.items() if name not in _NOT_ENCODING}


def _add(digest: Any, value: Any) -> None:
    """Add a tensor with its dtype and shape, or any other argument, to a hash."""
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of them".encode())
        for one in value:
            _add(digest, one)
    else:
        digest.update(repr(value).encode())
