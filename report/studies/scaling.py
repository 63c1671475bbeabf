"""What a step costs that several processes share, over links that are slowed on purpose.

Everything is measured on one machine. Each process has one thread, and a link of its own in a network namespace, which
takes root and Debian's package iproute2. Without them, only the loopback device is measured, and the page says so.
Run nothing else meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fwdlib.bench import links, sharing
from fwdlib.results import write_json
from report.names import SCALING
from report.studies.common import main, reopen


class Settings(NamedTuple):
    """What is measured, and how often."""

    counts: tuple[int, ...]
    """Numbers of processes."""
    rates: tuple[int | None, ...]
    """Mbit/s that a link carries; None for the loopback device as it is."""
    num_rounds: int


FULL = Settings((1, 2, 4), (None, 1000, 100, 10), 11)
SHORT = Settings((1, 2), (None, 100), 3)


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure what the file does not hold yet, and return everything that it then holds.

    Returns:
        ``settings``, ``environment``, and ``rows``, as :func:`fwdlib.bench.sharing.measure_step` returns them;
        ``obstacle``: why links could not be slowed, empty if they could.
    """
    file = folder / SCALING
    found = reopen(file, settings._asdict() | {"batch_size": sharing.BATCH_SIZE, "rivals": sharing.RIVALS}, rows=[])
    found["obstacle"] = links.obstacle()
    there = {(row["count"], row["megabits"]) for row in found["rows"]}
    wanted = [(count, rate) for count in settings.counts for rate in settings.rates if count > 1 or rate is None]
    for count, rate in tqdm([each for each in wanted if each not in there], desc="scaling", unit="link"):
        if rate is None or not found["obstacle"]:
            row = sharing.measure_step(count, rate, slow=rate is not None, num_rounds=settings.num_rounds)
            found["rows"].append(row)
            write_json(file, found)
    return found


if __name__ == "__main__":
    main(measure, FULL, SHORT)
