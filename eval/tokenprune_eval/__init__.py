"""Offline evaluation of visual token pruning: data sets, the bundled model, demo and report."""
