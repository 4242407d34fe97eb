"""The objectives as Triton kernels. Importing a module of this package imports Triton."""
