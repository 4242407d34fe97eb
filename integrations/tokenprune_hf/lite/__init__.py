"""FlexSelect-Lite: a small decoder that learns how a large model ranks visual tokens."""
