"""Published claims, one by one: what was measured here, and the verdict that follows from it by a stated rule.

A claim names the numbers that decide it, intervals out of what :func:`report.page.context.context` gives, one for each case
in which it can be judged; and a rule, a bound that the whole interval must be on one side of. The verdict is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from scipy.stats import binomtest

from fwdlib.statistics import Interval
from report import wording

Cases = dict[str, Interval]  # case -> what was measured; "" where there is but one


class Rule(NamedTuple):
    """When an interval makes a claim hold, and when it refutes it; in neither case it cannot be told."""

    words: str
    holds: Callable[[Interval], bool]
    fails: Callable[[Interval], bool]


def below(bound: float, words: str = "") -> Rule:
    """Return the rule that the whole interval is below ``bound``."""
    return Rule(words or f"below {bound:g}", lambda i: i.high < bound, lambda i: i.low >= bound)


def above(bound: float, words: str = "") -> Rule:
    """Return the rule that the whole interval is above ``bound``."""
    return Rule(words or f"above {bound:g}", lambda i: i.low > bound, lambda i: i.high <= bound)


def within(low: float, high: float) -> Rule:
    """Return the rule that the whole interval is between two bounds; it fails where it is outside of them."""
    return Rule(
        f"from {low:g} to {high:g}",
        lambda i: low <= i.low and i.high <= high,
        lambda i: i.high < low or i.low > high,
    )


def compatible(value: float) -> Rule:
    """Return the rule that the interval contains ``value``."""
    return Rule(f"contains {value:g}", lambda i: i.low <= value <= i.high, lambda i: not i.low <= value <= i.high)


class Claim(NamedTuple):
    """What somebody published, in our words, and how it is judged."""

    source: str
    """A citation, and where in it."""
    text: str
    measure: str
    """What the numbers are."""
    cases: Callable[[dict[str, Any]], Cases]
    """From the context of the page; what is not there raises KeyError, TypeError or StopIteration."""
    rule: Rule
    reasons: dict[str, str]
    """Verdict (``"holds"``, ``"fails"``, ``"partly"``, ``"unclear"``) -> the reason in one line."""
    form: Callable[[float], str] = wording.number


class Finding(NamedTuple):
    """A claim and its verdict, as the page prints them."""

    claim: Claim
    cases: dict[str, tuple[str, str]]
    """Case -> the interval as text, and ``"holds"``, ``"fails"`` or ``"unclear"``."""
    outcome: str
    """``"holds"``, ``"fails"``, ``"partly"`` or ``"unclear"``."""
    verdict: str
    """In words."""
    reason: str


VERDICTS = {"holds": "holds", "partly": "holds", "fails": "does not hold", "unclear": "cannot be told"}


def judge(claim: Claim, context: dict[str, Any]) -> Finding | None:
    """Return the verdict on a claim, None where what decides it was not measured.

    Args:
        claim: one of ``CLAIMS``.
        context: as :func:`report.page.context.context` returns it.
    """
    try:
        measured = claim.cases(context)
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):
        return None
    outcomes = {case: _outcome(claim.rule, value) for case, value in measured.items()}
    found = set(outcomes.values())
    outcome = found.pop() if len(found) == 1 else "partly" if "holds" in found else "fails"
    verdict = VERDICTS[outcome]
    if len(set(outcomes.values())) > 1:
        decisive = "holds" if outcome == "partly" else "fails"
        verdict += f" for {wording.enumerated(case for case, one in outcomes.items() if one == decisive)}"
    cases = {case: (wording.interval(value, claim.form), outcomes[case]) for case, value in measured.items()}
    return Finding(claim, cases, outcome, verdict, claim.reasons.get(outcome, ""))


def _outcome(rule: Rule, value: Interval) -> str:
    if math.isnan(value.low) or math.isnan(value.high):
        return "unclear"
    return "holds" if rule.holds(value) else "fails" if rule.fails(value) else "unclear"


def findings(context: dict[str, Any]) -> list[Finding]:
    """Return the verdicts on all claims that can be judged.

    Args:
        context: as :func:`report.page.context.context` returns it.
    """
    return [found for claim in CLAIMS if (found := judge(claim, context))]


# --- where the numbers are -------------------------------------------------------------------------------------------


def _ratio(model: str, name: str) -> Callable[[dict[str, Any]], Cases]:
    return lambda c: {"": c["tasks"][model]["ratios"][name]}


def _row(context: dict[str, Any], model: str, departure: str | None) -> dict[str, Any]:
    return next(row for row in context["protocols"]["models"][model]["published"] if row["departure"] == departure)


def _fair_totals(context: dict[str, Any]) -> Cases:
    models = context["protocols"]["models"]
    return {
        m["title"].lower(): m["fair"]["forward gradient"]["against"]["total"] for m in models.values() if m["threshold"]
    }


def _accuracy_gaps(better: str, worse: str, task: str = "MNIST, 2 x 800") -> Callable[[dict[str, Any]], Cases]:
    def cases(context: dict[str, Any]) -> Cases:
        study = next(study for study in context["feedback"]["studies"] if study["title"] == task)
        return {"": _difference(study["rows"][better]["accuracy"], study["rows"][worse]["accuracy"])}

    return cases


def _difference(first: Interval, second: Interval) -> Interval:
    # Of two independent means; their half widths add in squares.
    middle = first.estimate - second.estimate
    below_ = math.hypot(first.estimate - first.low, second.high - second.estimate)
    above_ = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(middle - below_, middle, middle + above_)


def _mean(values: list[float]) -> Interval:
    mean, error = values
    return Interval(mean - 1.96 * error, mean, mean + 1.96 * error)


def _share(count: int, number: int) -> Interval:
    found = binomtest(count, number).proportion_ci()
    return Interval(100 * found.low, 100 * count / number, 100 * found.high)


def _point(value: float) -> Interval:
    return Interval(value, value, value)


def _relative_distance(context: dict[str, Any]) -> Cases:
    # How far the times of a training are apart, by what factor either way, of the MLP over the logistic regression's.
    apart = []
    for model in ("mlp", "logistic"):
        ends = sorted(abs(math.log(end)) for end in context["tasks"][model]["ratios"]["total"])
        apart.append(Interval(*ends))
    mlp, logistic = apart
    return {"": Interval(*(math.exp(x) for x in _difference(mlp, logistic)))}


def _benches(name: str) -> Callable[[dict[str, Any]], Cases]:
    return lambda c: {m["title"]: m[name] for m in c["cost"]["bench"]}


SEED, PAPER, FRAMEWORK = "[@predecessors2023]", "[@baydin2022]", "[@bouvet2019]"
FDFA, SEVERAL, FRANK_WOLFE = "[@bacho2024]", "[@fluegel2024]", "[@rostami2024]"
OVER = "forward gradient over backprop"

CLAIMS = [
    Claim(
        f"{SEED}, logistic regression",
        "A training takes much less time with forward gradients.",
        f"time of a training, {OVER}",
        lambda c: {
            "as the text says": _row(c, "logistic", None)["total"],
            "backprop's step 0.01 in place of 0.2": _row(c, "logistic", "step of 0.01")["total"],
            "standardised tangents": _row(c, "logistic", "standardised tangents")["total"],
            "their timer": _row(c, "logistic", "their timer")["total"],
        },
        below(1),
        {
            "fails": "at the same learning rate the iterations are as many, and each takes longer",
            "partly": "the code stepped backprop by a twentieth of what the text says",
        },
    ),
    Claim(
        f"{SEED}, logistic regression",
        "It takes fewer iterations.",
        f"number of iterations, {OVER}",
        _ratio("logistic", "iterations"),
        below(1),
        {"unclear": "they are equal but for the noise of the seeds", "fails": "they are not fewer"},
    ),
    Claim(
        f"{SEED}, logistic regression",
        "Each iteration takes longer.",
        f"time of an iteration, {OVER}",
        _ratio("logistic", "step"),
        above(1),
        {"holds": "two jvps, one for each tensor, through a model in which calls cost more than arithmetic"},
    ),
    Claim(
        f"{SEED}, multilayer network",
        "A training takes fewer iterations with forward gradients.",
        f"number of iterations, {OVER}",
        _ratio("mlp", "iterations"),
        below(1),
        {
            "unclear": "one run each was compared; the seeds differ by more than the methods",
            "holds": "noise helps here, where the rate is small",
            "fails": "they are not fewer",
        },
    ),
    Claim(
        f"{SEED}, multilayer network",
        "Each iteration takes longer.",
        f"time of an iteration, {OVER}",
        _ratio("mlp", "step"),
        above(1),
        {"holds": "six jvps, one for each tensor, against one pass back"},
    ),
    Claim(
        f"{SEED}, multilayer network",
        "The whole training takes longer.",
        f"time of a training, {OVER}",
        _ratio("mlp", "total"),
        above(1),
        {"holds": "about as many iterations, each of them longer"},
    ),
    Claim(
        f"{SEED}, multilayer network",
        "The times of the two trainings differ less than for logistic regression.",
        "factor between the times, of the multilayer network over logistic regression",
        _relative_distance,
        below(1),
        {"fails": "their own numbers say the opposite, too: 16 times against 2.9 times"}
        | dict.fromkeys(["unclear"], "their own numbers say the opposite: 16 times against 2.9 times"),
    ),
    Claim(
        f"{SEED}, multilayer network",
        "Backprop classifies 97.6 % of the test set rightly.",
        "test accuracy [%], backprop",
        lambda c: {
            "trained on the training set": _row(c, "mlp", None)["backprop"]["accuracy"],
            "trained on the test set": _row(c, "mlp", "trained on the test set")["backprop"]["accuracy"],
        },
        above(97),
        {"fails": "the accuracy was that of the data it was trained on", "partly": "it was trained on the test set"},
    ),
    Claim(
        f"{SEED}, CNN",
        "Each iteration of backprop takes longer.",
        f"time of an iteration, {OVER}",
        lambda c: {
            "one step each": c["tasks"]["cnn"]["ratios"]["step"],
            "their code": c["protocols"]["models"]["cnn"]["their_step"],
        },
        below(1),
        {
            "holds": "and in their code for another reason: an iteration of backprop was 499 steps",
            "partly": "their iteration of backprop was 499 steps",
        },
    ),
    Claim(
        f"{SEED}, CNN",
        "The accuracy is higher with backprop.",
        "backprop ahead by [points]",
        lambda c: {
            "as the text says": _row(c, "cnn", None)["accuracy_gap"],
            "499 steps of Adam an iteration": _row(c, "cnn", "Adam, one image a step")["accuracy_gap"],
            "each at its best rate": c["protocols"]["models"]["cnn"]["fair"]["forward gradient"]["against"][
                "accuracy_gap"
            ],
        },
        above(0),
        {
            "partly": "at the published rate neither moves; the 499 steps of Adam made the difference",
            "holds": "a forward gradient of so many parameters is noise for the most part",
        },
    ),
    Claim(
        f"{SEED}, CNN",
        "The loss is lower with backprop.",
        "training loss, forward less backprop [nats]",
        lambda c: {
            "as the text says": _row(c, "cnn", None)["loss_gap"],
            "each at its best rate": c["protocols"]["models"]["cnn"]["fair"]["forward gradient"]["against"]["loss_gap"],
        },
        above(0),
        {"holds": "theirs compared two different losses, though", "partly": "theirs compared two different losses"},
        partial(wording.number, infinite="not finite"),
    ),
    Claim(
        f"{SEED}, CNN",
        "With forward gradients the results are very poor.",
        "test accuracy [%] of 10 classes",
        lambda c: {
            "forward gradient": _row(c, "cnn", None)["forward"]["accuracy"],
            "backprop, the same settings": _row(c, "cnn", None)["backprop"]["accuracy"],
        },
        below(20, "below 20, twice that of guessing"),
        {"holds": "so are backprop's: it is the learning rate, 100 steps of 0.001", "partly": "at the same settings"},
    ),
    Claim(
        f"{SEED}, conclusions",
        "Forward gradients are the better option in simple models.",
        f"time of a training, {OVER}, each at its best learning rate",
        _fair_totals,
        below(1),
        {"fails": "a tuned backprop takes larger steps, and fewer"},
    ),
    Claim(
        f"{SEED}, conclusions",
        "They do worse as complexity increases.",
        "time of a training over backprop's, of the multilayer network over logistic regression",
        lambda c: {"": _quotient(*[_fair_totals(c)[t] for t in ("multilayer perceptron", "logistic regression")])},
        above(1),
        {"holds": "the noise grows with the number of parameters", "fails": "not between these two"},
    ),
    Claim(
        f"{SEED}, method",
        "The components of the tangents are independent, with mean zero and variance one.",
        "mean product of two components of a tensor's tangent, as the code makes them",
        lambda c: {
            m["title"].lower(): _mean(m["statements"]["mean product of two standardised components"])
            for key, m in c["protocols"]["models"].items()
            if key != "cnn"
        },
        compatible(0),
        {"fails": "they were standardised over the sample: it is -1/n, and the mean of a gradient is lost"},
    ),
    Claim(
        f"{SEED}, method; [@baydin2022], abstract",
        "The forward gradient is an unbiased estimate of the gradient.",
        "length of the mean estimate along the gradient, in units of the gradient's",
        lambda c: {
            m["title"].lower(): _mean(m["statements"]["length of the mean estimate along the gradient"])
            for m in c["protocols"]["models"].values()
        },
        compatible(1),
        {"holds": "by construction, for tangents that are not standardised"},
    ),
    Claim(
        f"{SEED}, use of the method",
        "Beale's, Rosenbrock's and the sphere function cannot be used: the method diverges.",
        "seeds that do not get below the threshold at the paper's settings [%]",
        lambda c: {
            row["title"]: _share(row["num_seeds"] - row["arrived"], row["num_seeds"]) for row in c["functions"]["rows"]
        },
        above(50),
        {"fails": "they are functions of a point, not objectives of a network"},
    ),
    Claim(
        f"{PAPER}, abstract",
        "It can be evaluated in a single forward run, at a small constant times its cost: 1 to 3.",
        "R~f~ of a textbook forward gradient, K = 1",
        _benches("textbook_over_plain"),
        within(1, 3),
        {
            "fails": "PyTorch's forward mode takes longer than theory",
            "partly": "small models pay for calls, large ones for drawing a number for each parameter",
        },
    ),
    Claim(
        f"{PAPER}, section 2",
        "Backprop costs 5 to 10 evaluations.",
        "R~b~, eager",
        _benches("eager_over_plain"),
        within(5, 10),
        {"fails": "reverse mode in PyTorch is cheaper than that", "partly": "it depends on the model, and can be less"},
    ),
    Claim(
        f"{PAPER}, abstract",
        "Forward gradients save a substantial part of the computation.",
        "time of a step, textbook's forward gradient over the fastest backprop",
        _benches("textbook"),
        below(1),
        {"fails": "a jvp costs as many products as backprop, and a random number for each parameter"},
    ),
    Claim(
        f"{PAPER}, abstract; here with structured tangents",
        "The same, with rank-one tangents in one stacked pass.",
        "time of a step, rank-one over the fastest backprop",
        lambda c: {m["title"]: m["structured"]["rank-one"]["ratio"] for m in c["cost"]["bench"]},
        below(1),
        {"holds": "a third of the products falls away, and with it nearly all random numbers"},
    ),
    Claim(
        f"{PAPER}, abstract",
        "Training is up to twice as fast in some cases.",
        f"time of a training, {OVER}",
        lambda c: {
            **{f"{m['title'].lower()}, as published": m["ratios"]["total"] for m in c["tasks"].values()},
            **{f"{case}, each at its best rate": value for case, value in _fair_totals(c).items()},
        },
        below(0.5),
        {
            "fails": "in none of our trainings to a given loss",
            "partly": "where a step is faster and the learning rate too small for either to get anywhere",
        },
    ),
    Claim(
        f"{PAPER}, figure 6",
        "At 100 layers of width 1024 a step still takes less time than backprop's.",
        "time of a step, textbook's forward gradient over backprop, eager",
        lambda c: {"": c["cost"]["depth"]["forward_gradient"]["ratio"]},
        below(1),
        {"fails": "with differentiation code of their own it took 0.84 of it"},
    ),
    Claim(
        f"{PAPER}, figure 6",
        "Memory is practically the same.",
        "memory above the parameters at 100 layers, over backprop's",
        lambda c: {
            name: _point(c["cost"]["depth"][key]["memory"] / c["cost"]["depth"]["backprop"]["memory"])
            for name, key in (("textbook's forward gradient", "forward_gradient"), ("rank-one", "rank_one"))
        },
        within(0.9, 1.1),
        {"fails": "forward mode keeps no activations; written out, tangent and gradient take memory all the same"},
    ),
    Claim(
        f"{PAPER}, figure 2",
        "On Beale's and Rosenbrock's function forward gradients get as far as backprop, to below 0.001.",
        "seeds that get there [%]",
        lambda c: {row["title"]: _share(row["arrived"], row["num_seeds"]) for row in c["functions"]["rows"]},
        above(50),
        {"holds": "in two dimensions there is little noise"},
    ),
    Claim(
        f"{PAPER}, figure 2",
        "There they take less time than backprop.",
        f"time of a step, {OVER}",
        lambda c: {row["title"]: row["ratio"] for row in c["functions"]["rows"]},
        below(1),
        {"fails": "PyTorch's forward mode has more overhead for each call than its backward pass"},
    ),
    Claim(
        f"{SEVERAL}, abstract",
        "The projection improves on the mean of several tangents.",
        "last value above the minimum, projection over mean, K = 16, largest n",
        lambda c: {p["title"]: _point(p["ratios"][16]) for p in c["tangents"]["projection"]},
        below(0.9, "below 0.9"),
        {
            "partly": "for K far below n the directions are nearly the same",
            "fails": "for K far below n only the lengths differ, and the learning rate mends that",
        },
    ),
    Claim(
        f"{FRANK_WOLFE}, abstract",
        "Frank-Wolfe with plain forward gradients does not converge to the optimum.",
        "factor by which the gap falls in the last decade of steps, optimum on the surface",
        lambda c: {f"{ball} ball": r["outside"]["plain"]["falls"][-1] for ball, r in c["frank_wolfe"]["rows"].items()},
        below(1.1, "below 1.1"),
        {"holds": "a vertex does not depend on the length of a direction, so the noise does not average out"},
    ),
    Claim(
        f"{FRANK_WOLFE}, abstract",
        "With averaged directions it does.",
        "the same factor",
        lambda c: {
            f"{ball} ball": r["outside"]["averaged"]["falls"][-1] for ball, r in c["frank_wolfe"]["rows"].items()
        },
        above(1.1, "above 1.1"),
        {"holds": "the average forgets the noise faster than the gradient changes"},
    ),
    Claim(
        FRAMEWORK,
        "A framework written from scratch trains in about PyTorch's time.",
        "time of the steps, ours over PyTorch's",
        lambda c: {
            f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}": next(iter(row["ratios"].values()))
            for row in c["scratch"]["times"]
        },
        below(1.1, "below 1.1"),
        {"holds": "on a net so small it is PyTorch's overhead that counts"},
    ),
    Claim(
        FRAMEWORK,
        "It reaches PyTorch's accuracy.",
        "test accuracy [%], ours less PyTorch's, the same settings",
        lambda c: {
            row["settings"]: _difference(row["ours"]["tinynet"]["accuracy"], row["ours"]["PyTorch"]["accuracy"])
            for row in c["scratch"]["accuracies"]
        },
        within(-1, 1),
        {"holds": "from the same parameters over the same batches it takes the same steps"},
    ),
    Claim(
        FRAMEWORK,
        "It needs many more epochs than PyTorch for reasons that could not be tracked down.",
        "epochs to the goal, layers' gradients divided by the batch size over not divided",
        lambda c: {
            "Xavier's parameters": c["scratch"]["factors"]["division_xavier"],
            "PyTorch's": c["scratch"]["factors"]["division"],
        },
        above(1),
        {"holds": "the linear layer divided its gradient by the batch size, on top of a loss that sums"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA trains nearly as well as backprop.",
        "test accuracy, backprop ahead by [points]",
        lambda c: {s["title"]: s["behind"] for s in c["feedback"]["studies"] if s["behind"]},
        below(1),
        {"holds": "its feedback learns the mean Jacobian"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA is better than feedback that is random and fixed.",
        "test accuracy, FDFA ahead of DFA by [points], MNIST",
        _accuracy_gaps("FDFA", "DFA"),
        above(0),
        {"unclear": "on two hidden layers with BatchNorm DFA is as good", "fails": "not here"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA is better than the feedback of Kolen and Pollack.",
        "test accuracy, FDFA ahead of DKP by [points], MNIST",
        _accuracy_gaps("FDFA", "DKP"),
        above(0),
        {"unclear": "three seeds do not tell them apart", "fails": "not here"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA is far better than forward gradients of the weights.",
        "test accuracy, FDFA ahead of FG by [points], MNIST",
        _accuracy_gaps("FDFA", "FG"),
        above(1),
        {"holds": "its noise is averaged over steps, and is not in the gradient"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA is far better than forward gradients of the activities.",
        "test accuracy, FDFA ahead of FG-A by [points], MNIST",
        _accuracy_gaps("FDFA", "FG-A"),
        above(1),
        {"holds": "likewise"},
    ),
]


def _quotient(first: Interval, second: Interval) -> Interval:
    logs = _difference(*(Interval(*(math.log(end) for end in ratio)) for ratio in (first, second)))
    return Interval(*(math.exp(end) for end in logs))
