"""The report's section on cost, made from small made-up measurements."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fwdlib.bench.compared import MODELS
from fwdlib.data import Dataset, Source
from report.names import DESCENT
from report.page import render
from report.sections import cost
from report.studies import descent as study
from report.studies.common import RESULTS
from tests.report.records import MACHINE
from tests.report.test_budget_section import made_up

ROUNDS = 9
RIVALS = ("in-backward", "L checkpoints", "two-point")


def rounds(seconds):
    return [seconds * (1 + 0.01 * i) for i in range(ROUNDS)]


def entry(title, structured=0.6, one_graph=0.9, memory=None):
    """Backprop 1 ms eager and 0.8 ms compiled, so 0.8 is what all is compared with."""
    milliseconds = {
        "forward": 0.2,
        "backprop, eager": 1.0,
        "backprop, compiled": 0.8,
        "backprop one graph, compiled": one_graph,
        "forward gradient, eager": 2.0,
        "rank-one, eager": 1.2,
        "rank-one, compiled": structured,
        "rank-one K=4, eager": 1.5,
        "rank-one K=16, eager": 3.0,
        "per-example, eager": 0.9,
        "activity, eager": 0.95,
    }
    return {
        "title": title,
        "batch": 64,
        "num_params": 1234,
        "reference": "backprop, compiled",
        "seconds": {name: rounds(value / 1e3) for name, value in milliseconds.items()},
        "skipped": {},
        **({"memory": memory} if memory else {}),
    }


@pytest.fixture
def bench():
    memory = {"backprop": 400_000_000, "forward gradient": 900_000_000, "rank-one": 3_000_000}
    return {
        "environment": MACHINE | {"device": "cpu"},
        "quick": False,
        "settings": {"width": 1024},
        "models": {"mnist-mlp": entry("the MLP"), "paper-cnn": entry("the CNN", structured=0.88, one_graph=0.5)},
        "depth": {"1": entry("1 layer", memory=memory), "100": entry("100 layers", memory=memory)},
    }


@pytest.fixture
def descent(bench):
    def run(method, seed, status, iterations, purpose="measured"):
        return {
            "method": method,
            "power": 3,
            "seed": seed,
            "purpose": purpose,
            "learning_rate": 8e-4,
            "status": status,
            "iterations": iterations,
            "train_loss": [2.3, 0.4 if status == "reached" else "nan"],
        }

    runs = [run("backprop", seed, "reached", 100 + 20 * seed) for seed in range(5)]
    runs += [run("backprop", 100, "reached", 7, "tuning")]
    runs += [run("rank-one", seed, *(("reached", 5000) if seed < 2 else ("diverged", 9000))) for seed in range(5)]
    settings = {"threshold": 0.5, "batch_size": 64, "max_iterations": 20_000, "tuning_iterations": 3000}
    settings |= {"evaluate_every": 20, "data": {"name": "MNIST", "substitute_for": None}}
    return {"runs": runs, "settings": settings, "environment": bench["environment"]}


def test_ratios_are_to_the_fastest_backprop_that_torch_offers_and_by_the_faster_form(bench):
    model, other = cost.context({"bench": bench, "descent": None})["bench"]
    assert model["structured"]["rank-one"]["ratio"].estimate == pytest.approx(0.75)
    assert model["structured"]["rank-one"]["mode"] == "compiled"
    assert model["structured"]["per-example"]["ratio"].estimate == pytest.approx(0.9 / 0.8)
    assert model["textbook"].estimate == pytest.approx(2.5)
    assert (model["over_plain"], model["reference"]) == (pytest.approx(4.0), "compiled")
    assert model["over_one_graph"].estimate == pytest.approx(0.6 / 0.9)
    assert other["structured"]["rank-one"]["ratio"].estimate == pytest.approx(1.1)


def test_width_and_batch_say_where_rank_one_is_faster_and_what_the_strictest_rival_needs(bench):
    assert cost.context({"bench": bench, "descent": None})["sweeps"] == {}
    memory = {"backprop": 9_000_000, "in-backward": 4_000_000, "L checkpoints": 2_000_000, "rank-one": 3_000_000}
    bench["settings"]["mlp"] = {"layers": 4, "width": 256}
    bench["width"] = {"16": entry("narrow", structured=0.88), "64": entry("wide", memory=memory)}
    for of in bench["width"].values():
        of["seconds"] |= {name: rounds(2e-3) for name in ("in-backward, eager", "L checkpoints, eager")}
    found = cost.context({"bench": bench, "descent": None})
    narrow, wide = found["sweeps"]["width"]
    assert (narrow["value"], narrow["is_faster"], narrow["memory"]) == (16, False, None)
    assert (wide["rank_one"].estimate, wide["is_faster"], wide["mode"]) == (pytest.approx(0.75), True, "compiled")
    assert (wide["memory"]["exact"]["name"], wide["memory"]["exact"]["memory"]) == ("L checkpoints", 2_000_000)
    text = _text_of(found)
    assert "below 1 at width 64." in text
    assert "| width 64 | backprop, compiled | 0.750" in text
    assert "| 3.00 MB | 2.00 MB (L checkpoints) |" in text
    assert list(cost.figures({"bench": bench})) == ["cost", "depth", "sweeps"]


def test_the_verdicts_count_models_by_their_intervals(bench):
    found = cost.context({"bench": bench, "descent": None})
    assert found["all_faster"] == found["graph_faster"] == ["the MLP"]
    assert found["textbook_slower"] == ["the MLP", "the CNN"]
    assert {t["k"]: t["ratio"].estimate for t in found["tangents"]} == pytest.approx({4: 1.25, 16: 2.5})


def with_rivals(bench):
    """At depth, checkpoints need 20 MB and rank-one tangents 3 MB; on the CNN two losses need less than rank-one."""
    times = {"in-backward": 1.0, "L checkpoints": 1.5, "two-point": 0.6}
    held = {"in-backward": 50_000_000, "L checkpoints": 20_000_000, "two-point": 4_000_000}
    for of in [*bench["models"].values(), *bench["depth"].values()]:
        of["seconds"] |= {f"{name}, eager": rounds(value / 1e3) for name, value in times.items()}
        of["seconds"] |= {"rank-one with Adam, eager": rounds(1.8e-3), "backprop with Adam, eager": rounds(2e-3)}
        of["compile_seconds"] = {"rank-one, compiled": 12.0}
        of["memory"] = {"backprop": 400_000_000, "forward gradient": 900_000_000, "rank-one": 3_000_000, **held}
    bench["models"]["paper-cnn"]["memory"]["two-point"] = 1_000_000
    return bench


def test_the_strictest_rival_is_the_backprop_with_the_least_memory(bench):
    found = cost.context({"bench": with_rivals(bench), "descent": None})
    rivals = found["depth"]["rivals"]
    assert rivals["exact"]["name"] == "L checkpoints"
    assert rivals["exact"]["share"] == pytest.approx(0.15)
    assert rivals["exact"]["ratio"].estimate == pytest.approx(1.2 / 1.5)
    assert rivals["smallest"]["name"] == "two-point"
    assert found["smaller"] == ["the CNN"]
    assert [m["title"] for m in found["not_faster"]] == ["the CNN"]
    assert found["bench"][0]["dropped_in"]["Adam"].estimate == pytest.approx(0.9)
    assert found["bench"][0]["compile_seconds"] == {"rank-one": 12.0}
    assert "rank-one" in found["rivals"]["the MLP"]["front"]


def test_a_bench_without_rivals_names_none(bench):
    found = cost.context({"bench": bench, "descent": None})
    assert found["depth"]["rivals"] is None
    assert found["rivals"] == {}


@pytest.mark.parametrize("path", sorted(Path(cost.__file__).parent.glob("*.md.j2")), ids=lambda path: path.name)
def test_no_share_of_backprops_memory_without_the_strictest_rival_beside_it(path):
    for line in path.read_text("utf-8").splitlines():
        if re.search("of (backprop's|its) memory|% of backprop's", line):
            assert re.search("in the backward pass|in-backward", line), line


def test_figures_are_drawn_of_what_was_measured(bench):
    assert list(cost.figures({"bench": bench})) == ["cost", "depth"]
    assert list(cost.figures({"bench": with_rivals(bench)})) == ["cost", "front", "depth"]


def test_time_to_the_loss_is_steps_times_the_fastest_step(bench, descent):
    first, second = cost.context({"bench": bench, "descent": descent})["descent"]["rows"]
    assert (first["reached"], first["num_seeds"], first["steps"].estimate) == (5, 5, 140)
    assert first["range"][::2] == (100, 180)
    assert first["seconds"] == pytest.approx(140 * 0.8e-3 * 1.04)  # the middle round of nine
    assert (second["reached"], second["diverged"], second["steps"].estimate) == (2, 3, math.inf)
    assert second["at_least"] == pytest.approx(9000 * 0.6e-3 * 1.04)


def test_a_method_that_a_short_benchmark_did_not_time_has_no_row(bench, descent):
    for run in descent["runs"]:
        if run["method"] != "backprop":
            run["method"] = "rank-one, K = 7"
    (row,) = cost.context({"bench": bench, "descent": descent})["descent"]["rows"]
    assert row["method"] == "backprop"


@pytest.mark.parametrize(("best", "start"), [(5, 2), (5, 7), (5, 5)])
def test_tuning_walks_to_the_best_learning_rate_of_the_grid(best, start):
    tried = []

    def run(power, seed, purpose, max_iterations):
        tried.append(power)
        assert (seed, purpose) == (100, "tuning")
        if power > best + 1:
            return {"status": "diverged", "iterations": 10, "train_loss": [math.nan]}
        return {"status": "not reached", "iterations": max_iterations, "train_loss": [2.0 + abs(power - best)]}

    assert study.tune(run, start, study.FULL) == best
    assert min(tried) >= min(best, start) - 1


def test_of_those_that_arrive_the_one_with_fewer_steps_is_better():
    def run(power, *_):
        return {"status": "reached", "iterations": {3: 300, 4: 100, 5: 200}[power], "train_loss": [0.4]}

    assert study.tune(run, 3, study.FULL) == 4


def test_the_committed_measurements_are_whole():
    measured = cost.load(RESULTS)
    assert set(measured["bench"]["models"]) <= set(MODELS)
    assert not measured["bench"]["quick"]
    assert "100" in measured["bench"]["depth"]
    assert measured["descent"]["settings"]["data"]["name"] == "MNIST"


def test_descents_are_kept_one_by_one_and_not_run_twice(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(80) % 2
    inputs = targets.unsqueeze(1) + 0.1 * torch.randn(80, 3, generator=draw)
    data = Dataset(inputs, targets, inputs, targets, ("a", "b"), Source("blobs", "a test", None, "", "", "", 0))
    monkeypatch.setattr(study, "load_images", lambda *_, **__: data)
    monkeypatch.setattr(study, "build", lambda: nn.Linear(3, 2))
    settings = study.FULL._replace(batch_size=20, max_iterations=200, tuning_iterations=40)
    first = study.measure(settings, tmp_path, ["backprop"])
    measured = [run for run in first["runs"] if run["purpose"] == "measured"]
    assert [run["seed"] for run in measured] == list(settings.seeds)
    assert len({run["learning_rate"] for run in measured}) == 1

    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("trained again"))
    again = study.measure(settings, tmp_path, ["backprop"])
    assert len(again["runs"]) == len(first["runs"])
    with pytest.raises(ValueError, match=r"made with other settings: .* Delete the file to start anew"):
        study.measure(settings._replace(threshold=0.1), tmp_path, ["backprop"])


def test_the_committed_descents_can_be_continued(monkeypatch):
    source = Source(**json.loads((RESULTS / DESCENT).read_text())["settings"]["data"])
    monkeypatch.setattr(study, "load_images", lambda *_, **__: Dataset(*[None] * 5, source))
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("trained again"))
    methods = ["backprop", "rank-one", "per-example", "activity"]
    found = study.measure(study.FULL, RESULTS, methods)
    assert {run["method"] for run in found["runs"]} == set(methods)


def test_the_section_begins_with_the_rivals_that_win(bench):
    found = cost.context({"bench": with_rivals(bench), "descent": None, "budget": made_up()})
    text = render.environment().get_template("sections/cost.md.j2").render(cost=found, infinity=math.inf)
    first = text.split("\n\n")[1]
    assert first.startswith("**Where a rival wins.** On the CNN (")
    assert "One of these takes less memory than rank-one tangents on 0 of 2 models; with a difference" in first
    assert "as a rival, too, on 1: the CNN (1.00 MB with two\\-point, 3.00 MB with rank-one)" in first
    assert "% of backprop's, but 15 % of what the strictest rival needs (L checkpoints" in text
    assert "figures/front.svg" in text
    assert "On the MLP L checkpoints has the lowest test loss" in text
    assert "the strictest rival" not in _text_of(cost.context({"bench": _without_rivals(bench), "descent": None}))


def _text_of(found):
    return render.environment().get_template("sections/cost.md.j2").render(cost=found, infinity=math.inf)


def _without_rivals(bench):
    for of in [*bench["models"].values(), *bench["depth"].values()]:
        of["memory"] = {name: held for name, held in of["memory"].items() if name not in RIVALS}
    return bench
