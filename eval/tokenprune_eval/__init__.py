"""Offline evaluation of visual token pruning: data sets, the bundled model, demo and report."""

import tokenprune_vlm.checked  # noqa: F401  # raises where `tokenprune` is another project's
