"""What is known of vision towers and projectors, without an engine; and how the rows lie."""
