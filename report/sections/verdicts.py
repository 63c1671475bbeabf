"""How a published claim is judged: its cases with their intervals, a rule that was set before, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from fwdlib.statistics import Interval
from report import wording

Cases = dict[str, Interval]  # case -> what was measured; the one case of a claim that has no others is called ""
VERDICTS = {
    "holds": "holds",
    "partly": "holds",
    "fails": "does not hold",
    "inconclusive": "inconclusive",
    "not measured": "not measured here",
}


class NotMeasuredError(Exception):
    """The study that a claim needs was not made, or not that part of it."""


class ClaimError(Exception):
    """A claim cannot be judged because the context does not have what it looks up."""


# --- rules -----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """When an interval makes a claim hold, and when it refutes it; where it does neither, the case is inconclusive."""

    words: str
    holds: Callable[[Interval], bool]
    fails: Callable[[Interval], bool]


POINTS, TIMES = 0.2, 0.05
"""Differences that do not matter: of accuracy, in points, and of a ratio of times or of iterations."""


def below(bound: float, words: str = "", margin: float = 0.0) -> Rule:
    """Return the rule that the interval is below ``bound``. The claim also fails if all of it is within a margin."""
    words = words or f"below {_with_margin(bound, margin)}"
    return Rule(words, lambda i: i.high < bound, lambda i: i.low >= bound or _is_equal(i, bound, margin))


def above(bound: float, margin: float = 0.0) -> Rule:
    """Return the rule that the interval is above ``bound``. The claim also fails if all of it is within a margin."""
    words = f"above {_with_margin(bound, margin)}"
    return Rule(words, lambda i: i.low > bound, lambda i: i.high <= bound or _is_equal(i, bound, margin))


def _is_equal(value: Interval, bound: float, margin: float) -> bool:
    return bound - margin <= value.low and value.high <= bound + margin


def _with_margin(bound: float, margin: float) -> str:
    return f"{bound:g} (±{margin:g} is equal)" if margin else f"{bound:g}"


def within(low: float, high: float) -> Rule:
    """Return the rule that the whole interval is between two bounds. The claim fails if the interval is outside."""
    return Rule(
        f"from {low:g} to {high:g}",
        lambda i: low <= i.low and i.high <= high,
        lambda i: i.high < low or i.low > high,
    )


def compatible(value: float) -> Rule:
    """Return the rule that the interval contains ``value``."""
    return Rule(f"contains {value:g}", lambda i: i.low <= value <= i.high, lambda i: not i.low <= value <= i.high)


# --- judging ---------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What somebody published, in our words, and how it is judged."""

    source: str
    """A citation, and the place in it."""
    text: str
    measure: str
    """What the numbers are."""
    cases: Callable[[dict[str, Any]], Cases]
    """From the page's context. Raises :class:`NotMeasuredError`, or returns no case, if the study was not made."""
    rule: Rule
    reasons: dict[str, str]
    """Outcome -> the reason in one line."""
    form: Callable[[float], str] = wording.number


class Finding(NamedTuple):
    """A claim and its verdict, as the page prints them."""

    claim: Claim
    cases: dict[str, tuple[str, str]]
    """Case -> the interval as text, and ``"holds"``, ``"fails"`` or ``"inconclusive"``."""
    outcome: str
    """One of ``VERDICTS``; ``"partly"`` if only some of the cases hold."""
    verdict: str
    """In words."""
    reason: str
    more_seeds: float | None = None
    """Of an inconclusive one: how many times as many seeds or rounds would decide a case, if the estimates stay."""


def judge(claim: Claim, context: dict[str, Any]) -> Finding:
    """Return the verdict on a claim.

    Raises:
        ClaimError: if the context lacks something that the claim looks up; the message names both.
    """
    try:
        measured = claim.cases(context)
    except NotMeasuredError:
        measured = {}
    except (LookupError, TypeError, AttributeError) as error:
        raise ClaimError(
            f"cannot judge the claim {claim.text!r} ({claim.source}): looking up its numbers in the page's context "
            f"raised {error!r}. A section must give every key, with None for what was not measured."
        ) from error
    outcomes = {case: _outcome(claim.rule, value) for case, value in measured.items()}
    found = set(outcomes.values())
    if not found:
        outcome = "not measured"
    elif len(found) == 1:
        (outcome,) = found
    else:
        outcome = "partly" if "holds" in found else "fails"
    verdict = VERDICTS[outcome]
    if len(found) > 1:
        decisive = "holds" if outcome == "partly" else "fails"
        verdict += f" for {wording.enumerated(case for case, one in outcomes.items() if one == decisive)}"
    cases = {case: (wording.interval(value, claim.form), outcomes[case]) for case, value in measured.items()}
    finite = [value for value in measured.values() if all(map(math.isfinite, value))]
    factors = [more_seeds(claim.rule, value) for value in finite] if outcome == "inconclusive" else []
    return Finding(claim, cases, outcome, verdict, claim.reasons.get(outcome, ""), min(factors, default=None))


def more_seeds(rule: Rule, value: Interval) -> float:
    """Return how many times as many seeds it would take until an interval decides, infinite if more than a thousand.

    The estimate stays where it is, and both ends come closer to it like one over the root of the number of seeds.

    Args:
        rule: that the interval does not decide now.
        value: the interval.

    Example:
        >>> more_seeds(below(1.0), Interval(0.5, 0.9, 1.1))
        5
    """
    for factor in range(2, 1001):
        ends = (value.estimate + (end - value.estimate) / math.sqrt(factor) for end in value)
        if _outcome(rule, Interval(*ends)) != "inconclusive":
            return factor
    return math.inf


def _outcome(rule: Rule, value: Interval) -> str:
    if math.isnan(value.low) or math.isnan(value.high):
        return "inconclusive"
    return "holds" if rule.holds(value) else "fails" if rule.fails(value) else "inconclusive"


def made(found: Any, *keys: Any) -> Any:
    """Return ``found[key]`` for each key in turn.

    Raises:
        NotMeasuredError: if one of them gives None: it was not measured.
        KeyError: if one is missing.
    """
    for key in keys:
        found = found[key]
        if found is None:
            raise NotMeasuredError(key)
    return found
