"""Our architectures: each is vLLM's own class with pruning mixed in, made when it is asked for.

``TokenPruneX`` is vLLM's ``X``. Its processor is vLLM's own for ``X``, with ours in front. vLLM
finds the classes here by name (`tokenprune_vllm.plugin`).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.architectures import PREFIX
from tokenprune_vllm.hooks import check_overridden
from tokenprune_vllm.model import PrunedModel
from tokenprune_vllm.processor import PruningProcessor, UnprunedLimits


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pruned(name.removeprefix(PREFIX))


@functools.cache
def _pruned(architecture: str) -> type[Any]:
    """Return vLLM's class of an architecture, pruned."""
    own: Any = ModelRegistry.models[architecture].load_model_cls()
    factories = getattr(own, "_processor_factory", None)
    if factories is None:
        raise UnsupportedModelError(
            f"{own.__name__} has no processor of vLLM's, so its prompts cannot be made shorter. "
            "Serve it with vLLM alone."
        )
    if issubclass(own, MultiModalMixin):
        own = _mixed(OneAxis, own, own.__name__)
    decorate = MULTIMODAL_REGISTRY.register_processor(
        _factory(PruningProcessor, factories.processor),
        info=_factory(UnprunedLimits, factories.info),
        dummy_inputs=factories.dummy_inputs,
    )
    made: type[Any] = decorate(_mixed(PrunedModel, own, PREFIX + architecture))
    return made


def _factory(mixin: Any, factory: Any) -> Any:
    """Return what makes vLLM's object, by a class or a function of vLLM's, with `mixin` in front.

    A function chooses a class by the model's config; what it made says which.
    """
    if inspect.isclass(factory):
        own_class: Any = factory
        return _mixed(mixin, own_class)

    def make(*args: Any, **kwargs: Any) -> Any:
        own: Any = type(factory(*args, **kwargs))
        return _mixed(mixin, own)(*args, **kwargs)

    return make


class OneAxis:
    """Mixed in front of vLLM's models that run by a class of transformers.

    They believe the config, which has our `mrope_section` in it so that vLLM asks for positions.
    """

    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods of vLLM's that must be there to be overridden."""

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run vLLM's forward; positions with one axis go past what makes three of them."""
        front: Any = super() if positions.ndim > 1 else super(MultiModalMixin, self)
        return front.forward(input_ids, positions, *args, **kwargs)


@functools.cache
def _mixed(mixin: Any, own: Any, name: str = "") -> Any:
    # vLLM looks classes up by module and name, so they say that they are from here.
    namespace = {
        "__module__": __name__,
        "__doc__": f"vLLM's `{own.__name__}`, with `{mixin.__name__}` in front.",
    }
    # Of the own class's metaclass: vLLM's protocols have one.
    made: Any = type(own)(name or f"{mixin.__name__}{own.__name__}", (mixin, own), namespace)
    check_overridden(made, mixin, mixin.overrides)
    return made
