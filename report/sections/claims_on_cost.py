"""Published claims on what avoiding backpropagation costs and what workers send; see :mod:`report.sections.claims`."""

from __future__ import annotations

import math
from typing import Any

from fwdlib.statistics import Interval
from report import published
from report.names import LEARNED
from report.sections import lookups
from report.sections.lookups import Lookup
from report.sections.traffic import FORWARD
from report.sections.verdicts import Cases, Claim, above, below, made, within

Context = dict[str, Any]
AVOIDED, DIMENSION_FREE = "[@panchal2025]", "[@li2024]"
QUOTED = published.load()["avoiding_backprop"]
CHECKPOINTED = "backprop with checkpoints"


def _under_budget(quantity: str) -> Lookup:
    # Checkpointed backprop against each method without a backward pass, on each network.
    def cases(context: Context) -> Cases:
        against = made(context, "cost", "budget", "against")
        found = {
            f"{method}, {network}": of[quantity] for network, rows in against.items() for method, of in rows.items()
        }
        return {case: value for case, value in found.items() if value is not None}

    return cases


DEEP = ("rank-one", "two-point")  # methods without a backward pass in the sweep of depths


def _time_at_depth(context: Context) -> Cases:
    # `ratio` is rank-one's time over a rival's
    rivals = made(context, "cost", "depth", "rivals")
    return {method: lookups.quotient(rivals["exact"]["ratio"], rivals[method]["ratio"]) for method in DEEP}


def _memory_at_depth(context: Context) -> Cases:
    rivals = made(context, "cost", "depth", "rivals")
    return {method: lookups.point(rivals[method]["memory"] / rivals["exact"]["memory"]) for method in DEEP}


def _megabytes_to_learn(context: Context) -> Cases:
    # Those that did not get there stopped before they had sent what would refute the claim.
    rows = made(context, "traffic", "rows")
    arrivals = {method: row["arrival"] for method, row in rows.items() if method.startswith(FORWARD)}
    unknown = Interval(math.nan, math.inf, math.nan)
    return {method: value if math.isfinite(value.high) else unknown for method, value in arrivals.items()}


def _bytes_of_a_number(context: Context) -> Cases:
    sent, gradient = made(context, "scaling", "most"), made(context, "scaling", "gradient")
    return {name.removeprefix("FG-RANK1, "): lookups.point(of / gradient) for name, of in sent.items()}


CLAIMS = [
    Claim(
        f"{AVOIDED}, abstract",
        f"At comparable memory, {CHECKPOINTED} is more accurate, by up to {QUOTED['accuracy']} %.",
        "test accuracy ahead by [points], after the same time",
        _under_budget("accuracy"),
        above(0),
        {"holds": "a few numbers about the gradient a step are not enough", "partly": "it depends on the tangents"},
    ),
    Claim(
        f"{AVOIDED}, abstract",
        f"It converges faster, by up to {QUOTED['convergence']} %.",
        "its time to the best test loss of the other method, over the other's",
        _under_budget("time"),
        below(1),
        {"holds": "it needs far fewer steps", "partly": "it depends on the tangents"},
    ),
    Claim(
        f"{AVOIDED}, abstract",
        f"It takes fewer computations, by a factor of up to {QUOTED['computations']}.",
        f"time of a step over that of {CHECKPOINTED}, at the greatest depth",
        _time_at_depth,
        above(1),
        {
            "fails": "a step costs less; it is their number that costs more",
            "partly": "two losses with new random numbers cost more, a pass with rank-one tangents less",
        },
    ),
    Claim(
        f"{AVOIDED}, abstract",
        "Its memory is comparable to that of methods without a backward pass.",
        f"memory above the parameters over that of {CHECKPOINTED}, at the greatest depth",
        _memory_at_depth,
        within(0.5, 2),
        {"holds": "within a factor of two", "partly": "within a factor of two", "fails": "they need less than half"},
    ),
    Claim(
        f"{DIMENSION_FREE}, abstract",
        f"A worker need exchange only around {QUOTED['megabytes']} MB in total.",
        f"what a worker sends until a training loss of {LEARNED} [MB], processes that exchange derivatives",
        _megabytes_to_learn,
        below(2 * QUOTED["megabytes"]),
        {
            "holds": "less than twice that",
            "partly": "with several tangents; with one, not every training got there in the steps it had",
            "fails": "there are too many steps",
            "inconclusive": "not every training got there in the steps it had",
        },
    ),
    Claim(
        f"{DIMENSION_FREE}, title",
        "What is sent in a step does not grow with the number of parameters.",
        "bytes that a worker sends in a step, over those of a gradient",
        _bytes_of_a_number,
        below(0.001),
        {"holds": "the derivatives and the loss, whatever the network"},
    ),
]
