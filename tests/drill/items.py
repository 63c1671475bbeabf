"""All items, in the order in which they are tried."""

from tests.drill import trainings
from tests.drill.harness import ITEMS

__all__ = ["ITEMS", "trainings"]
