"""The demo: the bundled model answers two question sets with all and with few visual tokens.

`command.py` is ``tokenprune demo``; `runner.py` does the work; `report.py` writes the page.
"""
