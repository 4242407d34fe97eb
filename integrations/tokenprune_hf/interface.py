"""Standing in for a decoder's attention, through transformers' own attention interface.

Attention modules look their function up by the name in their config. Inside the context that name
is ours, registered beside the plain one, and calls go to a handler that may let the plain one run.
The mask that the model makes stays the one that the plain function wants, because transformers
looks up by the same name how to make it, and finds the plain one's way there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from tokenprune.errors import PromptError, TokenPruneError, UnsupportedModelError

_PREFIX = "tokenprune+"

_ON_MODULE = "_tokenprune_attention"
"""The attribute of an attention module in which its handler is kept: a copy of the module carries
the handler's own copy."""

_UNSEEN = ("softcap", "attn_logit_softcapping", "sinks")
"""Attributes of attention modules that change logits after q kᵀ, where no handler sees it."""


class AttentionModule(Protocol):
    """What is used of a decoder layer's attention module."""

    training: bool

    @property
    def config(self) -> Any:
        """The config in which it looks up the name of its attention function."""


class DecoderLayer(Protocol):
    """What is used of a decoder layer."""

    @property
    def self_attn(self) -> AttentionModule:
        """Its attention module."""


class Decoder(Protocol):
    """What is used of a language model without its head."""

    training: bool

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        """Its layers, in order."""


class Plain(Protocol):
    """The model's own attention on the same call."""

    def __call__(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, L, H, d], and weights or None; None takes the call's own tensor."""


class Handler(Protocol):
    """What is called in place of an attention function."""

    def __call__(
        self,
        module: AttentionModule,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plain: Plain,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, L, H, d] and None, or what `plain` returns.

        Parameters
        ----------
        module
            The attention module.
        query
            [B, H, L, d], rotated.
        key, value
            [B, G, K, d], with what the cache holds in front.
        scale
            Factor on q kᵀ.
        plain
            The model's own attention.
        """


class Interception:
    """A handler in front of the attention of some modules, until `remove`.

    Parameters
    ----------
    modules
        Attention modules of one decoder.
    handler
        What they call.

    Raises
    ------
    UnsupportedModelError
        If the modules do not look their attention up by name, or an implementation of theirs
        takes no mask.
    TokenPruneError
        If another handler stands there already.
    """

    def __init__(self, modules: Sequence[AttentionModule], handler: Handler) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self._modules = list(modules)
        # As a rule one config serves all modules of a decoder, and other modules besides: those
        # come to `_dispatch` as well.
        configs = {id(module.config): module.config for module in self._modules}
        self._before: list[tuple[Any, str]] = []
        # Said here: below, the first handler's name would be refused as an unknown implementation.
        for module in self._modules:
            if _ON_MODULE in module.__dict__:
                raise TokenPruneError(
                    f"the attention of this {type(module).__name__} is handled already. Leave that "
                    "block before beginning another."
                )
        for config in configs.values():
            name = config._attn_implementation
            if name not in ("sdpa", "eager"):
                raise UnsupportedModelError(
                    f"the attention implementation {name!r} cannot be stood in for. "
                    "Call model.set_attn_implementation('sdpa'), or with 'eager'."
                )
            masks: Any = AttentionMaskInterface()  # type: ignore[no-untyped-call]
            AttentionInterface.register(_PREFIX + name, _dispatch)
            AttentionMaskInterface.register(_PREFIX + name, masks[name])
            self._before.append((config, name))
        # Nothing was changed so far: whatever is refused leaves the model as it is.
        for config, name in self._before:
            config._attn_implementation = _PREFIX + name
        for module in self._modules:
            module.__dict__[_ON_MODULE] = handler

    def check_call(self, decoder: Decoder, what: str) -> None:
        """Raise for a call that would run without the handler, or again without it.

        Parameters
        ----------
        decoder
            Whose layers the modules are of.
        what
            What the handler does, as messages name it.

        Raises
        ------
        PromptError
            If layers would run a second time when the call is over, or the attention
            implementation has been changed since.
        """
        check_no_checkpointing(decoder, what)
        for config, name in self._before:
            now = config._attn_implementation
            if now != _PREFIX + name:
                raise PromptError(
                    f"the attention implementation was set to {now!r} inside the block, which "
                    f"takes {what} off. Set it before the block begins."
                )

    def remove(self) -> None:
        """Give the modules their own attention back; a second call does nothing."""
        for config, name in self._before:
            config._attn_implementation = name
        self._before = []
        for module in self._modules:
            module.__dict__.pop(_ON_MODULE, None)
        self._modules = []


def check_no_checkpointing(decoder: Decoder, what: str) -> None:
    """Raise PromptError where layers would run a second time, when what is known of a call is gone.

    Parameters
    ----------
    decoder
        Whose layers they are.
    what
        What would be missing then, as messages name it.
    """
    # Backward passes run checkpointed layers again.
    if decoder.training and any(
        getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers
    ):
        raise PromptError(
            f"gradient checkpointing runs layers a second time after the call, without {what}. "
            "Call model.eval(), or turn gradient checkpointing off."
        )


def check_logits(modules: Sequence[AttentionModule], what: str) -> None:
    """Raise for attention that does more with q kᵀ than scaling and softmax.

    Parameters
    ----------
    modules
        Attention modules.
    what
        What a handler does, as messages name it.

    Raises
    ------
    UnsupportedModelError
        If a module has a softcap or sinks.
    """
    for module in modules:
        for name in _UNSEEN:
            if getattr(module, name, None) is not None:
                raise UnsupportedModelError(
                    f"the attention {type(module).__name__} has {name}, which does not go "
                    f"together with {what}. Use this model without {what}."
                )


def _dispatch(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand where an attention function of transformers stands."""
    name = module.config._attn_implementation.removeprefix(_PREFIX)

    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    def plain(
        other_query: Tensor | None = None,
        other_key: Tensor | None = None,
        other_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        function = _plain_function(module, name)
        return function(
            module,
            query if other_query is None else other_query,
            key if other_key is None else other_key,
            value if other_value is None else other_value,
            attention_mask,
            # A query of another width would change the factor that a function takes by default.
            scaling=scaling if other_query is None else scale,
            **kwargs,
        )

    # Found at the module and not by the name: one name serves every handler of the process.
    handler: Handler | None = module.__dict__.get(_ON_MODULE)
    if handler is None:
        return plain()  # a module with the same config that is not ours: another tower's
    return handler(module, query, key, value, scale, plain)


def _plain_function(
    module: AttentionModule, name: str
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return an attention function of transformers; eager ones live beside the module."""
    import sys

    from transformers import AttentionInterface

    if name == "eager":
        file: Any = sys.modules[type(module).__module__]
        return cast(Callable[..., tuple[Tensor, Tensor | None]], file.eager_attention_forward)
    registered: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()[name]  # type: ignore[no-untyped-call]
    return registered
