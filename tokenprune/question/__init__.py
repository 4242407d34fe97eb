"""Reading visual tokens together with the question, without an engine."""
