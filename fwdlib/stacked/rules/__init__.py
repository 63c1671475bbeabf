"""The rules of the stacked pass: from the rows of a torch function's arguments to the rows of its result.

A stack has shape (1 + R, ...): row 0 is the primal, the other rows are tangents. A rule applies a linear function to
all rows at once. It applies any other function to the primal, and the function's derivative there to the tangents.

Autograd's tape may be on, for local derivatives (:mod:`fwdlib.methods.feedback`). It then records the primal alone: the
tangents are constants to it, and layers with weights compute them by a product of their own.

Each module holds the rules of one kind of function. Importing this package registers all of them.
"""

from fwdlib.stacked.rules import (  # noqa: F401
    arithmetic,
    constants,
    convolutions,
    elementwise,
    linear,
    losses,
    normalisation,
    pooling,
    reductions,
    shapes,
)
