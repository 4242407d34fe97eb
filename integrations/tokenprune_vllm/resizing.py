"""`resize` for one request: its pictures made smaller in front of the engine's own processor.

How many tokens a size comes to is counted by having that processor lay out a blank picture. Only
the picture's own size is changed: the processor is handed nothing that a client could not send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from vllm.multimodal.parse import ImageProcessorItems

from tokenprune.baselines import RESIZE
from tokenprune.errors import TokenPruneError
from tokenprune.media.sizes import Counted, Plan, Planner, Setting, Shape, Way, shrinking
from tokenprune_vllm.encoder_inputs import SOUND
from tokenprune_vllm.settings import RequestError, RequestSettings


class PictureSizes(Planner):
    """Finds how small pictures have to be; remembers what a size comes to.

    Parameters
    ----------
    patch
        See `Planner`.
    count
        Has the engine's processor lay out a picture, and counts.
    """

    def __init__(self, patch: int, count: Callable[[Image.Image], Counted]) -> None:
        super().__init__(patch)
        self._laid_out = count

    def stages(self, shape: Shape) -> list[list[Way]]:
        """Return the one way: a smaller picture."""
        return [[shrinking(shape)]]

    def laid_out(self, setting: Setting) -> Counted:
        """Have the engine's processor lay out a blank picture."""
        blank = setting.shape.blank()
        if not isinstance(blank, Image.Image):
            raise RequestError(f"{RESIZE} makes pictures smaller, and no videos.")
        return self._laid_out(blank)

    def refusal(
        self, shape: Shape, fewest: int, kept: int, full: int | None = None
    ) -> RequestError:
        """Return the error, which says how few tokens there can be."""
        what = f"a picture of {shape.width} x {shape.height} pixels"
        if full is None or fewest >= full:
            return RequestError(
                f"vLLM's processor of this model makes {fewest} visual tokens of {what} whatever "
                f"its size, so {RESIZE} cannot make it fewer. Ask for a method that prunes."
            )
        return RequestError(
            f"vLLM's processor of this model makes at least {fewest} of {full} visual tokens of "
            f"{what}, and {kept} are to be kept. Ask for a keep of {fewest} or more, or for a "
            "method that prunes."
        )


def plans_of(mm_items: Any, request: RequestSettings, sizes: PictureSizes) -> Sequence[Plan]:
    """Return how small each picture of a request is made; nothing where it has none.

    Parameters
    ----------
    mm_items
        vLLM's, by modality.
    request
        Which asks for smaller pictures.
    sizes
        Of the model.

    Raises
    ------
    RequestError
        If there is something else to see, or a picture cannot be made small enough.
    """
    plans: list[Plan] = []
    for modality, items in mm_items.items():
        if modality in SOUND or not len(items):
            continue
        if modality != "image" or not isinstance(items, ImageProcessorItems):
            raise RequestError(
                f"{RESIZE} makes pictures smaller, and this request has {len(items)} of another "
                f"kind ({modality}). Send pictures alone, or ask for a method that prunes."
            )
        for picture in items.get_all():
            if not isinstance(picture, Image.Image):
                raise RequestError(
                    f"{RESIZE} takes pictures (PIL.Image), and was given a "
                    f"{type(picture).__name__}. Pass PIL.Image.fromarray(...) of it."
                )
            try:
                plans.append(
                    sizes.planned(
                        Shape.of(picture), request.resized_to, halfway=request.config is not None
                    )
                )
            except RequestError:
                raise
            except TokenPruneError as error:
                raise RequestError(f"{RESIZE}: {error}") from error
    return plans


def resized(info: Any, mm_items: Any, plans: Sequence[Plan], *, blank: bool = False) -> Any:
    """Return vLLM's items with smaller pictures.

    Parameters
    ----------
    info
        Of the engine's processor.
    mm_items
        As in `plans_of`.
    plans
        One for each picture.
    blank
        Whether their sizes are enough.
    """
    if not plans:
        return mm_items
    shapes = [plan.setting.shape for plan in plans]
    pictures = [
        shape.blank() if blank else shape.fitted(picture)
        for shape, picture in zip(shapes, mm_items["image"].get_all(), strict=True)
    ]
    smaller = info.parse_mm_data({"image": pictures}, validate=False)
    return type(mm_items)({**mm_items, "image": smaller["image"]})
