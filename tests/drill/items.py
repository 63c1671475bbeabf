"""All items, in the order in which they are tried."""

from tests.drill import batches, clusters, places, reports, sources, trainings
from tests.drill.harness import ITEMS

__all__ = ["ITEMS", "batches", "clusters", "places", "reports", "sources", "trainings"]
