"""``python -m fwdlib train``: image classifiers from one command, resumable, in one process or several.

For users who want to train a network with one of the methods and not write a loop.
"""
