"""Quality under a budget, and the claims that it decides, made from small made-up trainings."""

from __future__ import annotations

import pytest

from fwdlib.bench.figures import plot_budget
from fwdlib.statistics import Interval
from report.sections import budget, claims_on_cost
from report.sections.verdicts import judge

SEEDS = range(1, 11)
ENDS = {"L checkpoints": 0.1, "rank-one": 0.3, "activity": 0.2, "two-point": 1.0}


def made_up():
    """The test loss falls over 60 s from 2.3 to its end in a line; each seed is a little higher than the one before."""
    runs = []
    for method, end in ENDS.items():
        for seed in SEEDS:
            test = [2.3 + (end + 0.001 * seed - 2.3) * i / 4 for i in range(5)]
            run = {
                "network": "MLP",
                "method": method,
                "seed": seed,
                "purpose": "measured",
                "learning_rate": 0.1,
                "power": 1,
            }
            run |= {"steps": 1000, "seconds": [0, 15, 30, 45, 60], "train": test, "test": test}
            runs.append(run | {"accuracy": [0.1, 0.2, 0.3, 0.4, 1 - end / 2 - 0.0001 * seed]})
    memory = {"L checkpoints": 30_000_000, "rank-one": 3_000_000, "activity": 20_000_000, "two-point": 1_000_000}
    settings = {"seconds": 60.0, "tuning_seconds": 6.0}
    chosen = {"MLP": dict.fromkeys(ENDS, 1)}
    return {"runs": runs, "memory": {"MLP": memory}, "chosen": chosen, "settings": settings, "environment": {}}


def test_rows_hold_the_best_loss_of_each_seed():
    row = budget.context(made_up())["networks"]["MLP"]["rank-one"]
    assert row["num_seeds"] == 10
    assert row["test"].estimate == pytest.approx(0.3055)
    assert row["memory"] == 3_000_000


def test_the_figure_has_the_quartiles_over_the_seeds(drawn):
    curves = budget.curves(made_up())
    seconds, low, middle, high = curves["MLP"]["rank-one"]
    assert list(seconds) == [0, 15, 30, 45, 60]
    assert [low[-1], middle[-1], high[-1]] == pytest.approx([0.30325, 0.3055, 0.30775])
    (axes,) = drawn(plot_budget, curves).axes
    assert {line.get_label() for line in axes.lines} == set(ENDS)
    (line,) = (line for line in axes.lines if line.get_label() == "rank-one")
    assert list(line.get_ydata()) == pytest.approx(list(middle))
    assert axes.get_title(loc="left") == "MLP"


def test_the_cap_leaves_out_what_needs_more():
    found = budget.context(made_up())
    assert found["best"] == {"MLP": "L checkpoints"}
    assert found["best_under_cap"] == {"MLP": "activity"}


def test_checkpointed_backprop_is_compared_seed_by_seed():
    against = budget.context(made_up())["against"]["MLP"]
    assert against["rank-one"]["accuracy"].estimate == pytest.approx(10)
    assert against["rank-one"]["time"] == (1, 1, 1)  # it passes the level in the last quarter
    assert against["two-point"]["time"] == (0.75, 0.75, 0.75)


def test_a_training_that_diverged_counts_with_its_best_loss():
    found = made_up()
    for run in found["runs"]:
        if run["method"] == "two-point":
            run |= {"seconds": [0, 15], "train": [2.3, "nan"], "test": [2.3, "nan"], "accuracy": [0.1, 0.1]}
    row = budget.context(found)["networks"]["MLP"]["two-point"]
    assert row["test"].estimate == 2.3
    assert row["diverged"] == row["num_seeds"] == 10


def test_a_training_that_ends_above_its_start_has_diverged_as_the_study_says():
    found = made_up()
    run = next(run for run in found["runs"] if run["method"] == "two-point" and run["purpose"] == "measured")
    run |= {"train": [2.3, 0.4, 199_926.0]}
    assert budget.context(found)["networks"]["MLP"]["two-point"]["diverged"] == 1


def test_without_the_study_there_is_no_context():
    assert budget.context(None) is None


def context_of(**changes):
    rival = {"memory": 20_000_000, "ratio": Interval(0.4, 0.5, 0.6), "name": "L checkpoints"}
    rivals = {"exact": rival, "rank-one": {"memory": 4_000_000, "ratio": Interval(1, 1, 1)}}
    rivals["two-point"] = {"memory": 15_000_000, "ratio": Interval(0.1, 0.2, 0.25)}
    cost = {"budget": budget.context(made_up()), "depth": {"rivals": rivals}}
    scaling = {"most": {"FG-RANK1, K = 1": 64, "FG-RANK1, K = 16": 128}, "gradient": 4_000_000}
    traffic = {"rows": {"rank-one, K = 1": {"arrival": Interval(0.6, 0.64, 0.7)}, "DDP": {"arrival": None}}}
    return {"cost": cost, "scaling": scaling, "traffic": traffic} | changes


def test_claims_on_cost_are_decided_by_the_measured_numbers():
    accuracy, time, step, memory, total, in_a_step = [judge(claim, context_of()) for claim in claims_on_cost.CLAIMS]
    assert accuracy.outcome == "holds"
    assert time.outcome == "partly"
    assert step.cases["rank-one"][1] == "fails"  # half the time
    assert step.cases["two-point"][1] == "holds"  # 0.5 / 0.2
    assert memory.cases["rank-one"][1] == "fails"
    assert memory.cases["two-point"][1] == "holds"
    assert total.outcome == "holds"  # 0.64 MB
    assert in_a_step.outcome == "holds"


@pytest.mark.parametrize(("missing", "place"), [("cost", 0), ("scaling", -1), ("traffic", -2)])
def test_claims_without_their_study_are_not_measured(missing, place):
    outcomes = [judge(claim, context_of(**{missing: None})).outcome for claim in claims_on_cost.CLAIMS]
    assert outcomes[place] == "not measured"
