"""Offline evaluation: data sets through a model, pruned in several ways, and what comes of it."""
