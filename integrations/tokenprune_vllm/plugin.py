"""The plugin that vLLM runs in each of its processes: it makes our architectures known.

vLLM's own architectures are left alone. A plugin that fails is only logged by vLLM; under a name of
its own such a server refuses to start, where under an overwritten one it would run unpruned.
"""

from __future__ import annotations

from tokenprune.releases import warn_untested
from tokenprune_vllm import metrics
from tokenprune_vllm.any_architecture import every_architecture
from tokenprune_vllm.architectures import PREFIX, Architecture


def register() -> None:
    """Register every architecture; harmless when called again. Warns of an untested vLLM."""
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    warn_untested("vllm", __version__)
    metrics.prepare()
    for name in every_architecture():
        architecture = Architecture(PREFIX + name)
        ModelRegistry.register_model(architecture.name, architecture.home)
        if name in MODELS_CONFIG_MAP:  # settings that vLLM changes for some, by their name
            MODELS_CONFIG_MAP[architecture.name] = MODELS_CONFIG_MAP[name]
