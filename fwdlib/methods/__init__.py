"""Published methods past the six core notebooks, a file each, with its figures beside it.

For notebooks 4 to 9 and for readers who look for one method by name.
"""
