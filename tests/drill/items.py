"""All items, in the order in which they are tried."""

from tests.drill import batches, reports, sources, trainings
from tests.drill.harness import ITEMS

__all__ = ["ITEMS", "batches", "reports", "sources", "trainings"]
