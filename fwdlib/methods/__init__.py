"""Published methods beyond the six core notebooks: a file for each, its figures beside it in ``<method>_figures.py``.

For notebooks 4 to 9 and 11 to 13, and for readers who look for one method by name.
"""
