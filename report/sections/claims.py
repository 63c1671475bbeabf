"""Published claims, one by one: which measured numbers decide each, and by which rule.

Each verdict is computed from the intervals in the context of the page, see :func:`report.sections.verdicts.judge`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fwdlib.statistics import difference_by_seed
from report import published
from report.names import AS_PUBLISHED, MODELS
from report.sections import claims_on_cost, lookups
from report.sections.feedback import CONVOLUTIONAL, LARGE, MIXER
from report.sections.verdicts import POINTS, TIMES, Claim, Finding, Rule, above, below, compatible, judge, made, within
from report.wording import number


def _published_apart(model: str) -> str:
    # By what factor the two published times of a training are apart.
    seconds = [THEIRS[model][method]["total_seconds"] for method in ("forward", "backprop")]
    return number(max(seconds) / min(seconds), 2)


def findings(context: dict[str, Any]) -> list[Finding]:
    """Return the verdicts on all claims.

    Args:
        context: of the page, with every section; None for a section whose study was not made.

    Raises:
        ClaimError: if the context lacks something that a claim looks up.
    """
    return [judge(claim, context) for claim in CLAIMS]


def _ratio(place: str, text: str, model: str, name: str, rule: Rule, reasons: dict[str, str]) -> Claim:
    # A claim on a ratio of the trainings at the published settings.
    measure = f"{RATIOS[name]}, {OVER}"
    lookup = lookups.step(model) if name == "step" else lookups.ratio(model, name)
    return Claim(f"{SEED}, {place}", text, measure, lookup, rule, reasons)


def _fdfa(text: str, worse: str, rule: Rule, reasons: dict[str, str]) -> Claim:
    # A claim that FDFA is more accurate than another mode.
    measure = f"test accuracy, FDFA ahead of {worse} by [points]"
    return Claim(f"{FDFA}, abstract", text, measure, lookups.accuracy_gap("FDFA", worse, MNIST), rule, reasons)


# --- the claims ------------------------------------------------------------------------------------------------------

PUBLISHED = published.load()
THEIRS, BAYDIN = PUBLISHED["predecessors"], PUBLISHED["paper"]
LOGISTIC, MLP, CNN = (THEIRS[model] for model in ("logistic", "mlp", "cnn"))
ADAM = f"{CNN['steps_per_iteration']} steps"
SEED, PAPER, FRAMEWORK = "[@predecessors2023]", "[@baydin2022]", "[@bouvet2019]"
FDFA, SEVERAL, FRANK_WOLFE = "[@bacho2024]", "[@fluegel2024]", "[@rostami2024]"
LOCAL, REN = "[@ren2022]", PUBLISHED["local_losses"]
BOTH, MNIST = (LARGE, MIXER), (LARGE, CONVOLUTIONAL)
SENSITIVITIES, HORIZONS = "[@ma2021]", "[@micaelli2021]"
HYPERGRADIENTS, ONLINE = "[@franceschi2017]", "[@zucchet2023]"
PROCESSES = PUBLISHED["processes"]
SMALL, TRAINING = "one trajectory", "hypergradients"
LAYERS = [f"{size} layer, {name}" for name in ("relu", "tanh") for size in ("small", "wide")]
OVER = "forward gradient over backprop"
RATIOS = {"iterations": "number of iterations", "step": "time of an iteration", "total": "time of a training"}

CLAIMS = [
    Claim(
        f"{SEED}, logistic regression",
        "A training takes much less time with forward gradients.",
        f"time of a training, {OVER}",
        lambda c: {
            AS_PUBLISHED: lookups.row_of(c, "logistic", None)["total"],
            f"backprop's step {LOGISTIC['learning_rate_used']} in place of {LOGISTIC['learning_rate']}": lookups.row_of(
                c, "logistic", "step of 0.01"
            )["total"],
            "standardised tangents": lookups.row_of(c, "logistic", "standardised tangents")["total"],
            "their timer": lookups.row_of(c, "logistic", "their timer")["total"],
        },
        below(1),
        {
            "fails": "at the same learning rate it takes as many iterations, and each takes longer",
            "partly": "the code stepped backprop by "
            f"1/{number(LOGISTIC['learning_rate'] / LOGISTIC['learning_rate_used'], 2)} of what the text says",
        },
    ),
    _ratio(
        "logistic regression",
        "It takes fewer iterations.",
        "logistic",
        "iterations",
        below(1, margin=TIMES),
        {"inconclusive": "they are equal up to the noise of the seeds", "fails": "they are not fewer"},
    ),
    _ratio(
        "logistic regression",
        "Each iteration takes longer.",
        "logistic",
        "step",
        above(1),
        {"holds": "two jvps, one for each tensor, through a model in which calls cost more than arithmetic"},
    ),
    _ratio(
        "multilayer network",
        "A training takes fewer iterations with forward gradients.",
        "mlp",
        "iterations",
        below(1, margin=TIMES),
        {
            "inconclusive": "one run each was compared; the seeds differ by more than the methods",
            "holds": "noise helps here, where the rate is small",
            "fails": "they are not fewer",
        },
    ),
    _ratio(
        "multilayer network",
        "Each iteration takes longer.",
        "mlp",
        "step",
        above(1),
        {"holds": "six jvps, one for each tensor, against one pass back"},
    ),
    _ratio(
        "multilayer network",
        "The whole training takes longer.",
        "mlp",
        "total",
        above(1),
        {"holds": "about as many iterations, each of them longer"},
    ),
    Claim(
        f"{SEED}, multilayer network",
        "The times of the two trainings differ less than for logistic regression.",
        "factor between the times, of the multilayer network over logistic regression",
        lookups.apart,
        below(1, margin=TIMES),
        {
            "fails": "their own numbers say the opposite, too: "
            f"{_published_apart('mlp')} times against {_published_apart('logistic')} times",
            "inconclusive": "their own numbers say the opposite: "
            f"{_published_apart('mlp')} times against {_published_apart('logistic')} times",
        },
    ),
    Claim(
        f"{SEED}, multilayer network",
        f"Backprop classifies {MLP['backprop']['accuracy']} % of the test set correctly.",
        "test accuracy [%], backprop",
        lambda c: {
            "trained on the training set": lookups.row_of(c, "mlp", None)["backprop"]["accuracy"],
            "trained on the test set": lookups.row_of(c, "mlp", "trained on the test set")["backprop"]["accuracy"],
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
            "their code": lookups.model_of(c, "cnn")["their_step"],
        },
        below(1),
        {
            "holds": f"in their code for another reason: its iteration of backprop was {ADAM}",
            "partly": f"their iteration of backprop was {ADAM}",
        },
    ),
    Claim(
        f"{SEED}, CNN",
        "The accuracy is higher with backprop.",
        "backprop ahead by [points]",
        lambda c: {
            AS_PUBLISHED: lookups.row_of(c, "cnn", None)["accuracy_gap"],
            f"{ADAM} of Adam an iteration": lookups.row_of(c, "cnn", "Adam, one image a step")["accuracy_gap"],
            "each at its best rate": lookups.against(c, "cnn")["accuracy_gap"],
        },
        above(0),
        {
            "partly": f"at the published rate neither moves; the {ADAM} of Adam made the difference",
            "holds": "with so many parameters, a forward gradient is mostly noise",
        },
    ),
    Claim(
        f"{SEED}, CNN",
        "The loss is lower with backprop.",
        "training loss, forward less backprop [nats]",
        lambda c: {
            AS_PUBLISHED: lookups.row_of(c, "cnn", None)["loss_gap"],
            "each at its best rate": lookups.against(c, "cnn")["loss_gap"],
        },
        above(0),
        {"holds": "theirs compared two different losses, though", "partly": "theirs compared two different losses"},
        partial(number, infinite="not finite"),
    ),
    Claim(
        f"{SEED}, CNN",
        "With forward gradients the results are very poor.",
        "test accuracy [%] of 10 classes",
        lambda c: {
            "forward gradient": lookups.row_of(c, "cnn", None)["forward"]["accuracy"],
            "backprop, the same settings": lookups.row_of(c, "cnn", None)["backprop"]["accuracy"],
        },
        below(20, "below 20, twice that of guessing"),
        {
            "holds": "so are backprop's: it is the learning rate, "
            f"{CNN['num_iterations']} steps of {CNN['learning_rate']}",
            "partly": "at the same settings",
        },
    ),
    Claim(
        f"{SEED}, conclusions",
        "Forward gradients are the better option in simple models.",
        f"time of a training, {OVER}, each at its best learning rate",
        lookups.fair_totals,
        below(1),
        {"fails": "a tuned backprop takes larger steps, and fewer"},
    ),
    Claim(
        f"{SEED}, conclusions",
        "They do worse as complexity increases.",
        "time of a training over backprop's, of the multilayer network over logistic regression",
        lookups.fair_quotient,
        above(1, margin=TIMES),
        {"holds": "the noise grows with the number of parameters", "fails": "not between these two"},
    ),
    Claim(
        f"{SEED}, method",
        "The components of the tangents are independent, with mean zero and variance one.",
        "mean product of two components of a tensor's tangent, as the code makes them",
        lookups.statements("mean product of two standardised components", ("logistic", "mlp")),
        compatible(0),
        {"fails": "they were standardised over the sample: it is -1/n, and the mean of a gradient is lost"},
    ),
    Claim(
        f"{SEED}, method; [@baydin2022], abstract",
        "The forward gradient is an unbiased estimate of the gradient.",
        "length of the mean estimate along the gradient, in units of the gradient's",
        lookups.statements("length of the mean estimate along the gradient", ("logistic", "mlp", "cnn")),
        compatible(1),
        {"holds": "by construction, for tangents that are not standardised"},
    ),
    Claim(
        f"{SEED}, use of the method",
        "Beale's, Rosenbrock's and the sphere function cannot be used: the method diverges.",
        "seeds that do not get below the threshold at the paper's settings [%]",
        lookups.functions(lambda row: lookups.share(row["num_seeds"] - row["arrived"], row["num_seeds"])),
        above(50),
        {"fails": "they are functions of a point, not objectives of a network"},
    ),
    Claim(
        f"{PAPER}, abstract",
        "It can be evaluated in a single forward run, at a small constant times its cost: {} to {}.".format(
            *BAYDIN["R_f_range"]
        ),
        "R~f~ of a textbook forward gradient, K = 1",
        lookups.benches("textbook_over_plain"),
        within(*BAYDIN["R_f_range"]),
        {
            "fails": "PyTorch's forward mode takes longer than theory",
            "partly": "small models pay for calls, large ones for drawing a number for each parameter",
        },
    ),
    Claim(
        f"{PAPER}, section 2",
        "Backprop costs {} to {} evaluations.".format(*BAYDIN["R_b_range"]),
        "R~b~, eager",
        lookups.benches("eager_over_plain"),
        within(*BAYDIN["R_b_range"]),
        {"fails": "reverse mode in PyTorch is cheaper than that", "partly": "it depends on the model, and can be less"},
    ),
    Claim(
        f"{PAPER}, abstract",
        "Forward gradients save a substantial part of the computation.",
        "time of a step, textbook's forward gradient over the fastest backprop",
        lookups.benches("textbook"),
        below(1),
        {"fails": "a jvp costs as many products as backprop, and a random number for each parameter"},
    ),
    Claim(
        f"{PAPER}, abstract; here with structured tangents",
        "The same, with rank-one tangents in one stacked pass.",
        "time of a step, rank-one over the fastest backprop",
        lambda c: {m["title"]: m["structured"]["rank-one"]["ratio"] for m in made(c, "cost", "bench")},
        below(1),
        {"holds": "it takes two thirds of backprop's products, and few random numbers"},
    ),
    Claim(
        f"{PAPER}, abstract",
        f"Training is up to {BAYDIN['speed_up']} times as fast in some cases.",
        f"time of a training, {OVER}",
        lambda c: {
            **{
                f"{m['title'].lower()}, as published": m["ratios"]["total"]
                for m in (c["tasks"][name] for name in MODELS)
            },
            **{f"{case}, each at its best rate": value for case, value in lookups.fair_totals(c).items()},
        },
        below(1 / BAYDIN["speed_up"]),
        {
            "fails": "in none of our trainings to a given loss",
            "partly": "where a step is faster and the learning rate too small for either to get anywhere",
        },
    ),
    Claim(
        f"{PAPER}, figure 6",
        f"At {BAYDIN['depth']['layers'][-1]} layers of width 1024 a step still takes less time than backprop's.",
        "time of a step, textbook's forward gradient over backprop, eager",
        lambda c: {"": made(c, "cost", "depth", "forward_gradient", "ratio")},
        below(1),
        {
            "fails": "with differentiation code of their own it took "
            f"{number(BAYDIN['depth']['R_f'][-1] / BAYDIN['depth']['R_b'][-1], 2)} of it"
        },
    ),
    Claim(
        f"{PAPER}, figure 6",
        "Memory is practically the same.",
        f"memory above the parameters at {BAYDIN['depth']['layers'][-1]} layers, over backprop's",
        lookups.depth_memory,
        within(0.9, 1.1),
        {"fails": "forward mode keeps no activations, but writing out tangent and gradient takes memory, too"},
    ),
    Claim(
        f"{PAPER}, figure 2",
        f"On Beale's and Rosenbrock's function forward gradients get as far as backprop, to below {BAYDIN['reached']}.",
        "seeds that get there [%]",
        lookups.functions(lambda row: lookups.share(row["arrived"], row["num_seeds"])),
        above(50),
        {"holds": "in two dimensions there is little noise"},
    ),
    Claim(
        f"{PAPER}, figure 2",
        "There they take less time than backprop.",
        f"time of a step, {OVER}",
        lookups.functions(lambda row: row["ratio"]),
        below(1),
        {"fails": "PyTorch's forward mode has more overhead for each call than its backward pass"},
    ),
    Claim(
        f"{SEVERAL}, abstract",
        "The projection improves on the mean of several tangents.",
        "last value above the minimum, projection over mean, K = 16, largest n",
        lambda c: {p["title"]: lookups.point(p["ratios"][16]) for p in made(c, "tangents", "projection")},
        below(0.9),
        {
            "partly": "for K far below n the directions are nearly the same",
            "fails": "for K far below n only the lengths differ, and the learning rate corrects that",
        },
    ),
    Claim(
        f"{FRANK_WOLFE}, abstract",
        "Frank-Wolfe with plain forward gradients does not converge to the optimum.",
        "factor by which the gap falls in the last decade of steps, optimum on the surface",
        lookups.last_falls("plain"),
        below(1.1),
        {"holds": "the step ignores the length of a direction, so the noise leaves a bias that does not fade"},
        partial(number, infinite="all of it"),
    ),
    Claim(
        f"{FRANK_WOLFE}, abstract",
        "With averaged directions it does.",
        "the same factor",
        lookups.last_falls("averaged"),
        above(1.1),
        {"holds": "the average forgets the noise faster than the gradient changes"},
        partial(number, infinite="all of it"),
    ),
    Claim(
        f"{SENSITIVITIES}, abstract",
        "On small systems of differential equations forward mode is more efficient than reverse mode.",
        f"time, compiled forward over reverse mode, {SMALL}",
        lambda c: {
            "the fastest": made(c, "sensitivity", "by_title", SMALL, "over", "fastest"),
            "eager": made(c, "sensitivity", "by_title", SMALL, "over", "eager"),
        },
        below(1),
        {
            "holds": "few tangents, and nothing is stored",
            "partly": "the paper did not compare with compiled reverse mode",
            "fails": "compiled by many steps, reverse mode is faster here",
        },
    ),
    Claim(
        f"{SENSITIVITIES}, abstract",
        "There it is more efficient than the continuous adjoint, too.",
        f"time, compiled forward mode over torchdiffeq's odeint_adjoint, {SMALL}",
        lookups.processes("adjoint", [SMALL]),
        below(1),
        {"holds": "the adjoint solves the equation twice, eagerly"},
    ),
    Claim(
        f"{SENSITIVITIES}, abstract",
        f"The border is at about {PROCESSES['ma']['size']} parameters and equations.",
        "parameters at which both modes take the same time, pendulum with a filter",
        lambda c: {
            name: lookups.point(value) for name, value in made(c, "sensitivity", "map", "borders").items() if value
        },
        within(0.3 * PROCESSES["ma"]["size"], 3 * PROCESSES["ma"]["size"]),
        {
            "holds": "within a factor of three",
            "partly": "it depends on how fast the reverse mode is",
            "fails": "it depends on how fast the reverse mode is",
        },
    ),
    Claim(
        f"{HORIZONS}, abstract",
        "The memory of hypergradients in forward mode is constant with the horizon.",
        "memory at the most steps over that at the fewest, forward mode",
        lookups.process_memory("forward", [TRAINING]),
        within(0.9, 1.1),
        {"holds": "the past is not stored", "inconclusive": "it is so small that the process's own noise shows"},
    ),
    Claim(
        HYPERGRADIENTS,
        "The memory of reverse mode grows with the number of steps.",
        "memory at the most steps over that at the fewest, plain reverse mode",
        lookups.process_memory("reverse", [TRAINING, "Lotka-Volterra"]),
        above(5),
        {"holds": "every step is stored"},
    ),
    Claim(
        HYPERGRADIENTS,
        "In forward mode it does not grow with them.",
        "the same, forward mode",
        lookups.process_memory("forward", [TRAINING, "Lotka-Volterra"]),
        within(0.9, 1.1),
        {"holds": "the past is not stored", "partly": "it is so small that the process's own noise shows"},
    ),
    Claim(
        f"{ONLINE}, abstract",
        "Exact online gradients of recurrent units that do not mix cost no more than twice an inference pass.",
        "time, forward mode over the plain process, both compiled, one layer, three parameters a unit",
        lookups.processes("plain", LAYERS),
        below(1.25 * PROCESSES["zucchet"]["factor"]),
        {
            "holds": "with three tangents in one compiled loop",
            "partly": "three tangents are more than the plain pass's share",
            "fails": "three tangents of a step are three times its arithmetic and its memory traffic",
        },
    ),
    Claim(
        FRAMEWORK,
        "A framework written from scratch trains in about PyTorch's time.",
        "time of the steps, ours over PyTorch's",
        lambda c: {
            f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}": next(iter(row["ratios"].values()))
            for row in made(c, "scratch", "times")
        },
        below(1.1),
        {"holds": "on such a small network PyTorch's overhead dominates"},
    ),
    Claim(
        FRAMEWORK,
        "It reaches PyTorch's accuracy.",
        "test accuracy [%], ours less PyTorch's, the same settings",
        lambda c: {
            row["settings"]: difference_by_seed(
                *(row["ours"][framework]["accuracies"] for framework in ("tinynet", "PyTorch"))
            )
            for row in made(c, "scratch", "accuracies")
        },
        within(-1, 1),
        {"holds": "from the same start, with the same batches, it takes the same steps"},
    ),
    Claim(
        FRAMEWORK,
        "It needs many more epochs than PyTorch for reasons that could not be tracked down.",
        "epochs to the goal, layers' gradients divided by the batch size over not divided",
        lambda c: {
            "Xavier's parameters": made(c, "scratch", "factors", "division_xavier"),
            "PyTorch's": made(c, "scratch", "factors", "division"),
        },
        above(1),
        {"holds": "the linear layer divided its gradient by the batch size, on top of a loss that sums"},
    ),
    Claim(
        f"{FDFA}, abstract",
        "FDFA trains nearly as well as backprop.",
        "test accuracy, backprop ahead by [points]",
        lookups.behind_backprop("FDFA"),
        below(1),
        {"holds": "its feedback learns the mean Jacobian"},
    ),
    _fdfa(
        "FDFA is better than feedback that is random and fixed.",
        "DFA",
        above(0, POINTS),
        {"inconclusive": "on two hidden layers with BatchNorm DFA is as good", "fails": "not here"},
    ),
    _fdfa(
        "FDFA is better than the feedback of Kolen and Pollack.",
        "DKP",
        above(0, POINTS),
        {"inconclusive": "they do not differ on this network", "fails": "not here"},
    ),
    _fdfa(
        "FDFA is far better than forward gradients of the weights.",
        "FG",
        above(1),
        {"holds": "its noise is averaged over steps, and is not in the gradient"},
    ),
    _fdfa(
        "FDFA is far better than forward gradients of the activities.",
        "FG-A",
        above(1),
        {"holds": "its noise is averaged over steps, and is not in the gradient"},
    ),
    Claim(
        f"{LOCAL}, results",
        "Perturbing the activities trains better than perturbing the weights.",
        "test accuracy, FG-A ahead of FG by [points], MNIST",
        lookups.accuracy_gap("FG-A", "FG"),
        above(0, POINTS),
        {"holds": "its noise is that of the units, and not of the weights"},
    ),
    Claim(
        f"{LOCAL}, results",
        "Local losses with groups train better than a global loss with perturbed activities.",
        "test accuracy, LG-FG-A ahead of FG-A by [points]",
        lookups.accuracy_gap("LG-FG-A", "FG-A", BOTH),
        above(0, POINTS),
        {"holds": "each group has the noise of its own units"},
    ),
    Claim(
        f"{LOCAL}, results",
        f"With them a forward gradient is within {REN['bound']} points of backprop on MNIST.",
        "test accuracy, backprop ahead of LG-FG-A by [points]",
        lookups.behind_backprop("LG-FG-A", BOTH),
        below(REN["bound"]),
        {
            "holds": "the noise of a small group averages out over a batch",
            "partly": "with the smaller groups: their noise averages out over a batch",
            "fails": "not with groups of this size",
        },
    ),
    Claim(
        f"{LOCAL}, results",
        "Local losses in addition to backprop's improve on it.",
        "test accuracy, L-BP ahead of backprop by [points]",
        lookups.accuracy_gap("L-BP", "BP", (*BOTH, "KMNIST, 2 x 800", "Fashion-MNIST, 2 x 800")),
        above(0, POINTS),
        {"holds": "the heads regularise", "fails": "the heads do not help these networks"},
    ),
    Claim(
        f"{LOCAL}, results",
        f"Local losses alone, by their exact gradients, cost at most {REN['greedy_bound']} points on MNIST.",
        "test accuracy, backprop ahead of LG-BP by [points]",
        lookups.behind_backprop("LG-BP", BOTH),
        below(REN["greedy_bound"]),
        {
            "holds": "a layer hardly needs to know what comes after it",
            "fails": "a layer that does not know what follows learns less",
        },
    ),
    Claim(
        f"{LOCAL}, results",
        "Forward gradients of the local losses generalise better than their exact gradients.",
        "test accuracy, LG-FG-A ahead of LG-BP by [points]",
        lookups.accuracy_gap("LG-FG-A", "LG-BP", BOTH),
        above(0, POINTS),
        {"holds": "their noise regularises", "fails": "their noise does not pay here"},
    ),
    Claim(
        f"{LOCAL}, results",
        "Forward gradients of local losses train better than direct feedback alignment.",
        "test accuracy, LG-FG-A ahead of DFA by [points], MNIST",
        lookups.accuracy_gap("LG-FG-A", "DFA"),
        above(0, POINTS),
        {"fails": "with BatchNorm and two hidden layers, fixed feedback is as good"},
    ),
    Claim(
        "[@fournier2023], abstract",
        "The gradient of a local loss is a drastically better tangent than random noise.",
        "test accuracy, FG-GUIDED ahead of FG-A by [points], MNIST",
        lookups.accuracy_gap("FG-GUIDED", "FG-A"),
        above(1),
        {"holds": "it points near the gradient, and it has no noise", "fails": "random signs are as good here"},
    ),
    *claims_on_cost.CLAIMS,
]
