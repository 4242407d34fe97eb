"""The selectors: one file per published method. `base.py` says what a selector is."""
