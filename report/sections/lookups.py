"""Where the numbers are that decide the claims: lookups in the context of the page, and arithmetic with intervals.

A lookup gives the cases of a claim, or is a function of the context that gives them. It raises
:class:`report.sections.verdicts.NotMeasuredError` where the study was not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fwdlib.statistics import Interval, difference_by_seed
from report.sections.feedback import LARGE
from report.sections.verdicts import Cases, NotMeasuredError, made

Context = dict[str, Any]
Lookup = Callable[[Context], Cases]


def step(model: str) -> Lookup:
    """Give the time of a step at the published settings over backprop's, as the course times it."""
    return lambda c: {"": c["tasks"][model]["ratios"]["step"]}


def ratio(model: str, name: str) -> Lookup:
    """Give ``"iterations"`` or ``"total"``: a ratio of all the trainings at the published settings."""
    return lambda c: {"": row_of(c, model, None)[name]}


def model_of(context: Context, name: str) -> dict[str, Any]:
    """Return one of the three models of the section on protocols.

    Raises:
        NotMeasuredError: if it was not measured.
    """
    protocols = made(context, "protocols")
    if name in protocols["missing"]:
        raise NotMeasuredError(name)
    return protocols["models"][name]


def row_of(context: Context, model: str, departure: str | None) -> dict[str, Any]:
    """Return the row of a departure of the published code, None for the text's form."""
    return {row["departure"]: row for row in model_of(context, model)["published"]}[departure]


def against(context: Context, model: str) -> dict[str, Any]:
    """Return forward gradients beside backprop, each at its best learning rate."""
    return model_of(context, model)["fair"]["forward gradient"]["against"]


def fair_totals(context: Context) -> Cases:
    """Give the time of a training over backprop's, each at its best learning rate, for models with a threshold."""
    return {model_of(context, name)["title"].lower(): against(context, name)["total"] for name in ("logistic", "mlp")}


def fair_quotient(context: Context) -> Cases:
    """Give this ratio of the multilayer network over that of logistic regression."""
    return {"": quotient(*(against(context, model)["total"] for model in ("mlp", "logistic")))}


def statements(name: str, models: tuple[str, ...]) -> Lookup:
    """Give a mean over draws of each model."""

    def cases(context: Context) -> Cases:
        found = [model_of(context, model) for model in models]
        return {m["title"].lower(): mean(m["statements"][name]) for m in found}

    return cases


def apart(context: Context) -> Cases:
    """Give the factor between the times of a training, of the multilayer network over logistic regression."""
    return {"": quotient(*(either_way(row_of(context, model, None)["total"]) for model in ("mlp", "logistic")))}


def behind_backprop(mode: str, titles: Sequence[str] | None = None) -> Lookup:
    """Give by how many points of test accuracy a mode is behind backprop.

    Args:
        mode: one of those whose distance the section gives.
        titles: of the tasks; None for all of which this mode and backprop were trained.
    """

    def cases(context: Context) -> Cases:
        found = {study["title"]: study["behind"].get(mode) for study in made(context, "feedback", "studies")}
        return {title: gap for title, gap in found.items() if gap and (titles is None or title in titles)}

    return cases


def accuracy_gap(better: str, worse: str, titles: Sequence[str] = (LARGE,)) -> Lookup:
    """Give by how many points of test accuracy one mode is ahead of another.

    Args:
        better: a mode.
        worse: another.
        titles: of the tasks; those where both modes were trained count.
    """

    def cases(context: Context) -> Cases:
        found = made(context, "feedback")
        studies = {study["title"]: study for study in found["studies"]}
        gaps = {}
        for title in titles:
            if title in found["missing"] or {better, worse} & set(studies[title]["missing"]):
                continue
            gaps[title] = difference_by_seed(*(studies[title]["rows"][mode]["accuracies"] for mode in (better, worse)))
        if not gaps:
            raise NotMeasuredError(" or ".join(titles))
        return gaps if len(titles) > 1 else {"": gaps[titles[0]]}

    return cases


def benches(name: str) -> Lookup:
    """Give a ratio of a step for each model of the bench."""
    return lambda c: {m["title"]: m[name] for m in made(c, "cost", "bench")}


def depth_memory(context: Context) -> Cases:
    """Give the memory of a step of the deepest network over backprop's."""
    depth = made(context, "cost", "depth")
    methods = {"textbook's forward gradient": "forward_gradient", "rank-one": "rank_one"}
    of_backprop = made(depth, "backprop", "memory")
    return {name: point(made(depth, key, "memory") / of_backprop) for name, key in methods.items()}


def functions(of: Callable[[dict[str, Any]], Interval]) -> Lookup:
    """Give what ``of`` makes of each row of the section on test functions."""
    return lambda c: {row["title"]: of(row) for row in made(c, "functions", "rows")}


def last_falls(form: str) -> Lookup:
    """Give the factor by which the Frank-Wolfe gap falls in the last decade of steps, optimum on the surface."""

    def fall(row: dict[str, Any]) -> Interval:
        return point(float("inf")) if row["solved"] else row["falls"][-1]

    return lambda c: {f"{b} ball": fall(r["outside"][form]) for b, r in made(c, "frank_wolfe", "rows").items()}


def processes(name: str, titles: Sequence[str]) -> Lookup:
    """Give the time of compiled forward mode over a method's, on processes by their titles, where it was measured."""

    def cases(context: Context) -> Cases:
        found = made(context, "sensitivity", "by_title")
        measured = {title: found[title] for title in titles if found[title] is not None}
        return {title: row["over"][name] for title, row in measured.items() if row["over"][name] is not None}

    return cases


def process_memory(method: str, titles: Sequence[str]) -> Lookup:
    """Give a method's memory at the most steps over that at the fewest."""

    def cases(context: Context) -> Cases:
        found = made(context, "sensitivity", "growth")
        return {title: found[title][method] for title in titles if found[title][method] is not None}

    return cases


# --- arithmetic with intervals ---------------------------------------------------------------------------------------


def point(value: float) -> Interval:
    """Return a number as an interval."""
    return Interval(value, value, value)


def difference(first: Interval, second: Interval) -> Interval:
    """Return the difference of two independent estimates: the half widths add in squares."""
    middle = first.estimate - second.estimate
    less = math.hypot(first.estimate - first.low, second.high - second.estimate)
    more = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(middle - less, middle, middle + more)


def quotient(first: Interval, second: Interval) -> Interval:
    """Return the quotient of two independent positive estimates: the difference of their logarithms."""
    logs = (Interval(*(math.log(end) if end else -math.inf for end in ratio)) for ratio in (first, second))
    return Interval(*(math.exp(end) for end in difference(*logs)))


def either_way(ratio: Interval) -> Interval:
    """Return by what factor two times are apart, whichever is longer: 1 or more."""
    return Interval(*sorted(max(end, 1 / end) if end else math.inf for end in ratio))


def mean(values: list[float]) -> Interval:
    """Return the 95 % interval of a mean, given as mean and standard error."""
    middle, error = values
    return Interval(middle - 1.96 * error, middle, middle + 1.96 * error)


def share(count: int, number: int) -> Interval:
    """Return a share in percent with its exact binomial interval."""
    from scipy.stats import binomtest  # a second to import

    found = binomtest(count, number).proportion_ci()
    return Interval(100 * found.low, 100 * count / number, 100 * found.high)
