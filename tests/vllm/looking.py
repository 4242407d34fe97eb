"""What methods look at in a tower that vLLM alone has, calculated by hand from its plain engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.tokens import Projector
from tokenprune.tower.projectors import MLPProjector


@dataclass
class Looked:
    """What a tower made of one image or video.

    Attributes
    ----------
    grid
        Frames, rows and columns of tokens.
    features
        [N, C], in raster order.
    attention
        [H, N], likewise.
    projector
        What makes rows of features.
    modality
        ``i`` an image, ``v`` a video.
    """

    grid: tuple[int, int, int]
    features: Tensor
    attention: Tensor
    projector: Projector
    modality: str = "i"


@dataclass
class Run:
    """One run of a tower.

    Attributes
    ----------
    grids
        LongTensor [pictures, 3] of patches.
    query, key
        [P, H, d] of the last layer.
    features
        [N, C], what is projected.
    """

    grids: Tensor
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))


class Tower:
    """Where a model's tower is; the defaults fit one that reads patches in the order of tokens."""

    merged = 2
    """Patches on a side of a token."""

    def parts(self, model: Any) -> tuple[Any, Any, Any]:
        """Return the tower, the attention of its last layer, and what is given the features."""
        raise NotImplementedError

    def grids(self, args: Any, kwargs: Any) -> Tensor:
        """Return the grids with which the tower is called."""
        raise NotImplementedError

    def order(self, model: Any, grids: Tensor) -> Tensor:
        """Return which token in raster order stands at each place of the last layer."""
        return torch.arange(int(grids.prod(dim=1).sum()) // self.merged**2)

    def together(self, rows: int, columns: int) -> Tensor:
        """Return the patches of a picture in an order in which those of a token are neighbours."""
        return torch.arange(rows * columns)

    def projector(self, model: Any) -> Projector:
        """Return what makes rows of features."""
        raise NotImplementedError

    def watch(self, model: Any) -> list[Run]:
        """Note every run of a model's tower in the list that is returned."""
        runs: list[Run] = []
        tower, attention, entrance = self.parts(model)

        def start(_module: Any, args: Any, kwargs: Any) -> None:
            runs.append(Run(self.grids(args, kwargs).clone()))

        def attend(module: Any, args: Any, kwargs: Any) -> None:
            query, key = (
                args[place] if len(args) > place else kwargs[name]
                for place, name in enumerate(("query", "key"))
            )
            heads = module.num_heads, module.head_size
            runs[-1].query = query.reshape(-1, *heads).clone()
            runs[-1].key = key.reshape(-1, *heads).clone()

        def project(_module: Any, args: Any) -> None:
            runs[-1].features = args[0].clone()

        tower.register_forward_pre_hook(start, with_kwargs=True)
        attention.register_forward_pre_hook(attend, with_kwargs=True)
        entrance.register_forward_pre_hook(project)
        return runs

    def is_video(self, run: Run) -> bool:
        """Say whether a run was of videos."""
        return bool((run.grids[:, 0] > 1).any())

    def items(self, run: Run) -> list[tuple[int, int, int]]:
        """Return frames, rows and columns of patches of each image or video."""
        return [(frames, rows, columns) for frames, rows, columns in run.grids.tolist()]

    def looked(self, model: Any, run: Run) -> list[Looked]:
        """Return what a run that `watch` noted made of each image or video."""
        scores = []
        start = 0
        for frames, rows, columns in run.grids.tolist():
            for _ in range(frames):
                own = slice(start, start + rows * columns)
                query, key = run.query[own].transpose(0, 1), run.key[own].transpose(0, 1)
                logits = query @ key.mT * query.shape[-1] ** -0.5
                received = logits.softmax(dim=-1).mean(dim=1)  # [H, P]
                scores.append(received[:, self.together(rows, columns)])
                start += rows * columns
        tokens = torch.cat(scores, dim=1).unflatten(1, (-1, self.merged**2)).mean(dim=2)
        order = self.order(model, run.grids)
        attention = torch.empty_like(tokens)
        attention[:, order] = tokens
        features = run.features.reshape(len(order), -1)
        grids = [
            (frames, rows // self.merged, columns // self.merged)
            for frames, rows, columns in self.items(run)
        ]
        counts = [frames * rows * columns for frames, rows, columns in grids]
        modality = "v" if self.is_video(run) else "i"
        parts = zip(grids, features.split(counts), attention.split(counts, dim=1), strict=True)
        return [Looked(*of_item, self.projector(model), modality) for of_item in parts]


class OvisTower(Tower):
    """That of Ovis 2.5, which has tokens in the order of windows."""

    def parts(self, model: Any) -> tuple[Any, Any, Any]:
        """Return the tower, the attention of its last layer, and what is given the features."""
        tokenizer = model.visual_tokenizer
        layers = tokenizer.vit.vision_model.encoder.layers
        return tokenizer.vit, layers[-1].self_attn.attn, tokenizer.head

    def grids(self, args: Any, kwargs: Any) -> Tensor:
        """Return the grids with which the tower is called."""
        grids: Tensor = args[1]
        return grids

    def order(self, model: Any, grids: Tensor) -> Tensor:
        """Return what the tower itself takes the tokens apart by."""
        order: Tensor = model.visual_tokenizer.vit.vision_model.encoder.get_window_index(grids)[0]
        return order

    def projector(self, model: Any) -> Projector:
        """Return what makes rows of features."""
        linear, norm = model.visual_tokenizer.head
        weight, _ = matrix_of(linear)
        words = model.vte.weight[: weight.shape[1]]

        def project(features: Tensor) -> Tensor:
            projected: Tensor = norm(features @ weight).softmax(dim=-1) @ words
            return projected

        return project


def matrix_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return [C, D] and [D] of one of vLLM's linear layers, whose weight is repacked on a CPU."""
    with torch.inference_mode():
        zero = torch.zeros(1, layer.input_size)
        found = [layer(one) for one in (zero, torch.eye(layer.input_size))]
        bias, both = (one[0] if isinstance(one, tuple) else one for one in found)
    return (both - bias).clone(), bias[0].clone()


class OvisTiles(OvisTower):
    """That of Ovis2, which reads tiles of one size apart, in raster order."""

    def parts(self, model: Any) -> tuple[Any, Any, Any]:
        """Return the tower, the attention of its last layer, and what is given the features."""
        tokenizer = model.visual_tokenizer
        layers = tokenizer.backbone.vision_model.encoder.layers
        return tokenizer.backbone, layers[-1].self_attn.attn, tokenizer.head

    def grids(self, args: Any, kwargs: Any) -> Tensor:
        """Return the grids with which the tower is called."""
        tiles, _, height, width = args[0].shape
        return torch.tensor([[1, height // 4, width // 4]] * tiles)

    def order(self, model: Any, grids: Tensor) -> Tensor:
        """Return raster order."""
        return Tower.order(self, model, grids)

    def together(self, rows: int, columns: int) -> Tensor:
        """Return blocks of 2 x 2 patches, one after another."""
        patches = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2)
        return patches.transpose(1, 2).flatten()


class OneVisionTower(Tower):
    """That of LLaVA-OneVision 2, in which each frame of a video is a picture."""

    def parts(self, model: Any) -> tuple[Any, Any, Any]:
        """Return the tower, the attention of its last layer, and what is given the features."""
        tower = model.visual
        return tower, tower.encoder.layers[-1].self_attn.attn, tower.merger.ln_q

    def grids(self, args: Any, kwargs: Any) -> Tensor:
        """Return the grids with which the tower is called."""
        grids: Tensor = kwargs["grid_thw"]
        return grids

    def is_video(self, run: Run) -> bool:
        """Say whether a run was of a video, which has more frames than a prompt has images."""
        return len(run.grids) > 2

    def items(self, run: Run) -> list[tuple[int, int, int]]:
        """Return frames, rows and columns of patches of each image, or of the video."""
        if not self.is_video(run):
            return super().items(run)
        _, rows, columns = run.grids[0].tolist()
        return [(len(run.grids), rows, columns)]

    def projector(self, model: Any) -> Projector:
        """Return what makes rows of features."""
        merger = model.visual.merger
        first, activation, second = merger.mlp
        norm = nn.LayerNorm(merger.ln_q.normalized_shape, eps=merger.ln_q.eps)
        norm.load_state_dict(merger.ln_q.state_dict())  # one on which nothing is hooked
        return MLPProjector(_linear(first), activation, _linear(second), norm, 4)


def _linear(layer: Any) -> nn.Linear:
    weight, bias = matrix_of(layer)
    made = nn.Linear(*weight.shape)
    made.weight.data, made.bias.data = weight.mT.contiguous(), bias
    return made
