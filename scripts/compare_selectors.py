#!/usr/bin/env python
"""Compare selectors on scenes of several kinds: published methods, our own, and what was tried.

    scripts/compare_selectors.py --split validation --scenes 150 --variants   # how ours were chosen
    scripts/compare_selectors.py                                              # what they reach
    scripts/compare_selectors.py --weights WEIGHTS                            # on another model

The model is the bundled one, or one that ``train_demo_model.py --style`` has trained. Scenes are
rendered anew (see ``tokenprune_eval.bundled.scenes``); of the bundled model's own style and the
test split they are those of the committed test set. Each image is encoded once, each question read
once in full, and then every method selects tokens for every question. An answer is the word the
model finds most likely first. Tokens keep their original positions.

A line gives the share of right answers in % with Wilson's 95 % interval, the difference to the best
published method of its kind at that budget (blind, or reading the question) with its 95 % interval,
paired question by question, and McNemar's p.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune
import tokenprune_hf
from tokenprune import VisualTokens
from tokenprune.budget import tokens_kept
from tokenprune.reading import reference_layer
from tokenprune.selectors.diversity import pick_diverse
from tokenprune.selectors.information import pick_informative
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import WEIGHTS, bundled_model_path
from tokenprune_eval.results.statistics import accuracy_of, difference_interval, mcnemar_p

SETS = ("own", "many-items", "digit-rows", "plain")
KEEP = (0.25, 0.125, 0.0625)
BLIND = ("random", "uniform", "feature-norm", "cls-attention", "zeroth-order", "divprune")
READING = ("flexselect",)
OURS = {"information": BLIND, "relevant-information": (*BLIND, *READING)}
"""Our methods, and what each is compared with."""


def main() -> None:
    """Encode, read, select, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, help="where the model is put together")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=400, help="of each set")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    parser.add_argument("--variants", action="store_true", help="what was tried, too")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    model = Model(bundled_model_path(options.work, weights=options.weights))
    print(
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__};"
        f" {model.tokens} tokens an image, language model of {model.layers} layers and width "
        f"{model.width}; reference layer {model.layer}; {options.split} split; no public model",
        flush=True,
    )
    found: list[dict[str, Any]] = []
    for name in options.sets:
        data = model.read(name, options.split, options.scenes)
        found += compare(model, data, name, options.keep, options.variants)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


# --- the model and its questions ----------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A set, encoded and read.

    Attributes
    ----------
    items
        One for each image.
    image
        LongTensor [Q], which image each question is about.
    question
        LongTensor [q] each: the ids of all that comes after the image.
    answer
        LongTensor [Q], the first id of the right answer.
    attention
        Of each question [layers, H, q, N]: of its tokens to the image's.
    unpruned
        BoolTensor [Q], whether the model is right with all tokens.
    """

    items: list[VisualTokens]
    image: Tensor
    question: list[Tensor]
    answer: Tensor
    attention: list[Tensor]
    unpruned: Tensor

    def of_question(self, number: int, layer: int) -> VisualTokens:
        """Return the image's tokens with the question's attention."""
        item = self.items[int(self.image[number])]
        return replace(item, query_attention=self.attention[number][layer])


class Model:
    """A bundled-type model, and how a question is put to it."""

    def __init__(self, path: Path) -> None:
        make: Any = AutoModelForImageTextToText  # its auto classes are not typed
        processors: Any = AutoProcessor
        # Eager attention gives the maps; scores of a selector in use come from q and k alone.
        self.model = make.from_pretrained(path, attn_implementation="eager").eval()
        self.processor = processors.from_pretrained(path)
        text = self.model.config.get_text_config()
        self.layers, self.width = int(text.num_hidden_layers), int(text.hidden_size)
        self.layer = reference_layer(self.model.config.model_type, self.layers, self.width)
        self.tokens = int(self.processor.image_seq_length)
        image = "<img>" + "<IMG_CONTEXT>" * self.tokens + "</img>"
        self.prefix = self.ids(f"<|im_start|>user\n{image}\n")
        self.places = (self.prefix == self.model.config.image_token_id).nonzero()[:, 0]
        size = int(self.model.config.vision_config.image_size[0])
        self.style = next(s for s in scenes.STYLES.values() if s.image_size == size)

    def ids(self, text: str) -> Tensor:
        """Return LongTensor [n]."""
        return torch.tensor(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def styled(self, name: str) -> scenes.Style:
        """Return a style at this model's size, with items as large as this model knows them."""
        if name == "own":
            return self.style
        style, own = scenes.STYLES[name], self.style
        pitch = own.image_size / max(style.cells)
        side = (min(own.side[0], int(0.85 * pitch)), min(own.side[1], int(0.97 * pitch)))
        families = tuple(family for family in style.families if family in own.families)
        return replace(style, image_size=own.image_size, side=side, families=families)

    @torch.inference_mode()
    def read(self, name: str, split: scenes.Split, count: int) -> Data:
        """Render, encode and read a set."""
        style = self.styled(name)
        rng = np.random.default_rng([71, split == "test", SETS.index(name)])
        drawn = [scenes.render_scene(split, n, style=style) for n in range(count)]
        items: list[VisualTokens] = []
        for start in range(0, count, 25):
            images = [Image.fromarray(scene.pixels) for scene in drawn[start : start + 25]]
            pixels = self.processor.image_processor(images=images, return_tensors="pt")
            encoded = tokenprune_hf.encode(self.model, pixel_values=pixels["pixel_values"])
            items += [item.tokens for item in encoded.modalities["image"].items]
        types = [*("kind", "color") * 2, *(t for t in style.types if t not in ("kind", "color"))]
        image: list[int] = []
        question: list[Tensor] = []
        answer: list[int] = []
        for number, scene in enumerate(drawn):
            for asked in scenes.ask(scene, types, rng):
                image.append(number)
                question.append(self.ids(f"{asked.question}<|im_end|>\n<|im_start|>assistant\n"))
                answer.append(int(self.ids(asked.answer)[0]))
        data = Data(items, torch.tensor(image), question, torch.tensor(answer), [], torch.empty(0))
        every = torch.arange(self.tokens).expand(len(question), -1)
        attention: dict[int, Tensor] = {}
        right = torch.zeros(len(question), dtype=torch.bool)
        for numbers, output in self._forward(data, every, attentions=True):
            right[numbers] = self._said(output) == data.answer[numbers]
            maps = torch.stack(output.attentions, dim=1)[..., self.places]
            for number, one in zip(numbers.tolist(), maps, strict=True):
                attention[number] = one[:, :, -len(question[number]) :].clone()
        ordered = [attention[number] for number in range(len(question))]
        return replace(data, attention=ordered, unpruned=right)

    @torch.inference_mode()
    def right(self, data: Data, kept: Tensor) -> Tensor:
        """Return BoolTensor [Q]: answered right from the kept tokens, LongTensor [Q, K]."""
        right = torch.zeros(len(kept), dtype=torch.bool)
        for numbers, output in self._forward(data, kept, attentions=False):
            right[numbers] = self._said(output) == data.answer[numbers]
        return right

    def _said(self, output: Any) -> Tensor:
        said: Tensor = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1)
        return said

    def _forward(
        self, data: Data, kept: Tensor, *, attentions: bool
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield the numbers of some questions of one length, and what the language model returns.

        The tokens that stay have the positions they had.
        """
        embed = self.model.get_input_embeddings()
        embeddings = torch.stack(
            [item.embeddings for item in data.items if item.embeddings is not None]
        )
        prefix = embed(self.prefix)
        first, last = int(self.places[0]), int(self.places[-1]) + 1
        lengths = sorted({len(one) for one in data.question})
        groups = [[n for n, one in enumerate(data.question) if len(one) == q] for q in lengths]
        for group in groups:
            for numbers in torch.tensor(group).split(128):
                asked = embed(torch.stack([data.question[n] for n in numbers.tolist()]))
                rows, places = len(numbers), kept[numbers]
                visual = embeddings[data.image[numbers], :].gather(
                    1, places[..., None].expand(-1, -1, embeddings.shape[-1])
                )
                parts = [
                    prefix[:first].expand(rows, -1, -1),
                    visual,
                    prefix[last:].expand(rows, -1, -1),
                    asked,
                ]
                after = torch.arange(last, len(prefix) + asked.shape[1])
                positions = [torch.arange(first).expand(rows, -1), places + first]
                positions.append(after.expand(rows, -1))
                inputs = torch.cat(parts, dim=1)
                yield (
                    numbers,
                    self.model.model.language_model(
                        inputs_embeds=inputs,
                        position_ids=torch.cat(positions, dim=1),
                        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64),
                        output_attentions=attentions,
                        use_cache=False,
                    ),
                )


# --- what selects -------------------------------------------------------------------------------

Chooser = Callable[[Model, Data, int], Tensor]
"""Returns LongTensor [Q, K], ascending."""


def of_images(data: Data, kept: Tensor) -> Tensor:
    """Give every question its image's selection."""
    return kept[data.image]


def method(name: str, **given: Any) -> Chooser:
    """Return a registered method."""

    def choose(model: Model, data: Data, keep: int) -> Tensor:
        selector = tokenprune.registry.build(name, given)
        if "query_attention" not in selector.needs:
            chosen = tokenprune.select_many(data.items, selector, keep)
            return of_images(data, torch.stack([one.kept for one in chosen]))
        layer = model.layer if given.get("layer") is None else int(given["layer"])
        asked = [data.of_question(n, layer) for n in range(len(data.question))]
        return torch.stack([one.kept for one in tokenprune.select_many(asked, selector, keep)])

    return choose


def stacked(data: Data) -> Tensor:
    """Return the embeddings of all images, float32 [I, N, D]."""
    found = [item.embeddings.float() for item in data.items if item.embeddings is not None]
    return torch.stack(found)


def centred(rows: Tensor) -> Tensor:
    """Return each item's rows without their mean."""
    return rows - rows.mean(dim=1, keepdim=True)


def highest(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the highest scores, ascending."""
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def farthest(rows: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Farthest-first traversal by Euclidean distance, times a weight."""
    item = torch.arange(len(rows))
    pick = centred(rows).norm(dim=-1).argmax(dim=1)
    kept = [pick]
    nearest = torch.full(rows.shape[:2], math.inf)
    for _ in range(keep - 1):
        nearest = nearest.minimum((rows - rows[item, pick][:, None]).norm(dim=-1))
        score = weights * nearest
        score[item[:, None], torch.stack(kept, 1)] = -1
        pick = score.argmax(dim=1)
        kept.append(pick)
    return torch.stack(kept, dim=1).sort(dim=1).values


def facility(rows: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Facility location: the weighted sum over tokens of the cosine to the nearest kept one."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    likeness = (unit @ unit.transpose(1, 2)).clamp(min=0)
    covered = torch.zeros(rows.shape[:2])
    kept: list[Tensor] = []
    item = torch.arange(len(rows))
    for _ in range(keep):
        gain = ((likeness - covered[:, :, None]).clamp(min=0) * weights[:, :, None]).sum(dim=1)
        if kept:
            gain[item[:, None], torch.stack(kept, 1)] = -1
        kept.append(gain.argmax(dim=1))
        covered = covered.maximum(likeness[item, :, kept[-1]])
    return torch.stack(kept, dim=1).sort(dim=1).values


def blind_variants() -> dict[str, Chooser]:
    """Return what was tried without the question."""

    def of(choose: Callable[[Tensor, int], Tensor]) -> Chooser:
        return lambda model, data, keep: of_images(data, choose(stacked(data), keep))

    def norm(rows: Tensor) -> Tensor:
        return rows.norm(dim=-1)

    def contrast(rows: Tensor) -> Tensor:
        return norm(centred(rows))

    def diverse(weights: Callable[[Tensor], Tensor]) -> Chooser:
        def choose(rows: Tensor, keep: int) -> Tensor:
            own = weights(rows)
            return pick_diverse(rows, keep, own, own.argmax(dim=1))

        return of(choose)

    def with_cls(power: float) -> Chooser:
        def choose(model: Model, data: Data, keep: int) -> Tensor:
            seen = [one.cls_attention for one in data.items if one.cls_attention is not None]
            attention = torch.stack([one.float().reshape(-1, model.tokens).mean(0) for one in seen])
            weights = (attention / attention.mean(dim=1, keepdim=True)) ** (2 * power)
            return of_images(data, pick_informative(stacked(data), keep, 1.0, weights + 1e-9))

        return choose

    return {
        "embedding norm alone": of(lambda rows, keep: highest(norm(rows), keep)),
        "norm without the mean alone": of(lambda rows, keep: highest(contrast(rows), keep)),
        "norm x cosine diversity": diverse(norm),
        "norm^2 x cosine diversity": diverse(lambda rows: norm(rows) ** 2),
        "norm without the mean x cosine diversity": diverse(contrast),
        "farthest first": of(lambda rows, keep: farthest(rows, torch.ones(rows.shape[:2]), keep)),
        "norm without the mean x farthest first": of(
            lambda rows, keep: farthest(rows, contrast(rows), keep)
        ),
        "facility location, norm without the mean": of(
            lambda rows, keep: facility(rows, contrast(rows), keep)
        ),
        "facility location, its square": of(
            lambda rows, keep: facility(rows, contrast(rows) ** 2, keep)
        ),
        **{
            f"information, noise {noise}": method("information", noise=noise)
            for noise in (0.1, 0.3, 3.0, 10.0)
        },
        "information without the mean": of(
            lambda rows, keep: pick_informative(centred(rows), keep)
        ),
        "information x norm without the mean^0.5": of(
            lambda rows, keep: pick_informative(rows, keep, 1.0, contrast(rows))
        ),
        "information x CLS attention^0.25": with_cls(0.25),
        "information x CLS attention^0.5": with_cls(0.5),
    }


def reading_variants(model: Model) -> dict[str, Chooser]:
    """Return what was tried with the question's attention."""

    def relevance(data: Data, layer: int, tokens: slice, reduce: str) -> Tensor:
        rows = [one[layer][:, tokens].flatten(0, 1) for one in data.attention]
        reduced = [one.amax(0) if reduce == "max" else one.mean(0) for one in rows]
        found = torch.stack(reduced)
        return found / found.mean(dim=1, keepdim=True)

    last, every = slice(-1, None), slice(None)

    def top(layer: int, tokens: slice, reduce: str) -> Chooser:
        return lambda model, data, keep: highest(relevance(data, layer, tokens, reduce), keep)

    def weighed(
        weights: Callable[[Tensor], Tensor],
        layer: int = model.layer,
        tokens: slice = last,
        reduce: str = "mean",
        noise: float = 1.0,
    ) -> Chooser:
        def choose(model: Model, data: Data, keep: int) -> Tensor:
            found = weights(relevance(data, layer, tokens, reduce))
            rows = stacked(data)
            parts = [
                pick_informative(rows[data.image[part]], keep, noise, found[part])
                for part in torch.arange(len(found)).split(512)
            ]
            return torch.cat(parts)

        return choose

    def diverse(model: Model, data: Data, keep: int) -> Tensor:
        found = relevance(data, model.layer, last, "mean")
        rows = stacked(data)[data.image]
        weights = unit_range(found) + unit_range(rows.norm(dim=-1))
        return pick_diverse(rows, keep, weights, weights.argmax(dim=1))

    def unit_range(values: Tensor) -> Tensor:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return (values - low) / (high - low)

    found: dict[str, Chooser] = {}
    for layer in range(model.layers):
        found[f"last token, mean of heads, layer {layer}, alone"] = top(layer, last, "mean")
        found[f"all words, maximum, layer {layer}, alone"] = top(layer, every, "max")
    return {
        **found,
        "(attention + norm) x cosine diversity": diverse,
        "information x r^0.5": weighed(lambda r: r + 1e-6),
        "information x (0.3 + r)^0.5": weighed(lambda r: 0.3 + r),
        "information x (3 + r)^0.5": weighed(lambda r: 3 + r),
        "information x (1 + r)": weighed(lambda r: (1 + r) ** 2),
        "information x (1 + r)^0.5, noise 0.3": weighed(lambda r: 1 + r, noise=0.3),
        "information x (1 + r)^0.5, noise 3": weighed(lambda r: 1 + r, noise=3.0),
        "information x (1 + r)^0.5, mean of all words": weighed(lambda r: 1 + r, tokens=every),
        "information x (1 + r)^0.5, maximum of all words": weighed(
            lambda r: 1 + r, tokens=every, reduce="max"
        ),
        "information x (1 + r)^0.5, layer 0, mean of all words": weighed(
            lambda r: 1 + r, layer=0, tokens=every
        ),
        "relevant-information, a quarter read": method("relevant-information", candidates=0.25),
        "relevant-information, half read": method("relevant-information", candidates=0.5),
    }


# --- the comparison -----------------------------------------------------------------------------


def compare(
    model: Model, data: Data, name: str, budgets: Sequence[float], variants: bool
) -> list[dict[str, Any]]:
    """Print one set's tables and return their figures."""
    choosers: dict[str, Chooser] = {one: method(one) for one in BLIND}
    choosers["flexselect"] = method("flexselect")
    choosers |= {one: method(one) for one in OURS}
    if variants:
        choosers |= {**blind_variants(), **reading_variants(model)}
    questions = len(data.question)
    print(f"\n{name}: {questions} questions about {len(data.items)} scenes", flush=True)
    print(f"  {'unpruned':52} {percent(data.unpruned)}")
    found = [figures(name, "unpruned", model.tokens, data.unpruned)]
    for budget in budgets:
        keep = tokens_kept(budget, model.tokens)
        print(f"  {keep} of {model.tokens} tokens")
        right = {
            one: model.right(data, choose(model, data, keep)) for one, choose in choosers.items()
        }
        for one, own in right.items():
            line = f"  {one:52} {percent(own)}"
            if one in OURS:
                best = max(OURS[one], key=lambda other: float(right[other].float().mean()))
                line += f"  {difference(own, right[best])} to {best}"
            print(line, flush=True)
            found.append(figures(name, one, keep, own))
    return found


def percent(right: Tensor) -> str:
    """Write a share of right answers with its interval."""
    share = accuracy_of(right.tolist())
    if share is None:
        return "-"
    return f"{100 * share.share:5.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def difference(own: Tensor, other: Tensor) -> str:
    """Write the paired difference of two methods with its interval and p."""
    gained, lost = int((own & ~other).sum()), int((other & ~own).sum())
    low, high = difference_interval(gained, lost, len(own))
    change = 100 * (gained - lost) / len(own)
    return f"{change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] p {mcnemar_p(gained, lost):.3f}"


def figures(name: str, chooser: str, keep: int, right: Tensor) -> dict[str, Any]:
    """Return one line as data."""
    return {
        "set": name,
        "method": chooser,
        "keep": keep,
        "right": int(right.sum()),
        "questions": len(right),
    }


if __name__ == "__main__":
    main()
