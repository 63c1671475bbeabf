"""``python -m tests.drill``: one line for each item, and a last one that sums up. The exit code is 1 if one failed."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import tyro
from tqdm import tqdm

from tests.drill import harness
from tests.drill.items import ITEMS


@dataclass
class Drill:
    """Break things on purpose, in temporary folders, and see that every promise of the project holds."""

    short: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only the items that take seconds: three minutes in all, as CI runs them."""
    seed: int = field(default_factory=lambda: random.randrange(10**6))
    """Of the random moments; drawn anew by default."""
    only: str = ""
    """Only items whose names contain this text."""


def main(drill: Drill) -> int:
    """Try the items, and return the exit code."""
    chosen = [item for item in ITEMS.values() if drill.only in item.name and (item.short or not drill.short)]
    print(f"drill with seed {drill.seed}: {len(chosen)} items", flush=True)
    begun, states = time.monotonic(), Counter()
    for sent in (signal.SIGINT, signal.SIGTERM):  # both clean up, also where a shell has told us to ignore the first
        signal.signal(sent, signal.default_int_handler)
    with harness.scratch() as folder, tqdm(chosen, unit="item", leave=False, disable=None) as bar:
        for number, item in enumerate(bar):
            bar.set_postfix_str(item.name)
            state, happened, seconds = harness.attempt(item, folder / str(number), drill.seed, drill.short)
            states[state] += 1
            line = f"{state:<8}{seconds:5.1f} s  {item.name}: {item.done} | expected: {item.promise} | {happened}"
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    counts = ", ".join(f"{states[state]} {state}" for state in ("ok", "FAILED", "skipped"))
    print(f"{counts}; seed {drill.seed}, {time.monotonic() - begun:.0f} s")
    return int(states["FAILED"] > 0 or not chosen)


if __name__ == "__main__":
    drill = tyro.cli(Drill, prog="python -m tests.drill", description=Drill.__doc__)
    try:
        sys.exit(main(drill))
    except KeyboardInterrupt:
        sys.exit(130)
