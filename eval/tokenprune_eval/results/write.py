"""What a run leaves for people and programs: results.json, table.md and report.html."""

from __future__ import annotations

from pathlib import Path

from tokenprune_eval.results.report import render
from tokenprune_eval.results.summary import RESULTS, Results
from tokenprune_eval.results.table import markdown
from tokenprune_eval.shared.output import write_whole

TABLE, REPORT = "table.md", "report.html"


def write_results(folder: Path, results: Results) -> None:
    """Write ``results.json``, ``table.md`` and ``report.html``, each as a whole.

    Parameters
    ----------
    folder
        The run's folder; it exists.
    results
        What to write. The pictures and videos of its losses are read.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    write_whole(folder / RESULTS, results.model_dump_json(indent=1) + "\n")
    write_whole(folder / TABLE, markdown(results))
    write_whole(folder / REPORT, render(results))
