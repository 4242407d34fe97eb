"""The trained selector itself: a projector and a small decoder, and the folder it is kept in.

The folder holds ``config.json`` and ``model.safetensors``; nothing in it is code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import ConfigError, InputFileError, UnsupportedModelError, reason_of
from tokenprune.files import replacing, write_whole
from tokenprune.formats import KEY, check_format
from tokenprune.question.attention import Reduction, question_scores
from tokenprune_hf.prefix import read_layers

KIND = "tokenprune-flexselect-lite"
"""What a folder's config.json says it is."""

FORMAT = 1
"""Rises when the meaning of the folder's files changes."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class LiteConfig:
    """What a trained selector looks like, and for which model it was trained.

    Attributes
    ----------
    features
        C, the width of the vision features it reads.
    model_type, vocab_size
        Of the model whose ranking it learnt, and whose text it reads.
    decoder
        Settings of the decoder, a Qwen2 of transformers. The default is the shape of the paper's
        0.5 B decoder, without its vocabulary.
    reduction
        How heads and question tokens become one score, as in `FlexSelect`.
    trained
        How it was trained: whatever the trainer had to say.
    """

    features: int
    model_type: str
    vocab_size: int
    decoder: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        }
    )
    reduction: Reduction = "max"
    trained: dict[str, Any] = field(default_factory=dict)


class LiteModel(nn.Module):
    """Scores visual tokens by the last layer's attention of the question to them.

    Parameters
    ----------
    config
        Its shape.
    """

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        import transformers

        make: Any = transformers  # untyped
        shape = {"vocab_size": config.vocab_size, "tie_word_embeddings": False, **config.decoder}
        self.config = config
        self.decoder = make.Qwen2Model(make.Qwen2Config(**shape))
        width = self.decoder.config.hidden_size
        self.projector = nn.Sequential(
            nn.LayerNorm(config.features),
            nn.Linear(config.features, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, features: Tensor, question: Tensor) -> Tensor:
        """Return the scores of S sets of visual tokens in one pass.

        Parameters
        ----------
        features
            [S, n, C], what the vision encoder made of each set.
        question
            LongTensor [Q], the text's ids in the large model's vocabulary.

        Returns
        -------
        Tensor
            float32 [S, n], higher for a token more worth keeping.

        Raises
        ------
        UnsupportedModelError
            If the features or the text are not those of the model it was trained for.
        """
        sets, count, width = features.shape
        if width != self.config.features:
            raise UnsupportedModelError(
                f"the selector was trained for features of width {self.config.features} "
                f"({self.config.model_type}), and these are {width} wide. Train one for this model "
                "with `tokenprune train-selector`."
            )
        if len(question) == 0 or int(question.max()) >= self.config.vocab_size:
            raise UnsupportedModelError(
                f"the selector reads a question of ids below {self.config.vocab_size}, the "
                f"vocabulary of the {self.config.model_type} it was trained for, and got "
                f"{len(question)} ids up to {int(question.max()) if len(question) else '-'}."
            )
        visual = self.projector(features.to(next(self.projector.parameters()).dtype))
        text = self.decoder.get_input_embeddings()(question.to(features.device))
        embeddings = torch.cat([visual, text[None].expand(sets, -1, -1)], dim=1)
        length = embeddings.shape[1]
        positions = torch.arange(length, device=embeddings.device)[None].expand(sets, -1)
        last = self.decoder.config.num_hidden_layers - 1
        asked = torch.arange(count, device=embeddings.device)
        seen = read_layers(
            self.decoder,
            embeddings,
            positions,
            [last],
            asked=[asked] * sets,
            questions=len(question),
        )
        return torch.stack(
            [question_scores(of_set[last], self.config.reduction) for of_set in seen]
        )

    # The folder --------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the folder; a file that is there already is replaced as a whole."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as part:
            save_file(state, part, metadata={"format": "pt"})
        text = json.dumps({"kind": KIND, KEY: FORMAT, **asdict(self.config)}, indent=2)
        write_whole(folder / CONFIG, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> LiteModel:
        """Read a folder that `save` wrote; the model is in eval mode.

        Raises
        ------
        InputFileError
            If the folder is no selector's, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        # An engine may have set another default device or dtype; the file's own are taken.
        with torch.device("cpu"):
            model = cls(read_config(folder))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputFileError(
                f"the weights of the selector {folder} cannot be read ({reason_of(error)}). Copy "
                "the folder again, or train it again with `tokenprune train-selector`."
            ) from None
        return model.requires_grad_(False).eval()


def read_config(folder: Path) -> LiteConfig:
    """Read what a selector's folder says about itself, without its weights.

    Raises
    ------
    InputFileError
        If there is no such folder, or it is no selector's.
    """
    file = folder / CONFIG
    advice = "Give the folder that `tokenprune train-selector --out FOLDER` wrote."
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputFileError(
            f"there is no selector at {folder}: {file.name} cannot be read ({reason_of(error)}). "
            f"{advice}"
        ) from None
    except ValueError as error:
        raise InputFileError(f"{file} is damaged: {reason_of(error)}. {advice}") from None
    if not isinstance(values, dict) or values.pop("kind", None) != KIND:
        raise InputFileError(f"{file} does not belong to a selector of tokenprune. {advice}")
    values = check_format(values, FORMAT, file, advice, kind=ConfigError)
    try:
        return LiteConfig(**values)
    except TypeError as error:
        raise ConfigError(
            f"{file} was written by another version of tokenprune ({reason_of(error)}). {advice}"
        ) from None


def load_on(folder: Path, device: torch.device) -> LiteModel:
    """Return a folder's model on a device, in float32; each is read once per process."""
    file = (folder / WEIGHTS).resolve()
    key = (str(file), file.stat().st_mtime_ns if file.exists() else 0, str(device))
    if key not in _LOADED:
        _LOADED[key] = LiteModel.load(folder).float().to(device)
    return _LOADED[key]


_LOADED: dict[tuple[str, int, str], LiteModel] = {}
