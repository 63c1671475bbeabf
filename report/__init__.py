"""The report: a program of its own on top of fwdlib, ``python -m report``."""
