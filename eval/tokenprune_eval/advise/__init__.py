"""`tokenprune advise`: where the time of a request goes, and what pruning can save of it."""
