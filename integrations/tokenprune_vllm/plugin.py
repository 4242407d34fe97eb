"""The plugin that vLLM runs in each of its processes: it makes our architectures known.

vLLM's own architectures are left alone. A plugin that fails is only logged by vLLM; under a name of
its own such a server refuses to start, where under an overwritten one it would run unpruned.
"""

from __future__ import annotations

from tokenprune.releases import warn_untested
from tokenprune_vllm import metrics
from tokenprune_vllm.lookup import register_every


def register() -> None:
    """Register every architecture; harmless when called again. Warns of an untested vLLM."""
    from vllm import __version__

    warn_untested("vllm", __version__)
    metrics.prepare()
    register_every()
