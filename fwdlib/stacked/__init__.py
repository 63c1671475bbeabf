"""The fast engine: the primal and its tangents go through a model as one batch.

For researchers who train a model of their own with forward gradients and want the step to be fast. The core reaches it
through :func:`fwdlib.forward_gradient` alone.
"""
