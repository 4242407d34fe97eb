"""What a run of `tokenprune eval` found: statistics, results.json, tables and the report."""
