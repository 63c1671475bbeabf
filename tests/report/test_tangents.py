"""The report's section on several tangents follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from fwdlib.estimators import backprop_gradient
from fwdlib.methods.functions import rosenbrock, sphere
from fwdlib.methods.minimise import minimise
from report.grids import best
from report.sections import tangents as section
from report.studies import tangents as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE

METHODS = ("backprop", "mean, K = 1", "mean, K = 16", "projection, K = 16")


def run(problem, n, method, *, power=0, tuning=1.0, measured=(3.0, 1.0, 2.0)):
    key = {"problem": problem, "n": n, "method": method, "power": power, "learning_rate": 0.1}
    return key | {"tuning": [tuning] * 3, "measured": list(measured)}


def content(*runs):
    settings = json.loads(json.dumps(study.FULL._replace(seeds=(1, 2, 3)).kept()))
    sizes = {name: list(problem.sizes) for name, problem in study.FULL.problems.items()}
    return {"settings": settings, "environment": MACHINE, "sizes": sizes, "runs": list(runs)}


def on_sphere(n=1024, **values):
    """The four methods on the sphere: the values that theory expects, or those given."""
    expected = {"mean, K = 1": 386.4, "mean, K = 16": 1.9e-4, "projection, K = 16": 1.5e-4, "backprop": 0.0}
    middle = expected | {method: value for method, value in values.items() if method in METHODS}
    return [run("sphere", n, m, measured=(2 * middle[m], middle[m], middle[m] / 2)) for m in METHODS]


text_of = partial(printing.text_of, section)


# what the page says


def test_nothing_is_said_where_nothing_was_measured(load):
    assert section.context(load(content())) is None


def test_cells_are_median_range_and_what_was_published(load):
    text = text_of(load(content(*on_sphere())))
    assert "| mean, K = 1 | 386 [193, 773] (433) |" in text
    assert "| projection, K = 16 | 1.50 x 10^-4^ [7.50 x 10^-5^, 3.00 x 10^-4^] (2.00 x 10^-4^) |" in text


def test_of_the_rates_only_the_best_by_the_tuning_seeds_counts(load):
    good = run("sphere", 1024, "mean, K = 1", power=1, tuning=1.0, measured=(7.0, 7.0, 7.0))
    lucky = run("sphere", 1024, "mean, K = 1", power=2, tuning=2.0, measured=(0.0, 0.0, 0.0))
    broken = run("sphere", 1024, "mean, K = 1", power=3, tuning=math.inf, measured=(math.inf,) * 3)
    text = text_of(load(content(lucky, broken, good)))
    assert "| mean, K = 1 | 7.00 (433) |" in text
    assert "in 0 of 1 cases" in text


def test_the_sphere_is_compared_with_theory_and_with_the_published_values(load):
    found = section.context(load(content(*on_sphere())))["sphere"]
    assert found["over_theory"] == pytest.approx((1.0, 1.0), abs=0.04)
    assert (found["as_suggested"], found["num_cases"]) == (3, 3)
    assert found["furthest"] == "projection, K = 16"
    assert found["factor"] == pytest.approx(4 / 3)
    other = section.context(load(content(*on_sphere(**{"mean, K = 1": 4330.0}))))["sphere"]
    assert (other["furthest"], other["factor"]) == ("mean, K = 1", pytest.approx(10))
    assert other["over_theory"][1] == pytest.approx(11.2, abs=0.1)


@pytest.mark.parametrize(
    ("worst", "sentence"), [(1e-13, "both methods end below"), (1e-11, "not every seed ends below")]
)
def test_how_far_sixteen_tangents_of_64_numbers_come_is_a_sentence(load, worst, sentence):
    at_64 = [run("sphere", 64, m, measured=(1e-20, 1e-20, worst)) for m in METHODS[2:]]
    assert sentence in text_of(load(content(*on_sphere(), *at_64)))


def test_ratios_are_taken_above_the_minimum_and_the_table_has_the_function_s_values(load):
    runs = [
        run("styblinski_tang", 1024, "mean, K = 16", measured=[2000] * 3),
        run("styblinski_tang", 1024, "projection, K = 16", measured=[500, 500, 2000]),
    ]
    text = text_of(load(content(*runs)))
    assert "Styblinski-Tang, n = 1,024: 0.250 (K = 16). The" in text
    assert "| projection, K = 16 | -39,606 [-39,606, -38,106] (-37,100) |" in text


def test_what_diverged_and_what_is_missing_is_named(load):
    runs = [run("rosenbrock", 2, method) for method in study.METHODS]
    runs[1]["measured"][0] = math.inf
    text = text_of(load(content(*runs)))
    assert "some of the others diverged: Rosenbrock, n = 2, mean, K = 1." in text
    everything = "2, 4, 8, 16, 32, 64, 128, 256, 512 and 1024"
    assert f"Sphere at n = {everything}; " in text
    assert f"Rosenbrock at n = {everything.removeprefix('2, ')}." in text
    assert "[1.00, diverged] (8.10" in text


def test_figure_has_a_panel_for_each_function(load):
    found = load(content(*on_sphere(), run("styblinski_tang", 8, "backprop")))
    (figure,) = section.figures(found).values()
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Sphere", "Styblinski-Tang"]
    assert len(first.lines) == 4
    assert list(second.lines[0].get_ydata()) == [2.0]


# the study

SMALL = study.Settings({"sphere": study.Problem(sphere, (-1.0, -1.0), 20, 2.0, (4, 2))}, (1, 2), (11, 12))


def test_problems_take_turns_and_one_with_fewer_sizes_ends_earlier():
    few = {"sphere": (64, 2, 4), "rosenbrock": (2,)}
    problems = {name: study.FULL.problems[name]._replace(sizes=few[name]) for name in few}
    expected = [("sphere", 64), ("rosenbrock", 2), ("sphere", 2), ("sphere", 4)]
    assert list(study.in_turn(problems, ["sphere", "rosenbrock"])) == expected


def test_committed_results_have_the_cases_of_the_study():
    found = section.load(RESULTS)
    assert found["settings"] == json.loads(json.dumps(study.FULL.kept()))
    planned = {(name, n, m) for name, p in study.FULL.problems.items() for n in p.sizes for m in study.METHODS}
    assert {(r["problem"], r["n"], r["method"]) for r in found["runs"]} == planned
    assert section.methods_of(found) == list(study.METHODS)
    assert set(section.TITLES) == set(study.FULL.problems)


def test_values_are_those_above_the_minimum():
    problem = study.FULL.problems["styblinski_tang"]._replace(sizes=(3,), num_steps=200)
    settings = study.Settings({"styblinski_tang": problem}, seeds=(1,))
    (found,) = study.run_grid(settings, "styblinski_tang", 3, "backprop", [0])
    assert found["measured"] == [pytest.approx(0, abs=1e-12)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(study, "METHODS", {m: study.METHODS[m] for m in ("backprop", "mean, K = 2")})


@pytest.mark.parametrize("method", study.METHODS)
def test_a_step_of_the_whole_grid_is_that_of_minimise(method):
    estimator, k = study.METHODS[method]
    start, rates, seeds = torch.full((6,), -0.5, dtype=torch.float64), [1e-5, 1e-4], [1, 2]
    found = study.descend(rosenbrock, start, estimator, num_tangents=k, rates=rates, seeds=seeds, num_steps=15)
    one = estimator if estimator is backprop_gradient else partial(estimator, num_tangents=k, tangents="normal")
    options = {"learning_rate": [1e-5, 1e-5, 1e-4, 1e-4], "seeds": [1, 2, 1, 2], "num_iterations": 15}
    expected = minimise(rosenbrock, start, one, progress=None, **options).values[:, -1]
    torch.testing.assert_close(found, expected.reshape(2, 2), rtol=1e-9, atol=0)


def test_a_descent_that_diverges_ends_infinite():
    start = torch.ones(3, dtype=torch.float64)
    options = {"num_tangents": 1, "rates": [0.25, 1e3], "seeds": [1], "num_steps": 200}
    found = study.descend(sphere, start, backprop_gradient, **options)
    assert found[0] < 1e-20
    assert found[1] == math.inf


def test_suggested_rates_are_those_of_least_expected_value():
    assert study.suggested_rate(2.0, 64, "backprop") == 0.5
    assert study.suggested_rate(2.0, 64, "projection, K = 4") == 0.5
    assert study.suggested_rate(2.0, 64, "mean, K = 4") == pytest.approx(2 / 69)


def test_study_keeps_what_is_done_and_draws_the_same_again(few, tmp_path, monkeypatch):
    found = study.measure(SMALL, tmp_path, ["sphere"])
    assert {(r["n"], r["method"]) for r in found["runs"]} == {(n, m) for n in (2, 4) for m in study.METHODS}
    assert all((len(r["tuning"]), len(r["measured"])) == (2, 2) for r in found["runs"])
    on_disk = json.loads((tmp_path / "tangents.json").read_text())
    assert section.context(on_disk)["missing"] == []
    monkeypatch.setattr(study, "descend", None)  # nothing is measured again
    assert study.measure(SMALL, tmp_path, ["sphere"])["runs"] == on_disk["runs"]
    with pytest.raises(ValueError, match=r"was made with other settings: .* Delete the file to start anew"):
        study.measure(SMALL._replace(seeds=(1, 2, 3)), tmp_path, ["sphere"])


@pytest.mark.parametrize("bottom", [-9, 0, 3, 11])
def test_grid_grows_until_its_best_is_inside(monkeypatch, bottom):
    def descend(*_, rates, seeds, **__):
        powers = torch.tensor([math.log(rate / 0.5, study.RATIO) for rate in rates])
        return (powers - bottom).abs().unsqueeze(1).expand(-1, len(seeds))

    monkeypatch.setattr(study, "descend", descend)
    runs = list(study.tune(SMALL, "sphere", 4, "backprop", []))
    powers = [r["power"] for r in runs]
    assert best(runs)["power"] == bottom
    assert min(powers) < bottom < max(powers)
    assert len(powers) == len(set(powers)) <= 7 + abs(bottom) + 1


def test_of_equal_rates_the_suggested_is_taken_and_if_all_diverge_the_lowest():
    equal = [run("sphere", 4, "backprop", power=p, tuning=0.0) for p in (-1, 0, 1)]
    assert best(equal)["power"] == 0
    broken = [run("sphere", 4, "backprop", power=p, tuning="inf") for p in (-1, 0, 1)]
    assert best(broken)["power"] == -1
