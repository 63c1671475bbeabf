"""The report's section on backprop from scratch follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fwdlib.methods import tinynet
from fwdlib.statistics import t_interval
from report.names import CELLS, COMPARED
from report.sections import scratch as section
from report.studies import scratch as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE

ARRIVALS = {  # of six seeds
    ("tinynet", "as PyTorch"): (40, 42, 44, 46, 48, 50),
    ("tinynet", "Xavier"): (20, 21, 22, 23, 24, 25),
    ("tinynet", "divided"): (math.inf,) * 6,
    ("tinynet", "divided, Xavier"): (400, 420, 440, 460, 480, 1000),
    ("PyTorch", "as PyTorch"): (40, 42, 44, 46, 48, 50),
    ("PyTorch", "divided, Xavier"): (400, 420, 440, 460, 480, 1000),
}


def training(framework, name, seed, arrival, test_errors=30):
    series = {"epochs": [1, 10, 1001], "loss": [500.0, 400.0, 20.0 + seed], "errors": [500, 300, 40]}
    return {"key": ["training", framework, name, seed], "arrival": arrival, "test_errors": test_errors, **series}


def content(arrivals=ARRIVALS, **changes):
    runs = [
        training(*key, seed, arrival, 25 + seed)
        for key, of_seeds in arrivals.items()
        for seed, arrival in enumerate(of_seeds, 1)
    ]
    runs += [{"key": ["derivatives"], "errors": {"Tanh": [0.42, 0.0], "Sigmoid": [0.18, 0.0]}}]
    runs += [{"key": ["ratio"], "ratios": [50.0, 50.0]}]
    runs += [{"key": ["agreement", "ReLU", "MSELoss", "sum", m], "difference": 3e-13 * (1 + m)} for m in (0.0, 0.9)]
    milliseconds = {"tinynet": 0.1, "PyTorch": 0.4, "PyTorch, foreach": 0.2, "PyTorch, fused": 0.3}
    seconds = {name: [value / 1e3] * 9 for name, value in milliseconds.items()}
    found = {"settings": _settings(), "environment": MACHINE, "runs": runs, "steps": {"1": seconds}}
    return found | changes


def _settings():
    return {
        **{"sizes": [2, 25, 25, 25, 2], "num_points": 1000, "batch_size": 50, "learning_rate": 0.001},
        **{"num_epochs": 1001, "goal": 0.95, "agreement_steps": 1000},
    }


text_of = partial(printing.text_of, section)


# what the page prints


def test_without_a_training_nothing_is_shown(load):
    assert section.context(load(content(runs=[]))) is None


def test_the_cells_follow_the_trainings(load):
    cells = section.context(load(content()))["cells"]
    assert list(cells) == list(CELLS)
    assert cells["as PyTorch"]["arrival"] == (40, 45, 50)
    assert cells["divided"]["arrival"].estimate == math.inf
    assert [cells[name]["never"] for name in cells] == [0, 0, 6, 0]
    accuracies = [100 * (1 - errors / 1000) for errors in range(26, 32)]
    assert cells["Xavier"]["accuracy"] == pytest.approx(t_interval(accuracies))
    assert cells["Xavier"]["loss"] == 23.5
    assert "| divided by the batch | PyTorch's | never | 6 |" in text_of(load(content()))


def test_the_cause_is_named_if_the_data_name_it(load):
    found = load(content())
    context = section.context(found)
    assert context["verdict"] == "division"
    assert context["factors"]["division"].low == math.inf
    assert context["factors"]["division_xavier"].estimate == 20
    assert context["factors"]["xavier_divided"].high == 0
    text = text_of(found)
    assert "**The division is the cause.**" in text
    assert "they made up for some of the division" in text


def test_another_outcome_is_another_verdict(load):
    same = ARRIVALS | {("tinynet", "divided"): (30, 60, 40, 50, 40, 55), ("tinynet", "divided, Xavier"): (60,) * 6}
    found = load(content(same))
    assert section.context(found)["verdict"] == "unclear"
    text = text_of(found)
    assert "inconclusive with these seeds" in text
    assert "with PyTorch's 0.998 [0.750, 1.43] times as many" in text
    assert "The division is the cause" not in text
    assert "they made up" not in text


def test_cells_that_were_not_measured_leave_no_verdict(load):
    found = load(content({key: ARRIVALS[key] for key in [("tinynet", "as PyTorch")]}, steps={}))
    context = section.context(found)
    assert context["verdict"] is None
    assert context["twins"] is None
    assert context["times"] == []
    text = text_of(found)
    assert "The division" not in text
    assert "threads" not in text


def test_published_accuracies_stand_beside_both_frameworks(load):
    own, theirs = section.context(load(content()))["accuracies"]
    assert (own["framework"], theirs["framework"]) == ("tinynet", "PyTorch")
    # Student's t with 9 degrees of freedom: 2.262
    assert own["published"] == pytest.approx(
        (96.99 - 2.262 * 0.93 / 10**0.5, 96.99, 96.99 + 2.262 * 0.93 / 10**0.5), abs=1e-3
    )
    assert list(own["ours"]) == ["tinynet", "PyTorch"]
    assert own["agrees"]
    far = content()
    for run in far["runs"]:
        if run["key"][:2] == ["training", "PyTorch"]:
            run["test_errors"] += 100
    found = load(far)
    assert [row["agrees"] for row in section.context(found)["accuracies"]] == [False, False]
    assert text_of(found).count("the intervals do not overlap") == 2


def test_twins_are_compared_seed_by_seed(load):
    found = content()
    assert section.context(load(found))["twins"] == {"same": 12, "number": 12, "largest": 0}
    assert "in 12 of 12 trainings." in text_of(load(found))
    next(run for run in found["runs"] if run["key"] == ["training", "PyTorch", "as PyTorch", 3])["test_errors"] += 4
    assert section.context(load(found))["twins"] == {"same": 11, "number": 12, "largest": 4}
    assert "in 11 of 12 trainings; in the others they differ by up to 4 points" in text_of(load(found))


def test_agreement_is_given_as_a_power_of_ten_that_bounds_it(load):
    assert section.context(load(content()))["agreement"] == {"number": 2, "exponent": -12}
    assert "within $10^{-12}$ of PyTorch's" in text_of(load(content()))
    exact = content()
    exact["runs"] = [run | {"difference": 0.0} if "difference" in run else run for run in exact["runs"]]
    assert "every parameter exactly where PyTorch has it" in text_of(load(exact))


@pytest.mark.parametrize(("ratios", "said"), [([50.0, 50.0], "is 50.0 times"), ([49.0, 51.0], "is 49.0 to 51.0 times")])
def test_the_ratio_is_the_batch_size_only_if_it_is(load, ratios, said):
    found = content()
    found["runs"] = [run | {"ratios": ratios} if run["key"] == ["ratio"] else run for run in found["runs"]]
    text = text_of(load(found))
    assert said in text
    assert "off by up to 0.18 and 0.42" in text
    assert ("in every component: the batch size" in text) == (ratios[0] == 50)


def test_times_are_of_a_whole_training_and_ratios_by_round(load):
    (row,) = section.context(load(content()))["times"]
    assert (row["threads"], row["rounds"]) == (1, 9)
    assert row["own"].estimate == pytest.approx(20_020 * 1e-4)
    assert [ratio.estimate for ratio in row["ratios"].values()] == pytest.approx([1 / 4, 1 / 2, 1 / 3])
    assert "Ours takes less time than PyTorch" in text_of(load(content()))
    slow = content()
    slow["steps"]["1"]["PyTorch, fused"] = [0.5e-4] * 9
    assert "Ours does not take less time than PyTorch." in text_of(load(slow))


def test_figures_are_drawn_from_the_trainings(load):
    figures = section.figures(load(content()))
    assert list(figures) == ["scratch-validation", "scratch-arrivals"]
    by_way = figures["scratch-validation"].axes[2]
    ends = {line.get_label(): line.get_xdata()[-1] for line in by_way.lines}
    assert ends["as PyTorch"] == pytest.approx(0.001 * 20 * 1001)
    assert ends["divided"] == pytest.approx(0.001 / 50 * 20 * 1001)
    text = text_of(load(content()))
    assert all(f"(figures/{name}.svg)" in text for name in figures)


# the study


SMALL = study.Settings(seeds=(1,), num_epochs=2, seconds=0.0)


def test_the_study_keeps_what_is_done(tmp_path, monkeypatch):
    found = study.measure(SMALL, tmp_path, ["training"])
    runs = {tuple(run["key"][1:3]): run for run in found["runs"]}
    assert list(runs) == study.TRAININGS
    assert [run["key"] for run in found["runs"]] == [["training", *key, 1] for key in study.TRAININGS]
    for cell in COMPARED.values():
        own, theirs = runs["tinynet", cell], runs["PyTorch", cell]
        assert own["epochs"] == [1, 2]
        assert own["errors"] == theirs["errors"]
        assert own["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    on_disk = json.loads((tmp_path / "scratch.json").read_text())
    assert on_disk["runs"][0]["arrival"] == "inf"
    assert section.context(on_disk)["cells"].keys() == CELLS.keys()
    monkeypatch.setattr(study, "train", None)  # nothing is trained again
    assert study.measure(SMALL, tmp_path, ["training"]) == on_disk
    with pytest.raises(ValueError, match=r"made with other settings: .* Delete the file to start anew"):
        study.measure(SMALL._replace(num_epochs=3), tmp_path, ["training"])


def test_committed_results_have_the_runs_of_the_study():
    found = section.load(RESULTS)
    jobs = [job for part in study.PARTS for job in study._jobs(study.FULL, part)]
    assert {tuple(run["key"]) for run in found["runs"]} == set(jobs)
    assert found["settings"]["num_epochs"] == study.FULL.num_epochs


def test_times_are_taken_with_one_thread_and_with_as_many_as_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "step_seconds", lambda seconds: {"tinynet": [torch.get_num_threads()]})
    before = torch.get_num_threads()
    with study.use_threads(2):
        found = study.measure(SMALL, tmp_path, ["steps"])
        assert torch.get_num_threads() == 2
    assert found["steps"] == {"1": {"tinynet": [1]}, "2": {"tinynet": [2]}}
    assert torch.get_num_threads() == before


def test_step_seconds_are_of_every_implementation(monkeypatch):
    monkeypatch.setattr(study, "NUM_POINTS", 100)
    found = study.step_seconds(0)
    assert list(found) == ["tinynet", *study.OPTIMIZERS]
    assert all(0 < value < 1 for values in found.values() for value in values)


def test_their_slopes_are_wrong_and_ours_are_not():
    for theirs, ours in study.derivative_errors().values():
        assert ours < 1e-9 < 0.1 < theirs


def test_their_layer_divides_its_own_gradients_and_not_what_it_passes_on():
    inputs, grad = torch.rand(50, 2, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64)
    options = {"dtype": torch.float64}
    layers = tinynet.Linear(2, 3, **options), study.DividingLinear(2, 3, **options)
    layers[1].load_state_dict(layers[0].params)
    passed = [(layer(inputs), layer.backward(grad))[1] for layer in layers]
    torch.testing.assert_close(*passed)
    torch.testing.assert_close(layers[0].grads, {name: 50 * g for name, g in layers[1].grads.items()})
    assert study.gradient_ratios() == pytest.approx([50, 50], rel=1e-10)


def test_a_division_is_a_smaller_learning_rate():
    net, other = study.build(3, "divided", dtype=torch.float64), study.build(3, dtype=torch.float64)
    steps = study.tinynet_step(net, 0.01), study.tinynet_step(other, 0.01 * study.rate_of("divided") / 0.001)
    for seed in range(5):
        inputs = torch.rand(50, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for step in steps:
            step(inputs, F.one_hot((inputs[:, 0] > 0.5).long(), 2).double())
    torch.testing.assert_close(net.params, other.params, rtol=1e-12, atol=1e-12)


def test_agreement_is_what_it_says():
    assert study.agreement("Tanh", "CrossEntropyLoss", "mean", 0.9, num_steps=100) < 1e-9
