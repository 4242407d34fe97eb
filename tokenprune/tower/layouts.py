"""How the rows that a vision encoder returns for one image or video lie in pictures.

A `Medium` is what the processor made of one image or video. A family turns it into `Segment`s: the
rows that are pruned together, each set with a budget of its own. Nothing here is guessed from how
many rows there are; where the numbers do not fit, the model is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.transfer import to_device

Sides = tuple[int, int]
"""(height, width) of a picture, or (rows, columns) of tokens."""

Grid = tuple[int, int, int]
"""(frames, rows, columns)."""


@dataclass(frozen=True)
class Medium:
    """One image or video as the processor made it.

    Attributes
    ----------
    modality
        ``"image"`` or ``"video"``.
    rows
        How many rows the encoder returns for it.
    pictures
        How many pictures the encoder is given for it: tiles, crops, frames.
    pixels
        Height and width of each picture in pixels, or None where all have the size in the config.
    size
        Height and width of the image before it was cut or resized, where the inputs say so.
    grid
        Frames, rows and columns of patches, where the inputs say so.
    aspect_ratio
        The limit on a map of crops that a call asks for in place of the config's (OneVision).
    shapes
        Rows and columns of patches of each picture, where they differ and the inputs say so; of
        tokens in Molmo 2.
    pooling
        The patches of which each token is pooled, where the inputs say so: their numbers among
        those of all pictures, -1 for none. Of a video, those of its first frame.
    holds
        Which rows are parts of pictures, where marks stand among them that are rows, too.
    """

    modality: str
    rows: int
    pictures: int = 1
    pixels: Sides | None = None
    size: Sides | None = None
    grid: Grid | None = None
    aspect_ratio: str | None = None
    shapes: tuple[Sides, ...] | None = None
    pooling: tuple[tuple[int, ...], ...] | None = None
    holds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("pixels", "size", "grid"):  # JSON makes lists of them
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.shapes is not None:
            sides = tuple((int(rows), int(columns)) for rows, columns in self.shapes)
            object.__setattr__(self, "shapes", sides)


def one_slice(rows: Tensor) -> slice | None:
    """Return the slice that ascending indices on the host are, or None where they are none.

    A slice is a view: nothing is copied, and no index has to come to the device.
    """
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else None


def places_on(rows: Sequence[Tensor], device: torch.device) -> list[slice | Tensor]:
    """Return by what each of some indices on the host is looked up in a tensor of a device.

    Parameters
    ----------
    rows
        LongTensors, ascending, of at least one index.
    device
        Where it is.

    Returns
    -------
    list
        Slices where they can be; all other indices come to the device in one copy.
    """
    found: list[slice | Tensor | None] = [one_slice(one) for one in rows]
    missing = [one for one, known in zip(rows, found, strict=True) if known is None]
    if not missing:
        return [known for known in found if known is not None]
    there = iter(to_device(torch.cat(missing), device).split(list(map(len, missing))))
    return [next(there) if known is None else known for known in found]


@dataclass(frozen=True)
class Segment:
    """Rows of one image or video that are pruned together, with a budget of their own.

    Attributes
    ----------
    rows
        LongTensor [N], which of the rows that the encoder returns for the image or video.
    grid
        (frames, rows, columns), N is their product; None where it is not known how they lie.
    label
        Which part of the image it is: ``"crop 2"``, or an empty string for the whole.
    """

    rows: Tensor
    grid: Grid | None
    label: str = ""


def one_segment(grid: Grid, first: int = 0) -> Segment:
    """Return the rows of a grid as one segment; `first` other rows stand in front of them."""
    return Segment(torch.arange(first, first + math.prod(grid)), grid)


def per_picture(medium: Medium, grid: Sides, label: str) -> list[Segment]:
    """Return a segment for each picture of an image, every picture of `grid` tokens."""
    tokens = math.prod(grid)
    return [
        Segment(
            torch.arange(number * tokens, (number + 1) * tokens), (1, *grid), f"{label} {number}"
        )
        for number in range(medium.pictures)
    ]


def grids_by_position(positions: Tensor, pictures: Sequence[int]) -> list[Grid]:
    """Return the grid of each image or video whose patches are told by their positions.

    Parameters
    ----------
    positions
        [P, N, 2], column and row of each patch of each picture; padding is below 0.
    pictures
        How many of the pictures, in order, each image or video has.
    """
    sides = (positions.amax(dim=1) + 1).tolist()  # one wait for the device, not one for each
    starts = itertools.accumulate(pictures, initial=0)
    return [
        (count, int(sides[start][1]), int(sides[start][0]))
        for start, count in zip(starts, pictures, strict=False)  # the last start is the end
    ]


def check_rows(medium: Medium, rows: int, lie: str) -> None:
    """Raise unless a layout has as many rows as the encoder returns.

    Parameters
    ----------
    medium
        The image or video.
    rows
        How many rows the layout has.
    lie
        How they lie, for the error.

    Raises
    ------
    UnsupportedModelError
        If it has not: how tokens lie is never guessed from their number.
    """
    if rows != medium.rows:
        of = "" if medium.pixels is None else " of {} x {} pixels".format(*medium.pixels)
        raise UnsupportedModelError(
            f"the encoder returned {medium.rows} tokens for {_named(medium)}{of}, and the model's "
            f"config makes {lie} of it: tokenprune does not know how they lie. Load the model with "
            "its own config."
        )


def _named(medium: Medium) -> str:
    article = "an" if medium.modality == "image" else "a"
    pictures = f" of {medium.pictures} pictures" if medium.pictures > 1 else ""
    return f"{article} {medium.modality}{pictures}"


# Orders of tokens -------------------------------------------------------------------------------


def order_of_windows(grid: Grid, side: int) -> Tensor:
    """Return the order in which an encoder that works on windows has the tokens of a video.

    Frame by frame, window by window, and in raster order inside a window; windows at the right and
    lower edge are smaller.

    Parameters
    ----------
    grid
        Frames, rows and columns of tokens.
    side
        Tokens on a side of a window.

    Returns
    -------
    Tensor
        LongTensor [T * R * W]: which token in raster order stands at each place.
    """
    frames, rows, columns = grid
    frame, row, column = torch.meshgrid(
        torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    across = math.ceil(columns / side)
    window = (frame * math.ceil(rows / side) + row // side) * across + column // side
    # Stable: inside a window tokens stay in raster order.
    return window.flatten().argsort(stable=True)


# Crops ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crops:
    """An image that is read whole and again as a map of crops at high resolution (AnyRes).

    Each row of the map ends in a newline. What the processor padded the image with is cut off the
    map. Source: LLaVA-NeXT, as transformers and vLLM pack it.

    Attributes
    ----------
    side
        Patches on a side of a crop.
    grid
        Rows and columns of crops.
    rows, columns
        Which of the map's patches hold the image: first and one behind the last.
    """

    side: int
    grid: Sides
    rows: Sides
    columns: Sides

    @classmethod
    def of(cls, size: Sides, resolutions: Sequence[Sides], pixels: int, side: int) -> Crops:
        """Return the crops of an image.

        Parameters
        ----------
        size
            Height and width of the image before it was cut.
        resolutions
            The config's ``image_grid_pinpoints``.
        pixels, side
            Pixels and patches on a side of a crop.
        """
        height, width = best_resolution(size, resolutions)
        grid = height // pixels, width // pixels
        rows, columns = _unpadded(size, (grid[0] * side, grid[1] * side))
        return cls(side, grid, rows, columns)

    @property
    def pictures(self) -> int:
        """How many pictures the encoder is given, the whole image among them."""
        return 1 + math.prod(self.grid)

    @property
    def map_sides(self) -> Sides:
        """Rows and columns of patches of the map, without padding and newlines."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def map_of(self, values: Tensor) -> Tensor:
        """Return [X, rows, columns] of the map, of values [crops, side * side, X]."""
        crops = values.unflatten(1, (self.side, self.side)).unflatten(0, self.grid)
        whole: Tensor = crops.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        return whole[:, slice(*self.rows), slice(*self.columns)]


def best_resolution(size: Sides, resolutions: Sequence[Sides]) -> Sides:
    """Return the resolution that shows most of an image, and of those wastes least.

    Parameters
    ----------
    size
        Height and width of the image.
    resolutions
        Heights and widths to choose from; of equally good ones the first is taken.
    """

    def shown_and_wasted(resolution: Sides) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        pixels = min(int(size[1] * scale) * int(size[0] * scale), math.prod(size))
        return pixels, pixels - math.prod(resolution)

    height, width = max(resolutions, key=shown_and_wasted)
    return int(height), int(width)


def _unpadded(size: Sides, padded: Sides) -> tuple[Sides, Sides]:
    """Return the rows and columns of a padded map that hold the image."""
    height, width = size
    if width / height > padded[1] / padded[0]:
        # Rounded to 7 places first, as the engines do, since the product may be a hair too small.
        filled = int(round(height * (padded[1] / width), 7))
        border = (padded[0] - filled) // 2
        return (border, padded[0] - border), (0, padded[1])
    filled = int(round(width * (padded[0] / height), 7))
    border = (padded[1] - filled) // 2
    return (0, padded[0]), (border, padded[1] - border)
