"""Directional derivatives of any model, right or refused: torch's forward mode, made to follow what a model does.

For :func:`fwdlib.forward_gradient`, which calls it, and whoever asks how a derivative is taken where torch has none, or
another one than backprop's. The stacked engine uses it, too.
"""
