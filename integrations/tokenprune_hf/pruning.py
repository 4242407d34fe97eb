"""`prune`, `apply`, `remove`: a model of transformers whose `generate` and calls run pruned.

What is attached to the model and taken off again stands in front of its own `generate` and
`forward`. What happens in a call is in `tokenprune_hf.calls`; what belongs to one call is kept by
thread, and what is known of a prompt in its cache.
"""

from __future__ import annotations

from typing import Any, cast, get_args

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Budget, Keep
from tokenprune.config import Positions, PruningConfig, check_positions
from tokenprune.errors import BudgetError, ConfigError, TokenPruneError, did_you_mean
from tokenprune.inside.base import InsideMethod
from tokenprune.scope import Scope, check_scope
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune_hf.any_model import vision_model_of_any_type
from tokenprune_hf.attached import Attachment, StandIn, attached
from tokenprune_hf.calls import Calls
from tokenprune_hf.crops import check_scope_of
from tokenprune_hf.inside.everything import Everything
from tokenprune_hf.inside.layers import InsideLayers
from tokenprune_hf.mllama.by_name import trim_by_name
from tokenprune_hf.mllama.method import METHOD as TRIMMED
from tokenprune_hf.mllama.model import check_prompt_has_images
from tokenprune_hf.proportional import ProportionalAttention
from tokenprune_hf.pruner import Pruner
from tokenprune_hf.shortened import Application
from tokenprune_hf.vision import check_selector


class Pruning(Attachment):
    """A pruned model: made by `prune` or `apply`, undone by leaving the block or by `remove`.

    Any number of threads may call the model at once. A deep copy of the model is pruned as well,
    until `remove(copy)`.

    Attributes
    ----------
    model
        The model that is pruned; the one inside, where a wrapper was passed.
    selector, keep, positions, application, proportional_attention, scope
        What was asked for; `selector` is the method's object, also where it is no selector.
    selections
        One `Selection` per item (image, video or crop) of the last call, in prompt order: of the
        last call in the thread that asks or, where it made none, of the last one in any.
    selecting_seconds
        How long scoring and choosing them took; the encoder is not in it. On a GPU it is the time
        of handing over the work, unless the method itself waits for its scores.
    """

    def __init__(
        self,
        model: Any,
        selector: Selector | InsideMethod,
        keep: Keep | Budget,
        positions: Positions,
        application: Application,
        proportional_attention: bool = False,
        scope: Scope = "item",
    ) -> None:
        super().__init__(model)
        self.selector = selector
        self._budget = Budget.of(keep)
        self.positions = check_positions(positions)
        self.application = _check_application(application)
        self.scope = check_scope(scope, selector)
        if not isinstance(proportional_attention, bool):
            raise ConfigError(
                f"proportional_attention={proportional_attention!r} must be True or False."
            )
        self.proportional_attention = proportional_attention
        self._vision = vision_model_of_any_type(self.model)
        self._inside: InsideLayers | None = None
        before: Selector
        if isinstance(selector, InsideMethod):
            _check_inside(selector, positions, application, proportional_attention)
            self._inside = InsideLayers(self._vision, selector, self._budget)
            # Everything goes into the language model; tokens leave there.
            before, budget = Everything(), Budget.of(1.0)
        else:
            before, budget = selector, self._budget
        check_selector(before, self._vision)
        check_scope_of(self._vision, self.scope)
        self._vision.check_reading(positions, application == "mask", proportional_attention)
        pruner = Pruner(
            self._vision,
            before,
            budget,
            positions,
            application,
            proportional_attention,
            self.scope,
        )
        self._calls = Calls(pruner)
        self.begin()

    @property
    def keep(self) -> int | float:
        """The budget of each item."""
        return self._budget.keep

    @property
    def selections(self) -> list[Selection]:
        """One `Selection` per item of the last call, in prompt order."""
        return self._calls.chosen.selections

    @property
    def selecting_seconds(self) -> float:
        """Seconds that scoring and choosing took in the last call."""
        return self._calls.chosen.seconds

    def _attach(self) -> None:
        calls = self._calls
        if self.proportional_attention:
            calls.proportional = ProportionalAttention(self.model)  # first: it may refuse
        calls.inside = self._inside
        inner = self._vision.inner
        self._hooks: list[RemovableHandle | StandIn] = [
            *([] if self._inside is None else self._inside.attach()),
            # Some models have no inner one: then this is the model that is pruned.
            *([] if inner is self.model else [_refuse_inner(inner, calls)]),
            *self._vision.hooks(),
            StandIn(self.model, "generate", calls.generate),
            StandIn(self.model, "forward", calls.forward),
        ]
        calls.attached = True

    def _detach(self) -> None:
        self._calls.attached = False
        for hook in self._hooks:
            hook.remove()
        self._calls.inside = None
        if self._calls.proportional is not None:
            self._calls.proportional.remove()
            self._calls.proportional = None


def _refuse_inner(inner: nn.Module, calls: Calls) -> RemovableHandle:
    return inner.register_forward_pre_hook(calls.check_inner, with_kwargs=True)


def _check_inside(
    method: InsideMethod,
    positions: Positions,
    application: Application,
    proportional_attention: bool,
) -> None:
    """Raise ConfigError for what a method inside the language model cannot do."""
    for name, given, only, reason in (
        ("positions", positions, "original", "tokens that are left stay where they were read"),
        ("apply", application, "drop", "tokens are read up to the layer in front of which they go"),
        (
            "proportional_attention",
            proportional_attention,
            False,
            "what a key counts for would differ from layer to layer",
        ),
    ):
        if given != only:
            raise ConfigError(
                f"{name}={given!r} does not go together with method {method.name!r}, which has "
                f"tokens leave inside the language model: {reason}. Leave {name} out, or use a "
                "method that prunes before the language model (see `tokenprune methods`)."
            )


def _check_application(application: Application) -> Application:
    if application not in get_args(Application):
        raise ConfigError(
            f"apply={application!r} is not a way to apply a selection. "
            f"{did_you_mean(str(application), get_args(Application))}"
        )
    return application


def prune(
    model: Any,
    method: str | Selector | InsideMethod | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    scope: Scope = "item",
    **options: Any,
) -> Pruning:
    """Prune a model inside a ``with`` block.

    ::

        with tokenprune_hf.prune(model, "zeroth-order", keep=0.1) as pruning:
            output = model.generate(**inputs, max_new_tokens=32)
        pruning.selections

    After the block the model is exactly as it was, also after an exception.

    Parameters
    ----------
    model
        A vision-language model of transformers: of a family in `tokenprune_hf.supported_models()`
        or, for methods that look at embeddings or at nothing, of any type whose forward takes
        ``mm_encoder_outputs``. Or a PEFT model, what `torch.compile` returned, or a
        DistributedDataParallel around one.
    method
        A name out of `tokenprune.methods()` or of a method that has tokens leave inside the
        language model (``"fastv"``, ``"pyramid-drop"``, ``"sparsevlm"``), a `tokenprune.Selector`
        of your own, or a `tokenprune.PruningConfig`, which says everything else too.
        ``"trimmed-attention"`` is deprecated: it does, and returns, what
        `tokenprune_hf.trim_cross_attention` does.
    keep
        Budget of each image, video or crop: an int of tokens or a fraction. With a method inside
        the language model it is what is left behind the last stage.
    positions
        ``"original"``: kept tokens, and the text after them, have the positions of the full
        prompt. ``"compact"``: the short prompt is numbered without gaps, as the published code of
        FasterVLM and ZOO-Prune does (on models with M-RoPE all three axes count alike then).
        Methods inside the language model have ``"original"`` alone, and ``apply="drop"`` without
        proportional attention.
    apply
        ``"drop"``: tokens that were not selected leave the prompt, which is what makes the model
        cheap. ``"mask"``: they stay and the attention mask hides them, for calls that need the
        prompt's full length, and for comparing. The logits of all other tokens are those of
        ``"drop"``, except where layers have a sliding window: a shorter prompt brings more of it
        into the window.
    proportional_attention
        Whether attention counts each kept token as many times as there are tokens it stands for
        (`tokenprune.tokens_represented`; `Selection.represented` has the numbers): a large even
        area then weighs what it did in the full prompt. It costs no tokens and, with methods whose
        tokens cover the image, keeps more accuracy (docs/selectors.md). Token Merging's, arXiv
        2210.09461. vLLM's kernels cannot do it, so the answers of the two engines differ with it.
    scope
        ``"item"``: each image, crop of an image or video has a budget and a set of its own.
        ``"image"``: the crops of an image have them together, `keep` tokens for each of them or a
        share of all, wherever they lie; `selections` are those of crops all the same. Where a
        processor does not tell which crops are of one image, a call has to:
        ``image_crops=[5, 1]`` for an image of five and one of one.
    **options
        The method's own options.

    Returns
    -------
    Pruning
        With `selections` of the last call and `remove`.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, ConfigError
        For a wrong method, option, budget or way to count positions.
    UnsupportedModelError
        If the model, its wrapper, or the method on this model, is not supported.
    TokenPruneError
        If the model is pruned already.
    """
    return _start(model, method, keep, positions, apply, proportional_attention, scope, options)


def apply(
    model: Any,
    method: str | Selector | InsideMethod | PruningConfig,
    keep: Keep | None = None,
    positions: Positions = "original",
    *,
    apply: Application = "drop",
    proportional_attention: bool = False,
    scope: Scope = "item",
    **options: Any,
) -> Pruning:
    """Make a model's `generate` and calls run pruned until `remove`.

    Parameters, result and errors are those of `prune`.
    """
    return _start(model, method, keep, positions, apply, proportional_attention, scope, options)


def _start(
    model: Any,
    method: str | Selector | InsideMethod | PruningConfig,
    keep: Keep | None,
    positions: Positions,
    application: Application,
    proportional_attention: bool,
    scope: Scope,
    options: dict[str, Any],
) -> Pruning:
    """Do what `prune` and `apply` say."""
    if method != TRIMMED.name:
        check_prompt_has_images(model, method)
    if keep is None and not isinstance(method, PruningConfig):
        raise BudgetError(
            "keep is missing. Give a number of tokens (keep=64) or a fraction of them (keep=0.1)."
        )
    if method == TRIMMED.name:
        about_prompts = {
            "positions": (positions, "original"),
            "apply": (application, "drop"),
            "proportional_attention": (proportional_attention, False),
            "scope": (scope, "item"),
        }
        # Not a `Pruning`, whatever the annotation says: the method is deprecated.
        return cast(Pruning, trim_by_name(model, cast(Keep, keep), options, about_prompts))
    selector, budget, counted, scope = _asked(method, keep, positions, scope, options)
    return Pruning(model, selector, budget, counted, application, proportional_attention, scope)


def _asked(
    method: str | Selector | InsideMethod | PruningConfig,
    keep: Keep | None,
    positions: Positions,
    scope: Scope,
    options: dict[str, Any],
) -> tuple[Selector | InsideMethod, Keep | Budget, Positions, Scope]:
    """Return method, budget, positions and scope: of a name with options, an object, a config."""
    if isinstance(method, PruningConfig):
        if keep is not None or options or positions != "original" or scope != "item":
            raise TokenPruneError(
                "keep, positions, scope or options came with a PruningConfig, which has them "
                "already. Change them there, with dataclasses.replace."
            )
        return method.built(), method.budget, method.positions, method.scope
    given = cast(Keep, keep)
    if isinstance(method, (Selector, InsideMethod)):
        if options:
            raise TokenPruneError(
                f"options {sorted(options)} came with a {type(method).__name__} object, which has "
                "its options already. Set them there."
            )
        return method, given, positions, scope
    config = PruningConfig(method, given, positions, options, scope)
    return config.built(), config.budget, config.positions, config.scope


def remove(model: Any) -> None:
    """Undo `apply`; a model that is not pruned stays as it is."""
    running = attached(model)
    if running is not None:
        running.remove()
