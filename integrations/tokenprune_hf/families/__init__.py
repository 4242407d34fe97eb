"""Model families: where each keeps its encoder, its projector and its tokens."""
