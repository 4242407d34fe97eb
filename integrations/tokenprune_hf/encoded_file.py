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
from tokenprune.families.base import MIDDLE, SCORING
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

_FINGERPRINTS: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
"""Of the models that were asked about: hashing all weights takes seconds."""


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

        # The language model and its head read what the encoder made, and do not change it. By
        # identity: a head may share the embeddings' weight under another name.
        language = [model.get_decoder(), model.get_output_embeddings()]
        not_encoding = {
            id(tensor)
            for module in language
            if module is not None
            for tensor in module.state_dict(keep_vars=True).values()
        }
        digest = hashlib.sha256(transformers.__version__.encode())
        config = _without_origin(model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(str(getattr(model.config, "_attn_implementation", None)).encode())
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if id(tensor) not in not_encoding:
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
    # Of the needs, those from the prompt are not the encoder's work.
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
    modalities = {
        modality: _put(tensors, modality, media) for modality, media in encoded.modalities.items()
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


def _put(tensors: dict[str, Tensor], modality: str, media: EncodedModality) -> dict[str, Any]:
    """Add the tensors of all images, or all videos, and return what the JSON says of them."""
    tensors[f"{modality}.rows"] = media.rows
    for number, layer in enumerate(media.deepstack):
        tensors[f"{modality}.deepstack.{number}"] = layer
    items = []
    for number, item in enumerate(media.items):
        name, tokens = f"{modality}.items.{number}", item.tokens
        tensors[f"{name}.rows"] = item.rows
        of_item = {name: getattr(tokens, name) for name in ("features", *SCORING, *MIDDLE)}
        # As a rule embeddings are rows that are in the file already.
        are_rows = tokens.embeddings is not None and torch.equal(
            tokens.embeddings, media.rows[item.rows]
        )
        if not are_rows:
            of_item["embeddings"] = tokens.embeddings
        stored = {key: value for key, value in of_item.items() if value is not None}
        tensors.update({f"{name}.{key}": value for key, value in stored.items()})
        items.append(
            {
                "grid": tokens.grid,
                "is_picture": tokens.is_picture,
                "label": tokens.label,
                "medium": item.medium,
                "tensors": sorted(stored),
                "embeddings_are_rows": are_rows,
            }
        )
    return {
        "sizes": media.sizes,
        "stacked": media.stacked,
        "deepstack": len(media.deepstack),
        "videos_told": media.videos_told,
        "items": items,
    }


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
        raise  # it says more than what follows
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
    for number, described in enumerate(said["items"]):
        name, grid = f"{modality}.items.{number}", tuple(described["grid"])
        of_item = tensor(f"{name}.rows").cpu()
        fit = of_item.ndim == 1 and of_item.dtype == torch.long and len(of_item) == math.prod(grid)
        # Beyond the rows, or from the end, would be another item's.
        within = fit and bool(((of_item >= 0) & (of_item < count)).all())
        _check(within, f"the rows of {modality} {number}")
        inputs: dict[str, Any] = {key: tensor(f"{name}.{key}") for key in described["tensors"]}
        if described["embeddings_are_rows"]:
            inputs["embeddings"] = rows[of_item]
        if "projector" in needs:
            inputs["projector"] = vision.projector(modality)
        _check(set(needs) <= set(inputs), f"what is there of {modality} {number}")
        label, is_picture = str(described["label"]), bool(described.get("is_picture", True))
        tokens = VisualTokens(grid=grid, label=label, is_picture=is_picture, **inputs)
        # Files from before it was written have it in the label alone: "image 0, crop 2".
        medium = described.get("medium", label.partition(",")[0].rpartition(" ")[2])
        items.append(Item(of_item, tokens, int(medium)))
    return EncodedModality(
        rows, sizes, bool(said["stacked"]), deepstack, items, bool(said["videos_told"])
    )


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} do not fit the rest")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, none sharing memory."""
    apart: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        written = tensor.detach().cpu().contiguous()
        if written.untyped_storage().data_ptr() in memory:  # a view, or the very tensor twice
            written = written.clone()
        memory.add(written.untyped_storage().data_ptr())
        apart[name] = written
    return apart


def _without_origin(config: object) -> object:
    """Return a config without where it came from."""
    if not isinstance(config, dict):
        return config
    kept = {name: value for name, value in config.items() if name not in _NOT_ENCODING}
    return {name: _without_origin(value) for name, value in kept.items()}


def _add(digest: Any, value: object) -> None:
    """Add a tensor with its dtype and shape, or any other argument, to a hash."""
    # With dtype, shape and number of entries: bytes alone could be those of other arguments.
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        # As bytes: numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of them".encode())
        for entry in value:
            _add(digest, entry)
    else:
        digest.update(repr(value).encode())
