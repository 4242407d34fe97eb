"""A run of the evaluation says in its YAML file where a method takes tokens, and the scope."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import tokenprune_hf
from tokenprune.cli import main
from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.data.load import choose, load_data
from tokenprune_eval.results.files import read_run

_RUN = """\
model: bundled
data: [scenes]
method: [divprune, information]
options: {divprune: {taken: before}}
scope: image
keep: [9]
limit: 4
memory: 0
note_kept: true
"""


def test_conditions_take_tokens_where_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(_RUN + f"out: {out}\n", "utf-8")
    assert main(["eval", "--config", str(file)]) == 0
    records = {(one.condition, one.item): one for one in read_run(out).records}
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    kept = {}
    for item in choose(load_data("scenes"), 4, 0).questions:
        inputs = tokenprune_hf.ask(processor, item.question, image=load_image(item.path))
        for method, place in (("divprune", "before"), ("information", "after")):
            with tokenprune_hf.prune(model, method, 9, taken=place) as pruning:
                model(**inputs)
            expected = pruning.selections[0].kept.tolist()
            assert records[f"{method}@9", f"scenes/{item.id}"].kept == expected
        with tokenprune_hf.prune(model, "divprune", 9) as pruning:
            model(**inputs)
        usual = pruning.selections[0].kept.tolist()
        kept[item.id] = usual == records["divprune@9", f"scenes/{item.id}"].kept
    assert not all(kept.values())
    # Another place, or scope, is another run.
    capsys.readouterr()
    for other in ("--scope=item", "--option=divprune.taken=after"):
        assert main(["eval", "--config", str(file), other]) == 2
        name = "scope" if "scope" in other else "options"
        assert name in capsys.readouterr().err


def test_a_place_or_a_scope_that_there_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    for change, says in (
        (("before", "befor"), "Did you mean 'before'"),
        (("before", "deepstack-0"), "has no deepstack tap"),
        (("scope: image", "scope: images"), "scope"),
        (("[divprune, information]", "[divprune, evs]"), "scope='image' does not go with"),
    ):
        file.write_text(_RUN.replace(*change) + f"out: {tmp_path / 'out'}\n", "utf-8")
        assert main(["eval", "validate", "--config", str(file)]) == 2
        assert says in capsys.readouterr().err.replace("\n", " ")
