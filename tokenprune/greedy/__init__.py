"""Greedy selection: the objectives that methods share, each defined once in torch.

A method gives rows and weights and names its objective (`tokenprune.greedy.objectives`). On a CUDA
device with Triton the same choice is made by a few fused kernels (`tokenprune.greedy.fused`).
"""
