"""Data sets: what is asked about which image or video, and which answers are right."""
