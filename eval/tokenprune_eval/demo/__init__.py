"""The demo: an evaluation of the bundled model with a page of its own.

`preset.py` says what is asked; `tokenprune_eval.evaluation` asks it; `runner.py` adds what is the
demo's own: what an answer costs, the oracle, and the questions that `report.py` shows.
"""
