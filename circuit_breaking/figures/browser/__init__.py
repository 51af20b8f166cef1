"""The report of a run as one HTML page for a browser. Read `page.py` first.

`parts` says what a page consists of, the other modules make these parts from result files, and `assets` holds the
template, the style, the scripts and the libraries that are copied into every page.
"""
