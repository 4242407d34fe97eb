"""The methods: tokenprune's own, and those that installed packages register.

Methods differ in where they leave tokens out (`KINDS`). Those that do it before the language model
are `Selector` classes: any of them can be given to `tokenprune.select`, `tokenprune_hf.prune` and
the vLLM adapter. Those that do it inside are `tokenprune.inside.base.InsideMethod` classes, which
`tokenprune_hf.prune` takes as well. The others have functions of their own, and are listed with
them.

A package adds a selector with an entry point, ``my-method = "my_package.selectors:MyMethod"``, in
the group ``tokenprune.selectors``, a method inside the language model likewise in the group
``tokenprune.inside``, and a method of another kind with ``my-method = "my_package.method:METHOD"``,
a `Method`, in the group ``tokenprune.methods``. Nothing is imported before a method is asked for.
`register` adds a selector without a package, for this process alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tokenprune.entries import unique_entries
from tokenprune.errors import RegistryError, SelectorError, UnknownMethodError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.inside.base import InsideMethod
    from tokenprune.selectors.base import Selector

_Class = TypeVar("_Class")

GROUP = "tokenprune.selectors"
INSIDE_GROUP = "tokenprune.inside"
METHODS_GROUP = "tokenprune.methods"

_OWN = {
    "cdpruner": "tokenprune.selectors.cdpruner:CDPruner",
    "cdpruner-llm": "tokenprune.selectors.cdpruner_llm:CDPrunerLLM",
    "cls-attention": "tokenprune.selectors.cls_attention:ClsAttention",
    "dart": "tokenprune.selectors.dart:Dart",
    "divprune": "tokenprune.selectors.divprune:DivPrune",
    "evs": "tokenprune.selectors.evs:Evs",
    "fastvid": "tokenprune.selectors.fastvid:FastVid",
    "feature-norm": "tokenprune.selectors.feature_norm:FeatureNorm",
    "flexselect": "tokenprune.selectors.flexselect:FlexSelect",
    "hiprune": "tokenprune.selectors.hiprune:HiPrune",
    "holov": "tokenprune.selectors.holov:HoloV",
    "id-selection": "tokenprune.selectors.id_selection:IdSelection",
    "information": "tokenprune.selectors.information:Information",
    "mmtok": "tokenprune.selectors.mmtok:MMTok",
    "prumerge-plus": "tokenprune.selectors.prumerge_plus:PruMergePlus",
    "prunesid": "tokenprune.selectors.prunesid:PruneSID",
    "random": "tokenprune.selectors.random:Random",
    "relevant-information": "tokenprune.selectors.information:RelevantInformation",
    "scope": "tokenprune.selectors.scope:Scope",
    "score-k-center": "tokenprune.selectors.score_k_center:ScoreKCenter",
    "uniform": "tokenprune.selectors.uniform:Uniform",
    "vidcom2": "tokenprune.selectors.vidcom2:VidCom2",
    "visionzip": "tokenprune.selectors.visionzip:VisionZip",
    "vispruner": "tokenprune.selectors.vispruner:VisPruner",
    "zeroth-order": "tokenprune.selectors.zeroth_order:ZerothOrder",
}

_OWN_INSIDE = {
    "fastv": "tokenprune.inside.fastv:FastV",
    "pyramid-drop": "tokenprune.inside.pyramid_drop:PyramidDrop",
    "sparsevlm": "tokenprune.inside.sparsevlm:SparseVLM",
}

Kind = Literal["before", "inside", "cross-attention"]
"""Where a method leaves tokens out."""

KINDS: dict[Kind, str] = {
    "before": "before the language model: tokens leave the prompt before its first layer",
    "inside": "inside the language model: tokens leave between its layers",
    "cross-attention": "in cross-attention: tokens that stand in no prompt, and that text attends "
    "to in some layers",
}
"""Kind -> what it means. All selectors are of the first one, also those that read the prompt with
some layers of the language model in order to choose."""


Group = Literal["baselines", "blind", "questions", "videos", "inside", "cross-attention"]
"""Where a method stands in lists of methods."""

GROUPS: dict[Group, str] = {
    "baselines": "baselines: what a method has to beat",
    "blind": "blind: the same tokens of an image whatever is asked",
    "questions": "reading the question: which tokens stay depends on the prompt's text",
    "videos": "for videos: frames are compared with each other",
    **{"inside": KINDS["inside"], "cross-attention": KINDS["cross-attention"]},
}
"""Group -> what it means, in order. The first four are those of the kind ``"before"``."""


@dataclass(frozen=True)
class Method:
    """What is known of a method without running it: a line of `tokenprune methods`.

    Attributes
    ----------
    name
        What users write.
    kind
        Out of `KINDS`.
    summary
        What it selects by, in one line.
    paper
        Title and arXiv number, or where else it comes from; "" for a baseline.
    call
        The call that applies it to a model.
    needs
        For a selector, names out of `tokenprune.tokens.INPUTS`.
    options
        Option -> its default.
    merges
        Whether it adds dropped tokens to kept ones.
    for_videos
        Whether it is made for videos alone, see `tokenprune.Selector`.
    """

    name: str
    kind: Kind
    summary: str
    paper: str
    call: str
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = False
    for_videos: bool = False

    @property
    def reads_question(self) -> bool:
        """Whether what it keeps depends on the prompt's text."""
        from tokenprune.tokens import FROM_PROMPT

        return self.kind != "before" or bool(FROM_PROMPT & set(self.needs))

    @property
    def group(self) -> Group:
        """Where it stands in lists of methods."""
        if self.kind != "before":
            return self.kind
        if self.for_videos:
            return "videos"
        if not self.paper:
            return "baselines"
        return "questions" if self.reads_question else "blind"


_here: dict[str, type[Selector]] = {}
"""Name -> class, what `register` added."""


def register(selector: type[Selector]) -> None:
    """Add a selector under its `name`, in this process only.

    For trying things out, for example in a script that runs an evaluation: other processes, such
    as vLLM's workers, do not know it. An entry point registers a selector for all of them.

    Parameters
    ----------
    selector
        The class. Registering it again does nothing.

    Raises
    ------
    RegistryError
        If another method has that name.
    """
    name = selector.name
    known = _here.get(name)
    if known is selector:
        return
    others = {**_inside_entries(), **_other_entries()}
    taken = registered().get(name) or others.get(name)
    if known is not None or taken is not None:
        where = f"{known.__module__}:{known.__qualname__}" if known else taken and taken.value
        raise RegistryError(
            f"a method is called {name!r} already: {where}. Give the class another `name`."
        )
    _here[name] = selector


def registered() -> dict[str, EntryPoint]:
    """Return name -> where the class is, for every method; a name that is taken is refused.

    What `register` added is not among them.
    """
    return unique_entries(GROUP, "selectors", _OWN)


def _load(entry: EntryPoint) -> type[Selector]:
    # Here, because it imports torch.
    from tokenprune.selectors.base import Selector

    return _load_class(entry, "selector", Selector, "tokenprune.Selector")


def _load_inside(entry: EntryPoint) -> type[InsideMethod]:
    from tokenprune.inside.base import InsideMethod

    return _load_class(entry, "method", InsideMethod, "tokenprune.inside.base.InsideMethod")


def _load_class(entry: EntryPoint, what: str, base: type[_Class], known_as: str) -> type[_Class]:
    """Return the class that an entry point names, which must be a subclass with that name."""
    loaded = _load_value(entry, what)
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise RegistryError(
            f"the {what} {entry.name!r} points to {entry.value}, which is no subclass of "
            f"{known_as}."
        )
    named: Any = loaded
    if named.name != entry.name:
        raise RegistryError(
            f"the {what} registered as {entry.name!r} calls itself {named.name!r}. The entry "
            "point's name and the class's `name` must be the same."
        )
    return loaded


def _load_value(entry: EntryPoint, what: str) -> Any:
    """Return what an entry point names; `what` is what it is called in an error."""
    try:
        return entry.load()
    except (ImportError, AttributeError, SelectorError) as error:
        raise RegistryError(
            f"the {what} {entry.name!r} cannot be loaded from {entry.value}: {error}. "
            "Repair or uninstall the package that registers it."
        ) from error


def methods() -> dict[str, type[Selector]]:
    """Return every selector: name -> its class, whose `needs`, `paper` and fields describe it.

    Methods of other kinds are in `listed`.

    Raises
    ------
    RegistryError
        If two packages register one name, or one cannot be loaded.
    """
    found = {name: _load(entry) for name, entry in registered().items()}
    return dict(sorted({**found, **_here}.items()))


def listed() -> dict[str, Method]:
    """Return every method of every kind: name -> what is known of it, sorted by name.

    Raises
    ------
    RegistryError
        If two packages register one name, or one cannot be loaded.
    """
    selectors = {name: _described(known, "before") for name, known in methods().items()}
    inside = {name: _described(known, "inside") for name, known in inside_methods().items()}
    others = {name: _load_method(entry) for name, entry in _other_entries().items()}
    return dict(sorted({**selectors, **inside, **others}.items()))


def _described(known: type[Selector] | type[InsideMethod], kind: Kind) -> Method:
    """Return what is known of a class."""
    return Method(
        name=known.name,
        kind=kind,
        summary=known.summary,
        paper=known.paper,
        call=_call(known),
        needs=known.needs,
        options={option.name: option.default for option in dataclasses.fields(known)},
        merges=bool(known.merges),
        for_videos=getattr(known, "for_videos", False),
    )


def inside_methods() -> dict[str, type[InsideMethod]]:
    """Return every method that leaves tokens out inside the language model: name -> its class.

    Raises
    ------
    RegistryError
        If two packages register one name, or one cannot be loaded.
    """
    return {name: _load_inside(entry) for name, entry in sorted(_inside_entries().items())}


def _inside_entries() -> dict[str, EntryPoint]:
    """Return name -> where the class is, for methods inside the language model."""
    return _apart(unique_entries(INSIDE_GROUP, "methods", _OWN_INSIDE), registered())


def _call(known: type[Selector] | type[InsideMethod]) -> str:
    """Return the call that applies a method to a model, or to an item where no model can be."""
    from tokenprune.tokens import FROM_CALLER

    if FROM_CALLER & set(known.needs):
        return f"tokenprune.select(tokens, {known.name!r}, keep)"
    return f"tokenprune_hf.prune(model, {known.name!r}, keep)"


def _other_entries() -> dict[str, EntryPoint]:
    """Return name -> where the `Method` is, for those that have a function of their own."""
    taken = {**registered(), **_inside_entries()}
    return _apart(unique_entries(METHODS_GROUP, "methods"), taken)


def _apart(
    entries: dict[str, EntryPoint], taken: Mapping[str, EntryPoint]
) -> dict[str, EntryPoint]:
    """Return entry points of one kind of methods, none of which has a name of another kind."""
    for name, entry in entries.items():
        if name in taken:
            raise RegistryError(
                f"two methods are called {name!r}: {taken[name].value} and {entry.value}. "
                "Rename one in its package's entry points, or uninstall that package."
            )
    return entries


def _load_method(entry: EntryPoint) -> Method:
    method = _load_value(entry, "method")
    if not isinstance(method, Method) or method.name != entry.name or method.kind not in KINDS:
        raise RegistryError(
            f"the method {entry.name!r} points to {entry.value}, which must be a "
            f"tokenprune.registry.Method of that name, of a kind out of {', '.join(KINDS)}, and is "
            f"{method!r}."
        )
    return method


def find(method: str) -> type[Selector]:
    """Return the class of one selector.

    Raises
    ------
    UnknownMethodError
        If there is none of that name; the message names the nearest.
    RegistryError
        If it is registered twice or cannot be loaded.
    """
    # Here, because it imports torch.
    from tokenprune.selectors.base import Selector

    found = find_any(method)
    if issubclass(found, Selector):
        return found
    raise no_selector(found)


def find_any(method: str) -> type[Selector] | type[InsideMethod]:
    """Return the class of one method, a selector or a method inside the language model.

    Raises
    ------
    UnknownMethodError, RegistryError
        As `find`.
    """
    if method in _here:
        return _here[method]
    entries, inside = registered(), _inside_entries()
    if method in entries:
        return _load(entries[method])
    if method in inside:
        return _load_inside(inside[method])
    if (other := _other_entries().get(method)) is not None:
        raise _elsewhere(_load_method(other))
    known = {**entries, **inside, **_here}
    raise UnknownMethodError(f"there is no method {method!r}. {did_you_mean(str(method), known)}")


def no_selector(method: type[InsideMethod]) -> UnknownMethodError:
    """Return the error that says where a method inside the language model can be used."""
    return _elsewhere(_described(method, "inside"))


def _elsewhere(known: Method) -> UnknownMethodError:
    return UnknownMethodError(
        f"method {known.name!r} selects no tokens of a prompt and cannot be used here: it prunes "
        f"{KINDS[known.kind]}. Call {known.call}."
    )


def build(method: str, options: dict[str, Any]) -> Selector:
    """Return the selector with these options; both are checked.

    Raises
    ------
    UnknownMethodError
        If there is no such selector.
    OptionError
        If it has no such option, or the option cannot take that value.
    """
    return find(method).from_options(options)


def build_any(method: str, options: dict[str, Any]) -> Selector | InsideMethod:
    """Return the method with these options: a selector, or a method inside the language model.

    Raises
    ------
    UnknownMethodError, OptionError
        As `build`.
    """
    return find_any(method).from_options(options)
