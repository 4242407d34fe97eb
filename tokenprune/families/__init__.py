"""What each family of models does in its own way, written once for every engine."""
