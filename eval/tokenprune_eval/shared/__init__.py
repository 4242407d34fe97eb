"""What several commands need: the folder they write to, their progress bars, the machine's name."""
