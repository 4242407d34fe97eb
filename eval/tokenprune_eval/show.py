"""`tokenprune show`: an image, what each method makes of its tokens, and which of them it keeps."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import (
    Parser,
    add_keep,
    add_methods,
    add_model,
    add_options,
    add_positions,
    options_by_method,
    parse_keep,
)
from tokenprune.baselines import RESIZE
from tokenprune.errors import (
    ConfigError,
    MissingPackageError,
    OutputError,
    TokensError,
    UnsupportedModelError,
)
from tokenprune.packages import Package
from tokenprune.providers import BUNDLED
from tokenprune_eval.packages import PLOTS, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure
    from PIL import Image

    from tokenprune.budget import Keep
    from tokenprune.config import Positions
    from tokenprune.inside.base import InsideMethod
    from tokenprune.selection import Selection
    from tokenprune.selectors.base import Selector
    from tokenprune_eval.shared.left_out import LeftOut
    from tokenprune_hf.encoding import Encoded
    from tokenprune_hf.resized import Resized

    Method = Selector | InsideMethod

    Pixels = npt.NDArray[np.float64]
    """[H, W, 3], 0 to 1."""

HELP = "draw an image, the methods' score maps and the patches they keep"
EXTRA = "demo"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*TRANSFORMERS, *PLOTS, *needs_of_model(arguments.model or BUNDLED))


_FORMATS = (".png", ".pdf", ".svg")
_METHODS_ACROSS = 6
_MAX_NEW_TOKENS = 48
_SOFT = "#5c6672"


@dataclass(frozen=True)
class Shown:
    """What one method did.

    Attributes
    ----------
    method
        Its name.
    whole
        The selection of the item that shows the whole image.
    others
        The selections of all other items: crops or tiles, which are counted and not drawn.
    answer
        What the model said with these tokens; None where nothing was asked.
    """

    method: str
    whole: Selection
    others: tuple[Selection, ...]
    answer: str | None

    def caption(self) -> str:
        """Return how many tokens stayed."""
        text = f"{len(self.whole)} of {self.whole.total} tokens"
        if self.others:
            kept = sum(len(other) for other in self.others)
            total = sum(other.total for other in self.others)
            crops = "1 more crop" if len(self.others) == 1 else f"{len(self.others)} more crops"
            text += f"; {kept} of {total} in {crops}, not drawn"
        return text


@dataclass(frozen=True)
class Smaller:
    """The picture made smaller, in place of a method.

    Attributes
    ----------
    seen
        float64 [H, W, 3], 0 to 1: as the encoder saw it.
    tokens, of_tokens
        Visual tokens now, and at full size.
    answer
        See `Shown`.
    method
        Its name.
    """

    seen: Pixels
    tokens: int
    of_tokens: int
    answer: str | None
    method: str = RESIZE

    def caption(self) -> str:
        """Return how many tokens it has."""
        return f"{self.tokens} of {self.of_tokens} tokens"


@dataclass(frozen=True)
class Drawn:
    """A picture of what methods keep of an image.

    Attributes
    ----------
    seen
        float64 [H, W, 3], 0 to 1: the image as the encoder saw it.
    shown
        What each method did.
    question
        What was asked, or None.
    plain
        The answer with all tokens, or None.
    left_out
        Of methods that could not be drawn, the reasons.
    """

    seen: Pixels
    shown: Sequence[Shown | Smaller]
    question: str | None
    plain: str | None
    left_out: Sequence[str] = ()

    def save(self, out: Path | str) -> None:
        """Write it as a file.

        Parameters
        ----------
        out
            Its name, which ends in .png, .pdf or .svg.

        Raises
        ------
        ConfigError, OutputError
            If a file of that name cannot be written.
        """
        from tokenprune_eval.shared.output import write_whole

        out = Path(out)
        _check_out(out)
        write_whole(out, self.content(out.suffix.lower()))

    def content(self, suffix: str) -> bytes:
        """Return the bytes of a file of the kind `suffix`, for example ``".svg"``."""
        return _draw(self.seen, self.shown, self.question, self.plain, suffix)

    def _repr_png_(self) -> bytes:
        return self.content(".png")

    def __str__(self) -> str:
        """Return how many tokens each method keeps, and what the model says with them."""
        lines = [] if self.plain is None else [f"unpruned: {self.plain}"]
        for one in self.shown:
            answer = "" if one.answer is None else f": {one.answer}"
            lines.append(f"{one.method}, {one.caption()}{answer}")
        return "\n".join(lines)


def configure(parser: Parser) -> None:
    """Add the arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    add_model(parser, "a checkpoint of transformers (default: the bundled model)", required=False)
    parser.add_argument(
        "--question", metavar="TEXT", help="also answer this, with all tokens and with those kept"
    )
    add_methods(
        parser,
        "one panel each; resize: the picture made smaller (default: zeroth-order cls-attention "
        "divprune)",
    )
    add_keep(parser, default="0.25")
    add_positions(parser)
    add_options(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("show.png"),
        metavar="FILE",
        help="the picture to write: .png, .pdf or .svg (default: show.png)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and say what was kept."""
    keep = parse_keep(arguments.keep)
    methods = tuple(
        dict.fromkeys(arguments.method or ("zeroth-order", "cls-attention", "divprune"))
    )
    selectors = _selectors(methods, arguments.option)
    _check_question(selectors, arguments.question, "add --question TEXT")
    _check_out(arguments.out)

    from tokenprune.media.images import load_image
    from tokenprune_hf.loading import load

    image = load_image(arguments.image)
    model, processor = load(arguments.model or BUNDLED)
    drawn = _look(model, processor, image, arguments.question, selectors, keep, arguments.positions)
    for text in drawn.left_out:
        print(f"tokenprune show: {text}", file=sys.stderr)
    drawn.save(arguments.out)
    print(drawn)
    print(arguments.out)
    return 0


def picture(
    model: Any,
    processor: Any,
    image: Image.Image,
    methods: str | Method | Sequence[str | Method] = (
        "zeroth-order",
        "cls-attention",
        "divprune",
    ),
    keep: Keep = 0.25,
    *,
    question: str | None = None,
    positions: Positions = "original",
) -> Drawn:
    """Return an image, the methods' score maps and the tokens they keep, as a picture.

    A notebook shows it by itself.

    Parameters
    ----------
    model, processor
        A vision-language model of transformers, and its processor.
    image
        The image.
    methods
        Names, or selectors with options of their own; one column each. One may stand alone.
        ``"resize"`` is the picture made smaller until it has as many tokens.
    keep
        Budget of the image: a number of tokens (int) or a fraction (float).
    question
        Answered with all tokens and with those kept; None asks nothing.
    positions
        Of kept tokens, see `tokenprune_hf.prune`.

    Raises
    ------
    TokensError
        If it is not known how the tokens lie in the image.
    UnsupportedModelError, OptionError, ConfigError
        If no method is given or can be drawn, or one chooses by a question that was not given.
    """
    from tokenprune.inside.base import InsideMethod
    from tokenprune.registry import build_any
    from tokenprune.selectors.base import Selector

    named = [methods] if isinstance(methods, (str, Selector, InsideMethod)) else methods
    selectors = [
        build_any(one, {}) if isinstance(one, str) and one != RESIZE else one for one in named
    ]
    if not selectors:
        raise ConfigError("methods is empty. Name at least one, for example 'cls-attention'.")
    _check_question(selectors, question, "pass question='...'")
    return _look(model, processor, image, question, selectors, keep, positions)


def _selectors(methods: Sequence[str], options: Sequence[str]) -> list[Method | str]:
    """Return the methods, each with those options that it has; `RESIZE` stays as it is."""
    from tokenprune.registry import build_any

    values = options_by_method(options, [method for method in methods if method != RESIZE])
    return [
        method if method == RESIZE else build_any(method, values.get(method, {}))
        for method in methods
    ]


def _check_question(selectors: Sequence[Method | str], question: str | None, remedy: str) -> None:
    """Raise if a method chooses by the question and there is none."""
    from tokenprune.inside.base import reads_text

    asking = [one.name for one in _pruning(selectors) if reads_text(one)]
    if asking and question is None:
        raise ConfigError(
            f"{', '.join(asking)} chooses by the question, and there is none: {remedy}."
        )


def _pruning(selectors: Sequence[Method | str]) -> list[Method]:
    """Return those that are methods."""
    return [one for one in selectors if not isinstance(one, str)]


def _check_out(out: Path) -> None:
    """Raise unless the picture can be written there."""
    if out.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"{out}: a picture of the kind {out.suffix!r} cannot be written. Name the file "
            f"{', '.join('*' + suffix for suffix in _FORMATS[:-1])} or *{_FORMATS[-1]}."
        )
    if out.is_dir():
        raise OutputError(f"{out} is a directory. Name a file with -o.")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no directory. Make it, or give another with -o.")


# The model --------------------------------------------------------------------------------------


def _look(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str | None,
    selectors: Sequence[Method | str],
    keep: Keep,
    positions: Positions,
) -> Drawn:
    """Return the picture the encoder saw, what each method did, and the unpruned answer."""
    import torch

    import tokenprune_hf
    from tokenprune.selecting import select_many
    from tokenprune.selectors.base import Selector
    from tokenprune_eval.shared.left_out import LeftOut
    from tokenprune_hf.any_model import vision_model_of_any_type
    from tokenprune_hf.loading import ask
    from tokenprune_hf.reading import prompt_items

    # Methods are the items here: one that this model cannot serve leaves the others.
    said: list[str] = []
    left_out = LeftOut(said.append, ends=(MissingPackageError, OutputError))
    asked = ask(processor, question or "What is in the image?", image=image)
    inputs = asked.to(model.device, model.dtype)  # Llama 4's processor returns bfloat16
    with torch.inference_mode():
        encoded, able = _encode(model, inputs, _pruning(selectors), left_out)
        usable = [one for one in selectors if isinstance(one, str) or one in able]
        vision = vision_model_of_any_type(model)
        items = [item.tokens for item in encoded.modalities["image"].items]
        whole = len(items) - 1 if vision.family.whole_image_last else 0
        if not items[whole].is_picture:
            raise TokensError(
                f"{items[whole].label}: how its {items[whole].total} tokens lie in the picture is "
                "not known, so they cannot be drawn. Show a model with a grid of tokens."
            )
        plain = None
        if question is not None:
            with left_out.around("the answer with all tokens"):
                plain = _answer(model, processor, inputs)
        shown: list[Shown | Smaller] = []
        for selector in usable:
            if isinstance(selector, str):
                with left_out.around(selector):
                    shown.append(_smaller(model, processor, image, question, keep))
                continue
            with left_out.around(selector.name):
                answer = None
                if question is None and isinstance(selector, Selector):
                    items = prompt_items(vision, inputs, encoded, selector.needs)["image"]
                    selections = select_many(items, selector, keep)
                else:
                    with tokenprune_hf.prune(model, selector, keep, positions) as pruning:
                        answer = _answer(model, processor, inputs, encoded=encoded)
                    selections = pruning.selections
                others = tuple(one for place, one in enumerate(selections) if place != whole)
                shown.append(Shown(selector.name, selections[whole], others, answer))
    left_out.check("method", len(shown))
    return Drawn(_seen(inputs, processor, image, whole), shown, question, plain, said)


def _smaller(
    model: Any, processor: Any, image: Image.Image, question: str | None, keep: Keep
) -> Smaller:
    """Return the picture made smaller, as the encoder saw it, and the answer."""
    from tokenprune_hf.any_model import vision_model_of_any_type
    from tokenprune_hf.loading import ask
    from tokenprune_hf.resizing import resize

    resized = resize(model, processor, image, keep)
    asked = ask(processor, question or "What is in the image?", image=resized)
    inputs = asked.to(model.device, model.dtype)
    last = -1 if vision_model_of_any_type(model).family.whole_image_last else 0
    seen = _seen(inputs, processor, _as_small(resized, image), last)
    answer = None if question is None else _answer(model, processor, inputs)
    return Smaller(seen, resized.tokens, resized.of_tokens, answer)


def _as_small(resized: Resized, image: Image.Image) -> Image.Image:
    """Return an image with as much less detail as it has fewer tokens."""
    share = (resized.tokens / resized.of_tokens) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    return image.convert("RGB").resize((width, height))


def _encode(
    model: Any, inputs: Any, selectors: Sequence[Method], left_out: LeftOut
) -> tuple[Encoded, list[Method]]:
    """Return the encoded image, and the methods that this model has all for that they look at."""
    import tokenprune_hf
    from tokenprune_hf.any_model import check_method

    def encode(of: Sequence[Method]) -> Encoded:
        needs = sorted({need for one in of for need in one.gathers})
        return tokenprune_hf.encode(model, needs=needs, **inputs)

    usable = []
    for selector in selectors:
        with left_out.around(selector.name):
            check_method(selector, model)
            usable.append(selector)
    try:
        return encode(usable), usable
    except UnsupportedModelError:
        # One of them asks for what this encoder has not; each by itself tells which.
        able = []
        for selector in usable:
            with left_out.around(selector.name):
                encode([selector])
                able.append(selector)
        left_out.check("method", len(able))
        return encode(able), able


def _answer(model: Any, processor: Any, inputs: Any, **more: Any) -> str:
    """Return what the model says, on one line."""
    from tokenprune_eval.shared.asking import answer

    said = answer(model, processor, inputs, max_new_tokens=_MAX_NEW_TOKENS, **more)
    return said or "(nothing)"


def _seen(inputs: Any, processor: Any, image: Image.Image, whole: int) -> Pixels:
    """Return the whole image as the encoder saw it, cropped and squeezed like its tokens."""
    import numpy as np

    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    packed = {"image_grid_thw", "target_sizes"} & set(inputs)
    if pixels is None or pixels.ndim < 4 or packed:
        # Packed patches (Qwen-VL): the image as it is, resized to a multiple of the patch.
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    crop = pixels.flatten(0, -4)[whole].float().cpu().numpy().transpose(1, 2, 0)
    settings = processor.image_processor
    if getattr(settings, "do_normalize", True):
        crop = crop * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
    return np.asarray(np.clip(crop, 0.0, 1.0), dtype=np.float64)


# The picture ------------------------------------------------------------------------------------


def _draw(
    picture: Pixels,
    shown: Sequence[Shown | Smaller],
    question: str | None,
    plain: str | None,
    suffix: str,
) -> bytes:
    """Return the figure as a file's bytes: the image, then a column for each method."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    bands = -(-len(shown) // _METHODS_ACROSS)
    across = -(-len(shown) // bands)
    height = min(2.5 * picture.shape[0] / picture.shape[1], 5.0)
    below = max(len(_lines(one)) for one in shown)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9.5}):
        figure = Figure(
            figsize=(2.7 * (across + 1), bands * (2 * height + 0.55 + 0.17 * below) + 0.1),
            facecolor="white",
        )
        figure.set_layout_engine("constrained", w_pad=0.07, h_pad=0.08)
        axes = figure.subplots(2 * bands, across + 1, squeeze=False)
        for one in axes.flat:
            one.set_axis_off()
        axes[0, 0].imshow(picture)
        _title(axes[0, 0], "image")
        _words(axes[1, 0], question, plain)
        for place, one in enumerate(shown):
            band, column = divmod(place, across)
            panels = axes[2 * band : 2 * band + 2, column + 1]
            if isinstance(one, Smaller):
                _smaller_column(panels, picture, one)
            else:
                _column(panels, picture, one)
        return _saved(figure, suffix, io.BytesIO())


def _saved(figure: Figure, suffix: str, stream: Any) -> bytes:
    with warnings.catch_warnings():
        # A question may have signs that the font has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format=suffix.lstrip("."), dpi=150)
    content: bytes = stream.getvalue()
    return content


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10.5, fontweight="bold", loc="left", pad=5, parse_math=False)


def _words(axes: Any, question: str | None, plain: str | None) -> None:
    """Write the question and the unpruned answer under the image, and how to read the rest."""
    lines = []
    if question is not None:
        lines += [*textwrap.wrap(question, 32)[:6], "", "with all tokens:"]
        lines += textwrap.wrap(plain or "", 32)[:6]
    axes.text(0, 1, "\n".join(lines), va="top", transform=axes.transAxes, parse_math=False)
    note = "Above: each token's score, bright is\nhigh. Below: the tokens that are kept."
    axes.text(0, 0, note, va="bottom", transform=axes.transAxes, color=_SOFT, fontsize="small")


def _lines(shown: Shown | Smaller) -> list[str]:
    """Return what stands under the patches a method kept."""
    answer = [] if shown.answer is None else textwrap.wrap(shown.answer, 32)[:6]
    return [*textwrap.wrap(shown.caption(), 34), *answer]


def _smaller_column(axes: Any, picture: Pixels, shown: Smaller) -> None:
    """Draw the picture made smaller as large as the others; it has no scores."""
    above, below = axes
    height, width = picture.shape[:2]
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    _title(above, shown.method)
    above.imshow(0.12 * picture + 0.88 * 0.95)
    words = {"ha": "center", "va": "center", "color": _SOFT, "transform": above.transAxes}
    above.text(0.5, 0.5, "made smaller,\nno token dropped", **words)
    below.imshow(shown.seen, extent=edges, interpolation="nearest")
    text = "\n".join(_lines(shown))
    below.text(0, -0.03, text, va="top", transform=below.transAxes, parse_math=False)


def _column(axes: Any, picture: Pixels, shown: Shown) -> None:
    """Draw one method: its score map above, the patches it keeps below."""
    import numpy as np

    above, below = axes
    height, width = picture.shape[:2]
    _title(above, shown.method)
    scores = shown.whole.grid_scores
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=-1)
    if scores is None:
        above.imshow(0.12 * grey + 0.88 * 0.95)
        above.text(
            0.5,
            0.5,
            "no score per token",
            ha="center",
            va="center",
            color=_SOFT,
            transform=above.transAxes,
        )
    else:
        above.imshow(grey)
        values = scores[0].float().cpu().numpy()
        # Attention has outliers; without them the rest can be told apart.
        low, high = np.percentile(values, [2, 98])
        above.imshow(
            values,
            cmap="viridis",
            vmin=low,
            vmax=max(high, low + 1e-12),
            alpha=0.72,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="nearest",
        )
    mask = shown.whole.grid_mask[0].cpu().numpy()
    rows, columns = mask.shape
    stays = mask[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    # The veil has to differ from the picture.
    veil = 0.25 if picture.mean() > 0.6 else 0.95
    below.imshow(np.where(stays[..., None], picture, 0.14 * picture + 0.86 * veil))
    text = "\n".join(_lines(shown))
    below.text(0, -0.03, text, va="top", transform=below.transAxes, parse_math=False)
