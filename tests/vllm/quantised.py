"""Quantised checkpoints, packed by hand: int8 of compressed-tensors (W8A8), AWQ and GPTQ.

Scales are powers of two, so that every weight that codes stand for is a number of bfloat16: a copy
of the checkpoint that holds these weights as they are calculates with the same ones.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
"""Inputs that share a scale in AWQ and GPTQ."""

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Of eight outputs that share an int32, the one behind each four bits."""

_W8A8_HIGHEST = 63
"""Of the codes of weights. Processors without instructions for int8 add two products in 16 bits, of
a code with an input of up to 255 each, and cut off what is larger."""

LANGUAGE_MODEL = r"(?!vision|visual).*layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
EVERY_LAYER = r".*(layers|blocks)\.\d+\..*(proj|qkv|fc1|fc2)$|.*(projector|merger).*(linear|mlp).*"


@dataclass(frozen=True)
class Scheme:
    """A format of quantised weights.

    Attributes
    ----------
    name
        What vLLM calls it.
    dtype
        Of everything that is not quantised.
    config
        What config.json says of it; `left` are the names of linear layers that are no part of it.
    pack
        A weight [out, in] -> its tensors by the ends of their names, and what they stand for.
    """

    name: str
    dtype: torch.dtype
    config: Callable[[list[str]], dict[str, Any]]
    pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def save(folder: Path, scheme: Scheme, layers: str) -> Path:
    """Quantise the checkpoint in a folder, and write what its weights stand for beside it.

    Parameters
    ----------
    folder
        Of a checkpoint, in which weights are replaced.
    scheme
        How.
    layers
        Which linear layers: a pattern of their names.

    Returns
    -------
    Path
        Of the copy that is not quantised.
    """
    copy = folder.with_name(f"{folder.name}-whole")
    shutil.copytree(folder, copy)
    packed: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    left: list[str] = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer != name and tensor.ndim == 2 and re.match(layers, layer):
            tensors, stands_for = scheme.pack(tensor.float())
            packed |= {f"{layer}.{end}": one.contiguous() for end, one in tensors.items()}
            whole[name] = stands_for.to(scheme.dtype)
            continue
        if layer != name and tensor.ndim == 2 and "embed" not in layer:
            left.append(layer)
        packed[name] = whole[name] = tensor.to(scheme.dtype)
    assert len(packed) > len(whole)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(whole, copy / "model.safetensors", {"format": "pt"})
    for one, said in ((folder, {"quantization_config": scheme.config(left)}), (copy, {})):
        config = json.loads((one / "config.json").read_text())
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            part["dtype"] = str(scheme.dtype).removeprefix("torch.")
        (one / "config.json").write_text(json.dumps(config | said, indent=2))
    return copy


def rounded(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round what goes into a layer to int8, token by token: a hook."""
    tokens = inputs[0]
    scales = tokens.abs().amax(dim=-1, keepdim=True) / 127
    return ((tokens / scales).round().nan_to_num(0.0) * scales,)


def round_inputs(model: nn.Module, layers: str) -> None:
    """Let linear layers of a model round their inputs as W8A8 does."""
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.match(layers, name.removeprefix("model.")):
            module.register_forward_pre_hook(rounded)
            found += 1
    assert found


def _power_of_two(scales: Tensor) -> Tensor:
    """Return the next larger powers of two."""
    return torch.exp2(scales.clamp_min(2.0**-20).log2().ceil())


def _w8a8(left: list[str]) -> dict[str, Any]:
    codes = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**codes, "strategy": "channel", "dynamic": False},
                "input_activations": {**codes, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": left,
    }


def _pack_w8a8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = _power_of_two(weight.abs().amax(dim=1, keepdim=True) / _W8A8_HIGHEST)
    codes = (weight / scale).round().clamp(-_W8A8_HIGHEST, _W8A8_HIGHEST)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def _pack_awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    lowest, highest = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scale = _power_of_two((highest - lowest) / 15)
    zero = (-lowest / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    order = torch.tensor(_AWQ_ORDER)
    tensors = {
        "qweight": _pack(codes.flatten(1).T.unflatten(1, (-1, 8))[..., order]),
        "qzeros": _pack(zero[..., 0].T.unflatten(1, (-1, 8))[..., order]),
        "scales": scale[..., 0].T.to(torch.bfloat16),
    }
    return tensors, ((codes - zero) * scale).flatten(1)


def _pack_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    scale = _power_of_two(groups.abs().amax(dim=-1, keepdim=True) / 7)
    codes = (groups / scale).round().clamp(-8, 7) + 8
    inputs = weight.shape[1]
    zeros = torch.full_like(scale[..., 0].T, 7)  # one less than it is
    tensors = {
        "qweight": _pack(codes.flatten(1).unflatten(1, (-1, 8)).movedim(0, 1)),
        "qzeros": _pack(zeros.unflatten(1, (-1, 8))),
        "scales": scale[..., 0].T.to(torch.bfloat16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    return tensors, ((codes - 8) * scale).flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """Return int32 [...] of eight codes of four bits each [..., 8], the first one lowest."""
    shifted = codes.long() << torch.arange(0, 32, 4)
    return shifted.sum(dim=-1).to(torch.int32)


def _awq(left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left,
    }


def _gptq(left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    }


W8A8 = Scheme("compressed-tensors", torch.float32, _w8a8, _pack_w8a8)
AWQ = Scheme("awq", torch.bfloat16, _awq, _pack_awq)
GPTQ = Scheme("gptq", torch.bfloat16, _gptq, _pack_gptq)
