"""What is known of vision towers, without an engine: their attention, and how their rows lie."""
