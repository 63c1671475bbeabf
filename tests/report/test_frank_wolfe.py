"""The report's section on Frank-Wolfe follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch

from fwdlib.data import Dataset, Source
from fwdlib.methods.frank_wolfe import ball_norm, frank_wolfe_gap, l2_reach
from fwdlib.statistics import t_interval
from report.sections import frank_wolfe as section
from report.studies import frank_wolfe as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE

STEPS = [10, 100, 1000, 10_000, 100_000, 1_000_000]
SLOPES = {"exact gradient": -1.0, "plain": 0.0, "averaged": -0.4}  # of a measurement as the paper would have it


def decay(slope, start=1.0):
    # ten seeds that fall alike, from levels of their own
    return [[start * (1 + 0.01 * seed) * (step / 10) ** slope for step in STEPS] for seed in range(10)]


def convergence(slopes=SLOPES, near=-0.9):
    runs = {}
    for ball in study.BALLS:
        for form, slope in slopes.items():
            places = {place: {"gap": decay(slope), "error": decay(slope)} for place in study.PLACES}
            if form == "plain":
                places["near the centre"] = {"gap": decay(near), "error": decay(near)}
            runs[f"{ball}, {form}"] = {"steps": STEPS} | places
    return runs


def training(method, ball, averaged, radius, iterations, seed, errors):
    return {
        **{"method": method, "ball": ball, "averaged": averaged, "radius": radius},
        **{"iterations": iterations, "seed": seed},
        **{"status": "completed", "steps": [0, iterations], "train_loss": [2.3, 0.5], "test_errors": [9000, errors]},
        **{"num_test": 10_000, "nonzero": 0.05, "holding": 0.03 + 0.001 * seed, "norm": 90.0},
    }


def trainings(**changed):
    kinds = {
        "free": ("backprop", None, None, None, 2000, 800),
        "free forward": ("forward gradient", None, None, None, 2000, 2500),
        "backprop": ("backprop", "l1", True, 100, 2000, 1500),
        "small": ("backprop", "l1", True, 10, 2000, 4000),
        "plain": ("forward gradient", "l1", False, 100, 2000, 9000),
        "averaged": ("forward gradient", "l1", True, 100, 2000, 8000),
        "long": ("forward gradient", "l1", True, 100, 10_000, 5000),
        "activity": ("activity", "l1", True, 100, 2000, 1700),
        "l2": ("forward gradient", "l2", True, 30, 2000, 2200),
    }
    runs = {}
    for name, kind in kinds.items():
        *key, errors = kind
        for seed in (1, 2, 3):
            run = training(*key, seed, changed.get(name, errors) + 10 * seed)
            runs[study.name_of(run)] = run
    return runs


def memory(**changed):
    items = {}
    for method, size in {"backprop": 4e8, "rank-one": 1e8}.items():
        for form in ("SGD", "plain", "averaged"):
            key = {"model": "20x256", "title": "20 layers of width 256", "batch": 4096, "method": method, "form": form}
            items[f"20x256, {method}, {form}"] = key | {"bytes": int(changed.get(method, size))}
    return items


def content(**changes):
    found = {
        "settings": study.FULL.kept(),
        "environment": MACHINE,
        "source": Source("MNIST", "a file", None, "0", "free", "someone", 0)._asdict(),
        "convergence": convergence(),
        "tuning": {"backprop": {"learning_rate": 0.4}},
        "training": trainings(),
        "memory": memory(),
    }
    return json.loads(json.dumps(found | changes))


text_of = partial(printing.text_of, section)


# what the page prints


def test_nothing_measured_is_nothing_printed(load):
    assert section.context(load(content(convergence={}))) is None


def test_slopes_and_falls_are_those_of_the_data(load):
    found = load(content())
    row = section.context(found)["rows"]["l1"]["outside"]["averaged"]
    assert row["slope"].estimate == pytest.approx(-0.4, abs=1e-4)
    assert [fall.estimate for fall in row["falls"]] == pytest.approx([10**0.4] * 4, rel=1e-4)
    assert "| l1 | near the centre | -1.00 [-1.00, -1.00] | -0.90 [-0.90, -0.90] |" in text_of(found)


def test_the_published_finding_where_the_data_show_it(load):
    text = text_of(load(content()))
    assert text.count("**averaged Frank-Wolfe falls in each of the decades**") == 3
    assert text.count("**plain Frank-Wolfe levels off**") == 3
    assert "on l1, l2 and linf plain Frank-Wolfe levels off for goals inside the ball" in text
    assert "converges on l1, l2 and linf, and there faster than the averaged form" in text


def test_another_outcome_is_another_sentence(load):
    found = load(content(convergence=convergence({"exact gradient": -1, "plain": -0.3, "averaged": 0.0}, near=0.0)))
    text = text_of(found)
    assert text.count("**averaged Frank-Wolfe levels off**") == 3
    assert text.count("**plain Frank-Wolfe falls, too**") == 3
    assert "qualification" not in text
    assert "without an active constraint" not in text


def test_a_gap_that_falls_in_some_decades_only_is_no_proof(load):
    measured = convergence()
    for row in measured["l1, averaged"]["outside"]["gap"]:
        row[2] = row[1]  # stands still from 100 to 1000
    verdicts = section.context(load(content(convergence=measured)))["verdicts"]
    assert (verdicts["l1"]["outside"]["averaged"], verdicts["l2"]["outside"]["averaged"]) == ("unclear", "falls")


def test_what_is_solved_in_a_step_has_no_slope(load):
    measured = convergence()
    measured["l2, exact gradient"]["outside"] = {"gap": [[1e-17] * 6] * 10, "error": [[0.0] * 6] * 10}
    found = load(content(convergence=measured))
    assert "| l2 | outside | at the optimum | " in text_of(found)
    assert list(section.figures(found))[:2] == ["frank-wolfe-gap", "frank-wolfe-error"]


def test_reach_is_compared_with_the_closed_form(load):
    reach = section.context(load(content()))["reach"]
    radius = l2_reach(20)
    goal, end, best = torch.tensor([2.0]), torch.tensor([radius]), torch.tensor([1.0])
    f = lambda x: study.distance(x, goal).item()  # noqa: E731
    assert reach["predicted"] == pytest.approx((f(end) - f(best)) / (f(torch.zeros(1)) - f(best)))
    assert reach["measured"].estimate == pytest.approx(1.045)  # the median level of ten seeds


def test_trainings_are_averaged_over_seeds_and_compared_with_backprop(load):
    found = load(content())
    context = section.context(found)["training"]
    assert context["at"]["backprop"]["accuracy"] == pytest.approx(t_interval([84.9, 84.8, 84.7]))
    assert context["rows"][0]["holding"] == pytest.approx(3.2)
    assert {name: behind.estimate for name, behind in context["behind"].items()} == pytest.approx(
        {"activity": 2, "averaged": 65, "long": 35}
    )
    text = text_of(found)
    assert "The noise costs so much because of the l1 ball" in text
    assert "was not enough here" in text


def test_other_trainings_are_other_sentences(load):
    text = text_of(load(content(training=trainings(backprop=8000, l2=8000))))
    assert "gets 19.80 [19.55, 20.05] % right" in text
    assert "The noise costs so much" not in text
    assert "was not enough here" not in text


def test_what_diverged_has_learned_nothing(load):
    runs = trainings()
    name = next(name for name, run in runs.items() if run["averaged"] is None)
    runs[name]["status"] = "diverged"
    rows = section.context(load(content(training=runs)))["training"]["rows"]
    assert rows[0]["accuracy"].estimate == pytest.approx((0 + 91.8 + 91.7) / 3)


def test_memory_has_its_share_of_backprop(load):
    text = text_of(load(content()))
    assert "needs 0.25 of backprop's memory for *20 layers of width 256*; backprop that updates in-backward" in text
    more = text_of(load(content(memory=memory(**{"rank-one": 5e8}))))
    assert "It saves next to nothing or nothing at all for *20 layers of width 256*. Depth" in more


def test_parts_that_were_not_measured_are_left_out(load):
    text = text_of(load(content(training={}, memory={}, tuning={})))
    assert "MNIST.**" not in text
    assert "Memory.**" not in text
    some = {name: run for name, run in convergence().items() if not name.startswith("linf")}
    text = text_of(load(content(convergence=some)))
    assert "linf ball with" not in text
    assert "| l2 |" in text


def test_figures_show_the_measurements(load):
    drawn = section.figures(load(content()))
    assert list(drawn) == ["frank-wolfe-gap", "frank-wolfe-error", "frank-wolfe-sparsity"]
    gap, error, sparsity = drawn.values()
    assert [axes.get_title(loc="left") for axes in gap.axes] == [f"l1 ball, goal {place}" for place in study.PLACES]
    assert [axes.get_title(loc="left") for axes in error.axes] == ["l1 ball", "l2 ball", "linf ball"]
    assert list(gap.axes[2].lines[2].get_ydata()) == pytest.approx(np.median(decay(-0.4), axis=0), rel=1e-4)
    over_radius, _ = sparsity.axes
    lines = {line.get_label(): line for line in over_radius.lines}
    assert set(lines) == {"backprop", "forward gradient", "activity", "no constraint"}
    assert list(lines["backprop"].get_xdata()) == [100, 10]  # as they were trained
    assert list(lines["forward gradient"].get_ydata()) == pytest.approx([19.8])  # neither plain, nor long, nor l2


# the study


@pytest.mark.parametrize("ball", study.BALLS)
def test_projection_is_where_the_gap_is_zero(ball):
    goals = torch.cat([study.place_goals(ball, seed) for seed in range(5)])
    best = study.project(goals, ball)
    assert (ball_norm(best, ball) <= 1 + 1e-12).all()
    gaps = frank_wolfe_gap(best - goals, best, ball, 1.0)
    torch.testing.assert_close(gaps, torch.zeros_like(gaps), rtol=0, atol=1e-12)
    inside = ball_norm(goals, ball) < 1
    assert inside.sum() == 10
    torch.testing.assert_close(best[inside], goals[inside])


def test_goals_have_the_norms_of_their_places():
    for ball in study.BALLS:
        norms = ball_norm(study.place_goals(ball, 3), ball)
        assert norms.tolist() == pytest.approx(list(study.PLACES.values()))


def test_tangents_of_a_seed_do_not_depend_on_the_others(monkeypatch):
    monkeypatch.setattr(study, "CHUNK", 3)
    both, alone = study.draw_tangents([4, 5], 6), study.draw_tangents([5], 6)
    for _ in range(7):
        assert torch.equal(next(both)[1], next(alone)[0])


def test_record_steps_are_four_a_decade():
    assert study.record_steps(1000) == [10, 18, 32, 56, 100, 178, 316, 562, 1000]


SMALL = study.Settings(num_steps=1000, seeds=(0, 1), radii=(100,), training_seeds=(1,), num_held_out=40)
SMALL = SMALL._replace(batch_size=20, iterations=40, long=50)


@pytest.fixture
def small(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 10
    images = 0.2 * torch.rand(160, 1, 28, 28, generator=draw) + torch.rand(10, 1, 28, 28, generator=draw)[labels]
    source = Source("blobs", "made up", None, "0", "free", "nobody", 0)
    data = Dataset(images[:120], labels[:120], images[120:], labels[120:], tuple("0123456789"), source)
    monkeypatch.setattr(study, "load_images", lambda _: data)
    return data


def test_study_measures_and_does_nothing_twice(small, tmp_path, monkeypatch):
    found = study.measure(SMALL, tmp_path, ["convergence", "tuning", "training"])
    assert len(found["convergence"]) == 9
    run = found["convergence"]["l1, averaged"]
    assert np.array(run["outside"]["gap"]).shape == (2, len(run["steps"]))
    assert len(found["training"]) == 3 + 3 + 3 + 1 + 2  # free, plain, averaged, long, l2
    trained = found["training"]["backprop, averaged, radius 100, 40 steps, seed 1"]
    assert trained["norm"] <= 100.01
    assert trained["test_errors"][-1] < trained["test_errors"][0]
    assert 0 < trained["holding"] <= trained["nonzero"] <= 40 / 7850 + 1e-9  # a step, an entry
    for name in ("fit", "converge", "tune"):  # nothing is done again
        monkeypatch.setattr(study, name, lambda *_: pytest.fail("done twice"))
    again = study.measure(SMALL, tmp_path, ["convergence", "tuning", "training"])
    assert again["convergence"].keys() == found["convergence"].keys()
    assert "| linf | outside |" in text_of(section.load(tmp_path))


def test_study_refuses_a_file_of_other_settings(small, tmp_path):
    study.measure(SMALL, tmp_path, ["tuning"])
    with pytest.raises(ValueError, match=r"made with other settings: batch_size was 20 .* Delete the file to start"):
        study.measure(SMALL._replace(batch_size=30), tmp_path, ["tuning"])


def test_sums_of_held_out_images(small):
    held = study.held_out(small, SMALL.num_held_out)
    assert (len(held.train_targets), len(held.test_targets)) == (80, 40)
    assert torch.equal(held.test_inputs, small.train_inputs[80:])


@pytest.mark.parametrize("settings", [study.FULL, study.SHORT])
def test_the_plan_has_what_the_section_compares(settings):
    runs = {study.name_of(key | {"seed": 1}): training(*key.values(), 1, 1000) for key in study.plan(settings)}
    found = content(training=runs) | {"settings": json.loads(json.dumps(settings.kept()))}
    assert all(section.context(found)["training"]["at"].values())


def test_committed_results_have_the_settings_of_the_study():
    found = section.load(RESULTS)
    assert found["settings"] == json.loads(json.dumps(study.FULL.kept()))
    assert found["memory"].keys() == {name for name, _ in study.memory_jobs(study.FULL, {})}
    planned = itertools.product(study.FULL.training_seeds, study.plan(study.FULL))
    assert found["training"].keys() == {study.name_of(key | {"seed": seed}) for seed, key in planned}


def test_the_section_knows_the_model_and_its_reach():
    assert sum(p.numel() for p in study.build().parameters()) == section.NUM_PARAMS
    for num_params in (1, 2, 20, 7850):
        assert section.reach_of(num_params) == pytest.approx(l2_reach(num_params), rel=1e-12)


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    item = study.memory_of("penguins-logistic", 8, "rank-one", "averaged")
    assert 0 <= item["bytes"] < 5e8
    assert (item["model"], item["batch"], item["form"]) == ("penguins-logistic", 8, "averaged")

    def killed(function, arguments):
        raise RuntimeError("ended with code -9")

    monkeypatch.setattr(study.memory, "peak_bytes", killed)
    with pytest.raises(RuntimeError, match=r"mnist-mlp.*ended with code -9"):
        study.memory_of("mnist-mlp", 64, "backprop", "plain")
