#!/usr/bin/env python
"""Write what was checked of which models into tokenprune/families/checked.json and docs/models.md.

    scripts/test-models --junitxml=models.xml
    PYTHONPATH=.venv-transformers/5.24.0 scripts/test-models --junitxml=models-5.24.0.xml
    PYTHONPATH=.venv-transformers/5.20.2 scripts/test-models -k molmo2 --junitxml=models-molmo2.xml
    PYTHONPATH=.venv-transformers/5.24.0 .venv/bin/python scripts/update_models.py models*.xml
    .venv/bin/python scripts/update_models.py --vllm

Results are merged: what is in no file given stays as it was. The types that the page lists are
those of the transformers with which this runs; with an older one than before, the list stays.
Without files, the page alone is written anew. Nothing is tested here.

A test says what it checks by properties (pytest's `record_property`): ``transformers`` with a
`model_type`, or ``vllm`` with an architecture, and ``release`` of the engine. One that passed
checked it, or its refusal where it recorded ``refused``; see `ABOUT` for what else may be said.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tokenprune.families.checked import ENGINES, FILE, in_vllm, level, notes, version_of

ROOT = Path(__file__).parents[1]
CHECKED = ROOT / "tokenprune" / "families" / FILE
PAGE = ROOT / "docs" / "models.md"
ABOUT = ("refused", "fault", "positions", "attention", "stays", "videos")
"""Properties that are kept besides: why it is refused, why the engine itself fails, how positions
are counted, what layers do but attend to every token before, rows that always stay, whether videos
were tested too."""

_NEWLINES = "its rows hold newlines or separators ({}), so its first image is refused"
_MARKS = "marks around an image are rows of it ({}), so its first image is refused"
_GPU = "vLLM has no class of it for CPUs ({})"
_REMOTE = "its processor comes as code with the weights ({})"

UNTESTED = {
    "BailingMoeV3VLForConditionalGeneration": _REMOTE.format("bailing_moe_v3_vl.py"),
    "BeeForConditionalGeneration": _NEWLINES.format("llava_onevision.py, image_newline"),
    "DeepseekOCR2ForCausalLM": _NEWLINES.format("deepseek_ocr2.py, view_seperator"),
    "DeepseekOCRForCausalLM": _NEWLINES.format("deepseek_ocr.py, image_newline"),
    "DeepseekV41ForCausalLM": _GPU.format("models/deepseek_v41"),
    "DeepseekVLV2ForCausalLM": _NEWLINES.format("deepseek_vl2.py, image_newline"),
    "Dots3NoteForCausalLM": _GPU.format("models/dots3_note"),
    "GLM4VForCausalLM": _NEWLINES.format("glm4v.py, boi and eoi"),
    "HfMoondream": _MARKS.format("moondream3.py, bos_embedding"),
    "InternS1ProForConditionalGeneration": _REMOTE.format("interns1_pro.py"),
    "InternS2MobiusForConditionalGeneration": _REMOTE.format("interns2_mobius.py"),
    "InternS2PreviewForConditionalGeneration": _REMOTE.format("interns2_preview.py"),
    "KananaVForConditionalGeneration": _REMOTE.format("kanana_v.py"),
    "KimiK3ForConditionalGeneration": _GPU.format("models/kimi_k3"),
    "MiMoV2OmniForCausalLM": "its tower's windows run in a kernel of Triton, which has none for "
    "CPUs (mimo_v2_omni.py, _forward_window_attn)",
    "MiniCPMO": _REMOTE.format("minicpmo.py"),
    "MiniCPMV": _REMOTE.format("minicpmv.py"),
    "MiniMaxM3SparseForConditionalGeneration": _GPU.format("models/minimax_m3"),
    "MolmoForCausalLM": _REMOTE.format("molmo.py"),
    "Moondream3ForCausalLM": _MARKS.format("moondream3.py, bos_embedding"),
    "OpenCUAForConditionalGeneration": "vLLM's own processor of it has no image processor under "
    "transformers 5.19 (opencua.py, OpenCUAProcessor)",
    "OpenPanguVLForConditionalGeneration": _REMOTE.format("openpangu_vl.py"),
    "OpenVLAForActionPrediction": "vLLM builds its towers in their full size alone (openvla.py)",
    "Phi3VForCausalLM": _NEWLINES.format("phi3v.py, sub_GN and glb_GN"),
    "Phi4ForCausalLMV": _REMOTE.format("phi4siglip.py"),
    "Phi4MMForCausalLM": _NEWLINES.format("phi4mm.py, sub_GN and glb_GN"),
    "PixtralForConditionalGeneration": "its processor is mistral-common's, and the tests have a "
    "tokenizer of transformers' kind (pixtral.py)",
    "Qwen4ExpForConditionalGeneration": _GPU.format("models/qwen4_exp"),
    "RForConditionalGeneration": _NEWLINES.format("llava_onevision.py, image_newline"),
    "UnlimitedOCRForCausalLM": _NEWLINES.format("deepseek_ocr.py, image_newline"),
}
"""Architectures of vLLM -> why no test runs them, as its source says it."""

Entry = dict[str, Any]


# Reading ------------------------------------------------------------------------------------------


def results(path: Path) -> Iterator[tuple[bool, dict[str, str]]]:
    """Return whether each test of a JUnit file that names a model passed, and what it says."""
    for case in ElementTree.parse(path).iter("testcase"):
        said = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        failed = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        if set(said) & set(ENGINES):
            yield not failed, said


def merge(checked: dict[str, Any], found: Sequence[tuple[bool, Mapping[str, str]]]) -> None:
    """Put results into what was known: a model that failed once is no longer checked.

    Parameters
    ----------
    checked
        The content of checked.json, which is changed.
    found
        What `results` returned.
    """
    seen: set[tuple[str, str, str]] = set()
    broken = {_model(said) for passed, said in found if not passed}
    for _, said in found:
        engine, name, release = model = _model(said)
        entry: Entry = checked[engine].setdefault(name, {})
        if model not in seen:  # what an earlier run found of this release is out of date
            for about in ("checked", *(about for about in ABOUT[:2])):
                _forget(entry, about, release)
            seen.add(model)
        if model in broken:
            continue
        for about in ABOUT[:2]:
            if about in said:
                entry.setdefault(about, {})[release] = said[about]
        if not set(said) & set(ABOUT[:2]):
            entry["checked"] = sorted({*entry.get("checked", []), release}, key=version_of)
        entry |= {about: said[about] for about in ABOUT[2:] if about in said}


def _model(said: Mapping[str, str]) -> tuple[str, str, str]:
    engine = next(engine for engine in ENGINES if engine in said)
    return engine, said[engine], said["release"]


def _forget(entry: Entry, about: str, release: str) -> None:
    known = entry.get(about)
    if isinstance(known, list) and release in known:
        known.remove(release)
    elif isinstance(known, dict):
        known.pop(release, None)
    if not known:
        entry.pop(about, None)


def list_types(checked: dict[str, Any]) -> None:
    """Note every type of the installed transformers whose models read images or videos."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if version_of(transformers.__version__) < version_of(checked["listed"]):
        return
    checked["listed"] = transformers.__version__
    mappings = [
        getattr(auto, name, {})
        for name in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")
    ]
    for mapping in mappings:
        for config, architecture in mapping.items():
            reads = set(getattr(architecture, "input_modalities", ()))
            if mapping is mappings[0] or {"image", "video"} & reads:
                entry = checked["transformers"].setdefault(config.model_type, {})
                entry["class"] = architecture.__name__


def list_architectures(checked: dict[str, Any]) -> None:
    """Note every architecture of the installed vLLM that reads images or videos."""
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models import registry

    from tokenprune_vllm.architectures import ARCHITECTURES

    known: dict[str, Entry] = checked["vllm"]
    checked["listed_vllm"] = __version__
    for name in registry._MULTIMODAL_MODELS:
        if not _sees(ModelRegistry.models[name]):
            known.pop(name, None)
            continue
        entry = known.setdefault(name, {})
        entry.pop("family", None)
        if name in ARCHITECTURES:
            entry["family"] = True
        entry.pop("untested", None)
        if name in UNTESTED:
            entry["untested"] = UNTESTED[name]


def _sees(model: Any) -> bool:
    """Say whether a class of vLLM's reads images or videos: its source, or its bases', names them.

    vLLM tells that by a config alone.
    """
    modules = {model.module_name}
    with contextlib.suppress(ImportError):  # it wants a GPU, or a package that is not there
        modules |= {base.__module__ for base in model.load_model_cls().__mro__}
    for module in modules:
        where = importlib.util.find_spec(module)
        if ".models." not in module or where is None or where.origin is None:
            continue
        file = Path(where.origin)
        files = file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
        text = "".join(one.read_text("utf-8") for one in files)
        # Every model's interface speaks of images.
        if file.name != "interfaces.py" and ("pixel_values" in text or '"image"' in text):
            return True
    return False


# Writing ------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def types_table(checked: Mapping[str, Any]) -> str:
    """Return a row for each type of transformers."""
    rows = [
        [
            f"`{kind}`",
            level("transformers", kind, entry),
            ", ".join(entry.get("checked", [])),
            entry.get("videos", ""),
            entry.get("positions", ""),
            notes(entry),
            in_vllm(entry, checked["vllm"]),
        ]
        for kind, entry in sorted(checked["transformers"].items())
    ]
    header = ["type", "transformers", "checked under", "videos", "positions", "particular", "vLLM"]
    return table(header, rows)


def architectures_table(checked: Mapping[str, Any]) -> str:
    """Return a row for each architecture of vLLM that was tested."""
    rows = [
        [f"`{name}`", level("vllm", name, entry), ", ".join(entry.get("checked", [])), notes(entry)]
        for name, entry in sorted(checked["vllm"].items())
    ]
    return table(["architecture", "vLLM", "checked under", "particular"], rows)


def page(checked: Mapping[str, Any]) -> str:
    """Return docs/models.md."""
    levels = [level("transformers", kind, entry) for kind, entry in checked["transformers"].items()]
    of_own = sum(word == "first class" for word in levels)
    with_hand = sum("checked" in entry for entry in checked["transformers"].values())
    refused = sum(word.startswith("refused") for word in levels)
    untested = sum(word.startswith("generic") for word in levels)
    parts = [
        "# Models",
        "Written by `scripts/update_models.py` from the results of `scripts/test-models` of "
        f"{checked['date']}; not to be edited. The types are those of transformers "
        f"{checked['listed']} whose models read images or videos and text.",
        f"Of {len(levels)} types {with_hand} were checked without a family against a calculation "
        f"by hand, and {of_own} have a family of their own. {refused} are refused, and {untested} "
        "were not tested.",
        "- **first class**: the type has a family. The grid of each picture is known, and tests "
        "compare it with a calculation by hand. [transformers.md](transformers.md) says which "
        "methods cannot run on it.\n"
        "- **checked**: pruned [without a family](transformers.md#models-of-any-other-type), with "
        "methods that look at embeddings or at nothing, where its decoder can be read with those "
        "that read the question, and where its tower is of a known kind "
        "with those that look at features, attention or the projector. On a tiny model with random "
        "weights, a "
        "test compares the logits of a pruned prompt and the tokens of `generate` with a "
        "calculation by hand, `keep=1.0` with the plain model, batches with single prompts, and "
        "conversations that go on from a cache with such that are read again. Videos were tested "
        "where the table says so.\n"
        "- **generic, not tested**: pruned likewise, but no test runs it. Where it is known why, "
        "the table of vLLM says it, and which models will be refused.\n"
        "- **refused**: an error says why.",
        "**Positions** are those that the decoder reads on the unpruned prompt; kept tokens keep "
        "theirs. **Particular** are layers that do otherwise than attend to every token before. In "
        "those that have a window or a state over all tokens, or that look tokens up in blocks, a "
        "dropped token is not the same as a hidden one: they read the short prompt. Rows of the "
        "encoder that are no part of a picture always stay.",
        "## transformers",
        types_table(checked),
    ]
    if checked["vllm"]:
        of_vllm = checked["vllm"].values()
        parts += [
            "## vLLM",
            f"The {len(of_vllm)} architectures of vLLM {checked['listed_vllm']} that read images "
            f"or videos, and those that ran by their class of transformers. "
            f"{sum(bool(entry.get('family')) for entry in of_vllm)} are first class: tests compare "
            "kept tokens and answers in vLLM's engine with transformers, or where vLLM alone has "
            "them with its plain engine and a calculation by hand. "
            f"{sum('checked' in entry and not entry.get('family') for entry in of_vllm)} more "
            "were checked [without a family](serving.md#any-other-architecture) in the same way, "
            "or, where vLLM alone has them, with its plain engine, which is handed the kept rows "
            "at their own positions.",
            architectures_table(checked),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Merge the files into checked.json and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="JUnit files of scripts/test-models")
    parser.add_argument(
        "--vllm", action="store_true", help="list the architectures of the installed vLLM anew"
    )
    arguments = parser.parse_args()
    checked = json.loads(CHECKED.read_text("utf-8"))
    if arguments.vllm:
        list_architectures(checked)
    for path in arguments.results:
        merge(checked, list(results(path)))
    if arguments.results:
        list_types(checked)
    if arguments.results or arguments.vllm:
        checked["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        CHECKED.write_text(json.dumps(checked, indent=1, sort_keys=True) + "\n", "utf-8")
    PAGE.write_text(page(checked), "utf-8")


if __name__ == "__main__":
    main()
