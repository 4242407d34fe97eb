"""Training a selector for `flexselect-lite`: data, losses, the training and its command."""
