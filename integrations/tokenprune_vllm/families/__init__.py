"""The families of models that can be served pruned; one module for each kind of vision tower."""
