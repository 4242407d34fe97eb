"""What to evaluate: one value, from the command line or a YAML file, checked before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenprune.arguments import parse_keep
from tokenprune.baselines import resizes
from tokenprune.budget import check_keep, keeps_all
from tokenprune.config import Positions, PruningConfig
from tokenprune.errors import ConfigError, InputFileError, TokenPruneError, did_you_mean, reason_of
from tokenprune.registry import find_any, inside_methods
from tokenprune.scope import Scope
from tokenprune_eval.data.question import BoxUnit
from tokenprune_eval.results.records import UNPRUNED, Condition, pruned_by

EngineName = Literal["hf", "vllm", "openai"]
ChooseBy = Literal["likelihood", "text"]

GROWING = frozenset({"method", "keep", "data", "limit", "positions", "proportional_attention"})
"""What may differ when a run goes on in its folder: it adds questions or conditions."""

FREE = frozenset(
    {
        *("out", "strict", "retry_errors", "ahead", "batch", "workers", "cache"),
        *("memory", "dominance", "note_kept"),
        *("base_url", "api_key", "concurrency", "timeout", "retries"),
    }
)
"""What may differ because no answer depends on it."""


class Settings(BaseModel):
    """What to evaluate, and how.

    Attributes
    ----------
    model
        Folder or name of a checkpoint, ``"bundled"``, or the served name for ``openai``.
    data
        Data sets, see `tokenprune_eval.data.load.load_data`.
    method, keep
        Every method is run with every budget; 1.0 is the unpruned model and is run once, always.
        A budget may also be text, such as ``"25%"``. ``resize`` makes the picture smaller in place
        of a method, and ``resize+METHOD`` before one.
    options
        Method -> its own options, those of ``resize+METHOD`` as well.
    positions
        How the positions of kept tokens are counted.
    scope
        What has a set of kept tokens of its own, see `tokenprune.PruningConfig`.
    proportional_attention
        Whether attention counts a kept token as often as there are tokens that it stands for, see
        `tokenprune_hf.prune`; ``"both"``: every method and budget is run with and without it.
        Engine ``hf``.
    engine
        ``"hf"``, ``"vllm"``, or ``"openai"`` for any server that speaks its protocol.
    out
        Folder of the run.
    media
        Folder with the pictures and videos of `data`, where they do not lie in the usual place.
    split, answers
        See `load_data`.
    frames, fps, max_side
        Of each video, see `tokenprune_hf.read_video`.
    allow_truncated
        Whether what can be decoded of a video that is cut off or damaged is used, see
        `tokenprune_hf.read_video`; otherwise it is an error.
    instruction
        Put behind every open question, on a line of its own, in place of the data set's own.
    box_unit
        What the numbers of a box in an answer count, and what the questions for boxes ask for.
    choose_by
        What counts for questions with choices: the likeliest letter, or the text. Where it is not
        given, likelihood, with ``openai`` text.
    max_new_tokens
        Of an answer.
    limit
        Questions of each data set, drawn with `seed`; None for all. In a file also a number for
        each data set by its name; of those without one, all.
    seed
        Of the draw; ``random`` draws from a seed of its own for each image or video.
    shard
        (i, n): this run takes the i-th of n parts, i from 1.
    batch
        Questions answered together.
    workers
        Copies of the model at work side by side, each on one core; for small models.
    ahead
        Images or videos read while the model is at work.
    cache
        Folder where encoded images and videos are kept for other runs; engine ``hf``.
    memory
        Questions of each data set and condition whose peak memory is measured; engine ``hf``.
    dominance
        Questions whose Modality Dominance and Attention Efficiency Index are measured, of each data
        set and condition; engine ``hf``.
    note_kept
        Whether the kept tokens of every answer are noted in its record, and not only of some that
        the report draws; engine ``hf``.
    strict
        Whether the first question that cannot be answered ends the run.
    retry_errors
        Whether questions that ended in an error before are asked again.
    base_url, api_key, concurrency, timeout, retries
        Engine ``openai``: the server, the name of the environment variable with the key, requests
        at a time, seconds until one is given up, and how often it is tried again.
    engine_args
        Engine ``vllm``: further arguments of `vllm.LLM`.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: str
    data: list[str] = Field(min_length=1)
    method: list[str] = []
    keep: list[int | float | str] = [1.0, 0.5, 0.25, 0.125, 0.0625]
    options: dict[str, dict[str, Any]] = {}
    positions: Positions = "original"
    scope: Scope = "item"
    proportional_attention: bool | Literal["both"] = False
    engine: EngineName = "hf"
    out: Path
    media: Path | None = None
    split: str = "test"
    answers: Path | None = None
    frames: int = Field(default=32, ge=1)
    fps: float | None = Field(default=None, gt=0)
    max_side: int | None = Field(default=None, ge=16)
    allow_truncated: bool = False
    instruction: str = ""
    box_unit: BoxUnit = "fraction"
    choose_by: ChooseBy = "likelihood"
    max_new_tokens: int = Field(default=16, ge=1)
    limit: int | dict[str, int] | None = None
    seed: int = 0
    shard: tuple[int, int] | None = None
    batch: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=1)
    ahead: int = Field(default=4, ge=1)
    cache: Path | None = None
    memory: int = Field(default=1, ge=0)
    dominance: int = Field(default=0, ge=0)
    note_kept: bool = False
    strict: bool = False
    retry_errors: bool = False
    base_url: str | None = None
    api_key: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=4, ge=0)
    engine_args: dict[str, Any] = {}

    @field_validator("shard")
    @classmethod
    def _shard(cls, shard: tuple[int, int] | None) -> tuple[int, int] | None:
        if shard is not None and not 1 <= shard[0] <= shard[1]:
            raise ValueError("a shard is i/n with i from 1 to n")
        return shard

    @field_validator("limit")
    @classmethod
    def _limit(cls, limit: int | dict[str, int] | None) -> int | dict[str, int] | None:
        limits = limit.values() if isinstance(limit, dict) else [1 if limit is None else limit]
        if any(one < 1 for one in limits):
            raise ValueError("a limit is a number of questions, at least 1")
        return limit

    @field_validator("keep", mode="before")
    @classmethod
    def _no_bool(cls, keep: Any) -> Any:
        # YAML reads `yes` as true, which would become one token.
        if isinstance(keep, list) and any(isinstance(one, bool) for one in keep):
            raise ValueError("a budget is a number of tokens (64) or a fraction (0.1 or 10%)")
        return keep

    @field_validator("keep")
    @classmethod
    def _keep(cls, keep: list[int | float | str]) -> list[int | float | str]:
        try:
            return [
                parse_keep(one, "keep=") if isinstance(one, str) else check_keep(one)
                for one in keep
            ]
        except TokenPruneError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _by_engine(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("choose_by") is None:
            by_text = values.get("engine") == "openai"
            values = {**values, "choose_by": "text" if by_text else "likelihood"}
        return values

    @model_validator(mode="after")
    def _together(self) -> Settings:
        for method in self.options:
            if method not in map(pruned_by, self.method):
                raise ValueError(
                    f"options are given for {method!r}, which is not among the methods"
                )
        if self.engine == "openai" and self.base_url is None:
            raise ValueError("engine openai needs base_url, for example http://127.0.0.1:8000/v1")
        if self.engine == "openai" and self.choose_by == "likelihood":
            raise ValueError("choose_by likelihood needs the engine hf or vllm")
        if self.engine == "openai" and any(map(resizes, self.method)):
            raise ValueError(
                "resize needs the engine hf or vllm: how many tokens a picture becomes is counted "
                "with the model's own processor. Leave resize out, or run it apart with --engine hf"
            )
        for name, value in (("cache", self.cache), ("dominance", self.dominance)):
            if value and self.engine != "hf":
                raise ValueError(f"{name} needs the engine hf")
        if self.proportional_attention and self.engine != "hf":
            raise ValueError(
                "proportional_attention needs the engine hf: vLLM's kernels cannot count a key "
                "more than once. Leave it out, or leave out engine"
            )
        if self.proportional_attention and self.dominance:
            raise ValueError(
                "dominance is that of plain attention: leave out proportional_attention, or "
                "measure dominance in a run of its own"
            )
        if any(map(resizes, self.method)):
            self._check_resizing()
        if self.dominance and (inside := sorted({*self.method} & {*inside_methods()})):
            raise ValueError(
                "dominance is that of a prompt which all layers read alike, and with "
                f"{', '.join(inside)} tokens leave inside the language model: leave out dominance, "
                "or these methods"
            )
        return self

    def _check_resizing(self) -> None:
        if self.scope != "item":
            raise ValueError(
                f"the budget of resize is that of each item, and scope is {self.scope!r}: leave "
                "out resize, or scope"
            )
        for method in self.method:
            if resizes(method) and pruned_by(method) in inside_methods():
                raise ValueError(
                    f"{method}: tokens leave inside the language model, and resize goes before "
                    f"methods that choose in front of it: name resize and {pruned_by(method)} apart"
                )

    def check_methods(self) -> None:
        """Raise for a method, an option or a budget that is not there.

        Raises
        ------
        UnknownMethodError, OptionError, ConfigError
            As `PruningConfig`.
        """
        for condition in self.conditions():
            if condition.pruned_by is not None:
                find_any(condition.pruned_by)
                self.pruning(condition)

    def conditions(self) -> list[Condition]:
        """Return what is run: the unpruned model first, then every method with every budget."""
        keeps = [check_keep(keep) for keep in dict.fromkeys(self.keep)]
        both = self.proportional_attention == "both"
        ways = (False, True) if both else (bool(self.proportional_attention),)
        pruned = [
            # A picture that is small stands for itself alone, at positions of its own.
            Condition(method=method, keep=keep)
            if pruned_by(method) is None
            else Condition(
                method=method,
                keep=keep,
                positions=self.positions,
                proportional_attention=proportional,
            )
            for method in dict.fromkeys(self.method)
            for keep in keeps
            if not keeps_all(keep)
            for proportional in (ways if pruned_by(method) is not None else ways[:1])
        ]
        return [Condition(method=UNPRUNED, keep=1.0), *pruned]

    def limit_of(self, name: str) -> int | None:
        """Return how many questions of a data set are drawn, None for all."""
        return self.limit.get(name) if isinstance(self.limit, dict) else self.limit

    def pruning(self, condition: Condition) -> PruningConfig:
        """Return a condition's pruning with the method's options."""
        method = condition.pruned_by or "uniform"
        options = {} if condition.pruned_by is None else self.options.get(method, {})
        scope: Scope = "item" if condition.pruned_by is None else self.scope
        return PruningConfig(method, condition.keep, condition.positions, options, scope)

    def differences(self, other: Settings) -> list[str]:
        """Return the names of settings that keep two runs from being one."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return [name for name in mine if name not in GROWING | FREE and mine[name] != theirs[name]]


def read_settings(values: dict[str, Any], file: Path | None = None) -> Settings:
    """Return settings out of a YAML file and what was given besides, which wins.

    Parameters
    ----------
    values
        Settings by name.
    file
        YAML, an object with the names of `Settings`.

    Raises
    ------
    InputFileError
        If the file cannot be read.
    ConfigError
        For a name or a value that is not allowed; all of them are named.
    """
    source = "the settings"
    if file is not None:
        source = str(file)
        try:
            known = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputFileError(
                f"the settings in {file} cannot be read: {_yaml_reason(error)}."
            ) from None
        if not isinstance(known, dict):
            raise InputFileError(f"{file} is not an object of settings, such as `model: bundled`.")
        values = {**known, **values}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = []
        for one in error.errors():
            name = ".".join(map(str, one["loc"]))
            if one["type"] == "extra_forbidden":
                lines.append(f"{name} is no setting. {did_you_mean(name, Settings.model_fields)}")
            elif one["type"] == "missing":
                lines.append(f"{name} is missing. Give --{name.replace('_', '-')}.")
            else:
                where = f"{name}={one['input']!r}: " if name else ""
                lines.append(f"{where}{one['msg'].removeprefix('Value error, ').rstrip('.')}.")
        raise ConfigError(f"{source}: " + " ".join(lines)) from None


def _yaml_reason(error: Exception) -> str:
    """Return what is wrong with a file, and where in it, without a full stop."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, character {mark.column + 1}"
    return reason_of(error)
