"""Calls of the worker's `Pruner` without an engine, on tensors that say they are on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig

from tokenprune.budget import Keep
from tokenprune.config import PruningConfig
from tokenprune.launches import counting, on_device
from tokenprune.tower.layouts import Grid, Medium, one_segment
from tokenprune_vllm.encoder_inputs import family_of
from tokenprune_vllm.processor import REGION, TICKET, Ticket
from tokenprune_vllm.pruner import Pruner
from tokenprune_vllm.regions import Region
from tokenprune_vllm.settings import ServerSettings

WIDTH = 1024


class Merger(nn.Module):
    """A projector like Qwen2-VL's: a norm of patches, and two layers for 2x2 of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(width // 4)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        merged: Tensor = self.mlp(self.ln_q(patches).reshape(-1, 4 * patches.shape[-1]))
        return merged


class Worker:
    """A worker that prunes images of Qwen2-VL; a projector on random features is its encoder.

    Parameters
    ----------
    method, keep
        How.
    grids
        Frames, rows and columns of each image.
    cuda
        Whether its tensors say that they are on a GPU.
    """

    def __init__(
        self, method: str, keep: Keep, grids: Sequence[Grid], width: int = WIDTH, cuda: bool = True
    ) -> None:
        config = Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"])
        torch.manual_seed(0)
        model: Any = nn.Module()
        model.visual = nn.Module()
        model.visual.merger = self.merger = Merger(width).eval()
        model.engine_positions = lambda ids, _: (torch.arange(len(ids)).expand(3, -1), 0)
        self.counts = [math.prod(grid) for grid in grids]
        self.patches = torch.randn(4 * sum(self.counts), width // 4)
        if cuda:
            on_device(model)
            self.patches = on_device(self.patches)
        pruning = PruningConfig(method=method, keep=keep)
        scheduler = SimpleNamespace(
            max_num_batched_tokens=2**16, max_num_encoder_input_tokens=2**16
        )
        vllm_config = SimpleNamespace(
            scheduler_config=scheduler,
            model_config=SimpleNamespace(get_inputs_embeds_size=lambda: width, dtype=torch.float32),
            ec_transfer_config=None,
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
            lora_config=None,
        )
        settings = ServerSettings.build(pruning)
        with counting(), torch.device("cuda:0" if cuda else "cpu"):
            self._pruner = Pruner(model, family_of(config), settings, vllm_config)
        fields = [_fields(grid, pruning) for grid in grids]
        self._arguments = {name: [one[name] for one in fields] for name in (TICKET, REGION)}

    def encode(self, **_: object) -> list[Tensor]:
        """Return the rows of each image."""
        rows: Tensor = self.merger(self.patches)
        return list(rows.split(self.counts))

    def call(self) -> list[Tensor]:
        """Return the rows that stay of each image, with their positions behind them."""
        return self._pruner.embed(self.encode, self._arguments)


def _fields(grid: Grid, pruning: PruningConfig) -> dict[str, Tensor]:
    """Return what the processor tells the worker of one image."""
    frames, rows, columns = grid
    total = math.prod(grid)
    is_row = torch.ones(total, dtype=torch.bool)
    region = Region(torch.full((total,), 7), is_row, (one_segment(grid),))
    patches = Medium("image", rows=total, grid=(frames, 2 * rows, 2 * columns))
    return Ticket("image", pruning, region, patches).pack()


def worker_call(method: str, grids: Sequence[Grid]) -> Callable[[], object]:
    """Return a call of a worker that keeps 8 tokens of each image."""
    return Worker(method, 8, grids).call
