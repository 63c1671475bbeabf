"""The fast engine: the primal and its tangents go through a model as one batch.

For researchers who train a model of their own with forward gradients and need fast steps. The core uses it only through
:func:`fwdlib.forward_gradient`.
"""

from fwdlib.stacked import rules  # noqa: F401  (registers the rules; without them every function goes the slow way)
