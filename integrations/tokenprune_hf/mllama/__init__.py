"""Llama-3.2-Vision (`mllama`), whose text attends to vision tokens that stand in no prompt.

These models cannot be pruned by `tokenprune_hf.prune`. They have a function of their own,
`tokenprune_hf.trim_cross_attention`.
"""
