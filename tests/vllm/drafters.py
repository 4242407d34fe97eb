"""Tiny drafters for speculative decoding.

Random models cannot be guessed. So embeddings of the model are made much louder than what its
layers add to them, and a drafter that looks at embeddings is right now and then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

tf: Any = transformers  # its classes are not typed

DRAFTED = 3
"""Tokens that each drafts at a step."""

_LOUD = 40.0
_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def add_mtp_head(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Give a checkpoint of Qwen3.5 a head that predicts the token after the next one.

    Its layer is a copy of the model's last, which attends. It reads the token's embedding and a
    little of what the model made of the token before.

    Returns
    -------
    dict
        vLLM's ``speculative_config``.
    """
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    layer = f"model.language_model.layers.{text['num_hidden_layers'] - 1}."
    width = text["hidden_size"]
    dtype = weights[layer + "mlp.down_proj.weight"].dtype
    head: dict[str, Tensor] = {
        name.replace(layer, "mtp.layers.0."): tensor * (0.1 if name.endswith(_OUTPUTS) else 1)
        for name, tensor in weights.items()
        if name.startswith(layer)
    }
    head["mtp.fc.weight"] = _mostly_embedding(width, seed).to(dtype)
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        head[f"mtp.{name}.weight"] = torch.zeros(width, dtype=dtype)  # it counts from 1
    save_file(_quiet(weights) | head, folder / "model.safetensors", {"format": "pt"})
    text["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return {"method": "mtp", "num_speculative_tokens": DRAFTED}


def save_eagle(target: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write an EAGLE drafter for a checkpoint, whose embeddings it makes louder."""
    _, text = _quieten(target)
    config = _llama(text)
    body = tf.LlamaModel(config)
    state = {
        name: tensor * (0.1 if name.endswith(_OUTPUTS) else 1)
        for name, tensor in body.state_dict().items()
        if name.startswith("layers.") and "input_layernorm" not in name
    }
    state["fc.weight"] = _mostly_embedding(config.hidden_size, seed)
    return _write(folder, config, state, "eagle")


def save_eagle3(target: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write an EAGLE-3 drafter with random weights, which reads what two layers were given."""
    _, text = _quieten(target)
    config = _llama(text)
    config.eagle_config = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    shapes = {
        "fc": (width, 2 * width),
        "lm_head": (config.vocab_size, width),
        "midlayer.self_attn.q_proj": (heads, 2 * width),
        "midlayer.self_attn.k_proj": (kv_heads, 2 * width),
        "midlayer.self_attn.v_proj": (kv_heads, 2 * width),
        "midlayer.self_attn.o_proj": (width, heads),
        "midlayer.mlp.gate_proj": (inner, width),
        "midlayer.mlp.up_proj": (inner, width),
        "midlayer.mlp.down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{name}.weight": torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    for name in ("norm", *(f"midlayer.{norm}" for norm in norms)):
        state[f"{name}.weight"] = torch.ones(width)
    return _write(folder, config, state, "eagle3")


def save_draft_model(target: Path, folder: Path) -> dict[str, Any]:
    """Write a text model with the embeddings and the head of a checkpoint, made louder there."""
    weights, text = _quieten(target)
    config = _llama(text)
    model = tf.LlamaForCausalLM(config)
    state = {
        name: tensor * (0.1 if name.endswith(_OUTPUTS) else 1)
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in weights.items():
        if name.endswith("embed_tokens.weight"):
            state["model.embed_tokens.weight"] = tensor.clone()
        elif name.endswith("lm_head.weight"):
            state["lm_head.weight"] = tensor.clone()
    return _write(folder, config, state, "draft_model")


def _quieten(target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make a checkpoint's embeddings louder; return its weights, and the config of its text."""
    weights = _quiet(load_file(target / "model.safetensors"))
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    text = json.loads((target / "config.json").read_text())["text_config"]
    return weights, text


def _quiet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a model whose layers add little to embeddings, and can be guessed."""
    return {
        name: tensor * (_LOUD if name.endswith("embed_tokens.weight") else 1)
        for name, tensor in weights.items()
    }


def _mostly_embedding(width: int, seed: int) -> Tensor:
    """Return [D, 2 D]: what makes one of a token's embedding and of what was before."""
    noise = 0.05 * torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.eye(width), noise], dim=1)


def _llama(text: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return tf.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=1,
        tie_word_embeddings=False,
        **{
            name: text[name]
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "head_dim"),
                *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            )
        },
    )


def _write(folder: Path, config: Any, state: dict[str, Tensor], method: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "float32"}))
    return {"method": method, "model": str(folder), "num_speculative_tokens": DRAFTED}
