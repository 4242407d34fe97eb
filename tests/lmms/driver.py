"""What test_model.py does inside lmms-eval's environment; writes JSON to the file it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

MORE = {"batch_size": 1, "device": None}
"""What lmms-eval adds to model_args by itself."""


def ask(lm: Any, docs: list[dict[str, Any]], values: dict[str, Any]) -> list[Any]:
    """Ask one question a document, as lmms-eval's evaluator does."""

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for path in doc["images"]:
            with Image.open(path) as image:
                content.append({"type": "image", "url": image.copy()})
        content.append({"type": "text", "text": doc["question"]})
        return [{"role": "user", "content": content}]

    lm.task_dict["t"] = {"test": docs}
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    requests = [
        Instance("generate_until", ("", messages, dict(values), i, "t", "test"), 0, metadata)
        for i in range(len(docs))
    ]
    return list(lm.generate_until(requests))


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    kind = get_model("tokenprune_hf")
    found: dict[str, Any] = {"errors": []}
    for text in given["wrong"]:
        try:
            kind.create_from_arg_string(text, MORE)
        except Exception as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
    lm = kind.create_from_arg_string(given["model_args"], MORE)
    for name in ("loglikelihood", "generate_until_multi_round"):
        try:
            getattr(lm, name)([])
        except NotImplementedError as error:
            found[name] = str(error)

    found["texts"] = [one.text for one in ask(lm, given["docs"], given["greedy"])]
    drawn = {}
    for seed in ("1", "2", "1 again"):
        torch.manual_seed(int(seed[0]))
        drawn[seed] = [one.text for one in ask(lm, given["docs"], given["drawn"])]
    found["drawn"] = drawn
    ended = ask(lm, given["docs"][:1], {**given["long"], "until": given["until"]})[0]
    found["ended"] = [ended.text, ended.token_counts.output_tokens]
    try:
        ask(lm, [{"images": [], "question": "?"}], {"until": 3})
    except Exception as error:
        found["note"] = [f"{type(error).__name__}: {error}", *error.__notes__]
    lm.clean()
    found["cleaned"] = not hasattr(lm, "model")
    Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
