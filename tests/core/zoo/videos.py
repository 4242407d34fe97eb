"""Videos to compare methods on: clusters of tokens that move from frame to frame."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune import VisualTokens

Array = NDArray[np.float64]


def video(grid: tuple[int, int, int], seed: int, width: int = 24) -> VisualTokens:
    """Return a video of several scenes, with all that the video methods look at.

    Tokens are of 12 clusters of rank 8 with a common offset and lengths of 0.5 to 1.5; a frame is
    the one before, a little moved, or the first of a new scene.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames, rows, columns = grid
    count = rows * columns
    basis, centres, offset = drawn(8, width), drawn(12, 8), 0.5 * drawn(width)
    vector, embeddings, vectors = drawn(9), [], []
    for frame in range(frames):
        if frame == 0 or float(torch.rand(1, generator=generator)) < 0.3:
            cluster = torch.randint(0, 12, (count,), generator=generator)
            vector = drawn(9) + 1
        vector = vector + 0.1 * drawn(9)
        own = (centres[cluster] + 0.3 * drawn(count, 8)) @ basis + offset
        length = 0.5 + torch.rand(count, 1, generator=generator)
        embeddings.append(length * own / own.norm(dim=-1, keepdim=True))
        vectors.append(vector)
    total = frames * count
    return VisualTokens(
        grid,
        embeddings=torch.cat(embeddings),
        features=drawn(total, 7) + torch.stack(vectors)[:, :7].repeat_interleave(count, 0),
        cls_attention=torch.rand(3, total, generator=generator).square(),
        frame_features=torch.stack(vectors),
        pooling_attention=torch.rand(total, generator=generator).square(),
    )


def array(tensor: object) -> Array:
    """Return a tensor in float64."""
    assert isinstance(tensor, Tensor)
    return np.asarray(tensor.double().numpy(), dtype=np.float64)


def cosine(a: Array, b: Array) -> float:
    """Return the cosine of two vectors, with a floor of 1e-8 on each length."""
    lengths = max(float(np.sqrt(a @ a)), 1e-8) * max(float(np.sqrt(b @ b)), 1e-8)
    return float(a @ b) / lengths
