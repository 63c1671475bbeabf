"""Learning by bytes: what the study trains and keeps, and what the section reads from it."""

from __future__ import annotations

import math

import pytest
import torch

from fwdlib.data import Dataset, Source
from report.sections import traffic as section
from report.sections.claims_on_cost import CLAIMS
from report.sections.verdicts import judge
from report.studies import traffic as study

SETTINGS = study.SHORT._replace(methods=("DDP", "rank-one, K = 1"), seeds=(1,), num_steps=8, tuning_steps=3)


def test_evaluations_are_where_the_processes_have_the_same_parameters():
    assert study.moments(3000, 1000) == [0, 1000, 2000, 3000]
    assert study.moments(300, 1000) == [0]
    found = study.moments(2000, 10)
    assert all(step % 10 == 0 for step in found)
    assert found[-1] == 2000
    assert len(study.moments(2000, 1)) < 130


def run(method, seed, losses, sent):
    curves = {"train": losses, "test": losses, "accuracy": [1 - loss / 4 for loss in losses]}
    steps = list(range(len(losses)))
    where = {"method": method, "seed": seed, "purpose": "measured", "learning_rate": 0.1}
    return where | curves | {"steps": steps, "bytes": sent}


def results(with_silent=False):
    runs = []
    for seed in range(1, 7):
        lag = 0.01 * seed
        runs.append(run("DDP", seed, [2.0, 1.0 + lag, 0.5 + lag], [0, 2_000_000, 4_000_000]))
        runs.append(run("rank-one, K = 1", seed, [2.0, 1.9 + lag, 1.8 + lag], [0, 300, 600]))
        runs += [run("no exchange", seed, [2.0, 0.9 + lag, 0.8 + lag], [0, 0, 0])] if with_silent else []
    settings = study.FULL._asdict()
    return {"settings": settings, "environment": {}, "num_params": 269_322, "runs": runs}


def test_the_section_compares_at_equal_bytes():
    found = section.context(results())
    ddp, forward = found["rows"]["DDP"], found["rows"]["rank-one, K = 1"]
    assert ddp["steps"] == {1: 0, 100: 2}
    assert forward["steps"] == {1: 2, 100: 2}
    assert ddp["bytes"] == 2_000_000
    assert found["best"] == {1: "rank-one, K = 1", 100: "DDP"}
    assert found["behind"][1].high < 0 < found["behind"][100].low
    assert found["behind"][100].estimate == pytest.approx(1.3)


def test_a_rival_that_sends_nothing_comes_first_and_is_a_line_in_the_figure():
    found = section.context(results(with_silent=True))
    assert found["best"] == {1: "no exchange", 100: "DDP"}
    assert found["best_sending"] == {1: "rank-one, K = 1", 100: "DDP"}
    assert found["best_forward"][1] == "rank-one, K = 1"
    assert found["behind"][1].estimate == pytest.approx(1.0)
    assert found["silent"]["steps"][1] == 2
    (axes,) = section.figures(results(with_silent=True))["traffic"].axes
    (line,) = (line for line in axes.lines if line.get_label() == "no exchange")
    assert list(line.get_ydata()) == [pytest.approx(0.835)] * 2


def test_bytes_until_a_net_has_learned_judge_the_claim_on_a_megabyte():
    found = results()
    found["runs"] += [run("rank-one, K = 16", seed, [2.0, 0.6, 0.5], [0, 500_000, 900_000]) for seed in range(1, 7)]
    rows = section.context(found)["rows"]
    assert rows["rank-one, K = 16"]["arrival"] == (0.9, 0.9, 0.9)
    assert rows["rank-one, K = 1"]["arrival"].estimate == math.inf
    claim = next(claim for claim in CLAIMS if "need exchange only" in claim.text)
    verdict = judge(claim, {"traffic": {"rows": rows}})
    assert {case: outcome for case, (_, outcome) in verdict.cases.items()} == {
        "rank-one, K = 1": "inconclusive",
        "rank-one, K = 16": "holds",
    }
    assert verdict.outcome == "partly"


def test_a_training_that_diverged_has_learned_nothing():
    diverged = results()
    for each in diverged["runs"]:
        if each["method"] == "DDP":
            each["test"][-1] = "nan"
    found = section.context(diverged)
    assert found["rows"]["DDP"]["test"][100].estimate == math.inf
    assert found["behind"][100] is None  # no mean of differences
    assert found["best"][100] == "rank-one, K = 1"


def test_without_a_study_there_is_no_section(tmp_path):
    assert section.load(tmp_path) is None
    assert section.context(None) is None
    assert section.figures(None) == {}
    assert list(section.figures(results())) == ["traffic"]


@pytest.mark.slow  # starts processes
def test_the_study_trains_each_method_once_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "climb", lambda cost, power: cost(power) and power)  # a single tuning each
    found = study.measure(SETTINGS, tmp_path)
    measured = {each["method"]: each for each in found["runs"] if each["purpose"] == "measured"}
    assert list(measured) == list(SETTINGS.methods)
    assert measured["DDP"]["train"][0] == measured["rank-one, K = 1"]["train"][0]
    for each in measured.values():
        assert each["bytes"] == sorted(each["bytes"])
        assert each["bytes"][0] == 0
    assert measured["DDP"]["bytes"][-1] >= 1e6 * SETTINGS.megabytes or measured["DDP"]["steps"][-1] == 8
    assert measured["rank-one, K = 1"]["bytes"][-1] < 8 * 500
    monkeypatch.setattr(study, "start", lambda *_: pytest.fail("trained again"))
    assert study.measure(SETTINGS, tmp_path)["runs"] == found["runs"]


def test_data_are_loaded_in_the_order_of_the_seeds(monkeypatch):
    # In one process: every method sees the same batches.
    draw = torch.Generator().manual_seed(0)
    data = Dataset(
        *(torch.rand(40, 784, generator=draw), torch.arange(40) % 10),
        *(torch.rand(20, 784, generator=draw), torch.arange(20) % 10),
        tuple("0123456789"),
        Source("noise", "a test", None, "", "", "", 0),
    )
    seen = {}

    def make_step(method, *_):
        seen[method] = []
        return lambda inputs, _: seen[method].append(float(inputs.sum()))

    monkeypatch.setattr(study, "make_step", make_step)
    from fwdlib.trainer.processes import ALONE

    for method in ("DDP", "rank-one, K = 1"):
        study._train(SETTINGS, ALONE, data, method, 0.1, 1, 5)
    assert seen["DDP"] == seen["rank-one, K = 1"]
    assert len(seen["DDP"]) == 5
