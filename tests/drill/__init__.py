"""The fault drill, ``python -m tests.drill`` (``make drill``): it breaks things, and sees that each promise holds.

An item is a function with a docstring, which says what it does, and a promise, which the site's page prints. It works
in a folder of its own with :class:`~tests.drill.harness.Trial`, fails by raising, and returns what it has seen.
"""
