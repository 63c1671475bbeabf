"""The study of quality under a budget: what it trains, keeps and continues."""

from __future__ import annotations

import math

import pytest
import torch

from fwdlib.data import Dataset, Source
from report.studies import budget as study

SETTINGS = study.SHORT._replace(seeds=(1,), seconds=0.05, tuning_seconds=0.02, num_evaluations=2, batch_size=20)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(80) % 2
    inputs = targets.reshape(-1, 1) + 0.1 * torch.randn(80, 3, generator=draw)
    data = Dataset(inputs, targets, inputs, targets, ("a", "b"), Source("blobs", "a test", None, "", "", "", 0))
    monkeypatch.setattr(study, "flat_images", lambda *_: data)
    monkeypatch.setattr(study, "NETWORKS", {"MLP": (3, 8, 8, 2)})
    monkeypatch.setattr(study, "peaks_bytes", lambda function, arguments: [5_000_000] * len(arguments["methods"]))


def test_each_training_has_its_losses_by_the_time_of_its_steps(tmp_path):
    found = study.measure(SETTINGS, tmp_path, ["in-backward", "rank-one"])
    measured = [run for run in found["runs"] if run["purpose"] == "measured"]
    assert [run["method"] for run in measured] == ["in-backward", "rank-one"]
    for run in measured:
        assert run["steps"] > 2
        assert run["seconds"][0] == 0
        assert run["seconds"] == sorted(run["seconds"])
        assert run["seconds"][-1] >= SETTINGS.seconds
        assert len(run["train"]) == len(run["test"]) == 3
    assert measured[0]["train"][0] == measured[1]["train"][0]  # from the same start
    assert found["memory"] == {"MLP": {"in-backward": 5_000_000, "rank-one": 5_000_000}}


def test_the_rate_is_halved_until_a_whole_training_does_not_diverge(tmp_path, monkeypatch):
    def train(settings, data, network, method, power, seed, seconds):
        whole = seconds == settings.seconds
        loss = math.nan if whole and power == 5 else 1e4 if whole and power == 4 else abs(power - 6.0)
        return {"steps": 1, "seconds": [0, seconds], "train": [9.0, loss], "test": [9.0, loss], "accuracy": [0.5, 0.5]}

    monkeypatch.setattr(study, "_train", train)
    found = study.measure(SETTINGS, tmp_path, ["rank-one"])
    checked = [run["power"] for run in found["runs"] if run["purpose"] == "check"]
    assert checked == [5, 4, 3]  # half of the best of the short trainings, 6
    assert found["chosen"] == {"MLP": {"rank-one": 3}}
    assert {run["power"] for run in found["runs"] if run["purpose"] == "measured"} == {3}


def test_trainings_are_kept_and_not_run_twice(tmp_path, monkeypatch):
    first = study.measure(SETTINGS, tmp_path, ["two-point"])
    monkeypatch.setattr(study, "_train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(study, "peaks_bytes", lambda *_: pytest.fail("measured again"))
    assert len(study.measure(SETTINGS, tmp_path, ["two-point"])["runs"]) == len(first["runs"])
    with pytest.raises(ValueError, match="made with other settings"):
        study.measure(SETTINGS._replace(batch_size=10), tmp_path, ["two-point"])


@pytest.mark.parametrize("method", study.METHODS)
def test_every_method_lowers_the_loss_on_whatever_batch_the_tensors_hold(method):
    torch.manual_seed(0)
    model = study.perceptron(3, 8, 8, 2)
    inputs, targets = torch.zeros(40, 3), torch.zeros(40).long()
    step = study.make_step(method, model, inputs, targets, 0.003)
    targets.copy_(torch.arange(40) % 2)
    inputs.copy_(2 * targets.unsqueeze(1).float() - 1)
    first = float(step())
    for _ in range(400):
        last = float(step())
    assert last < first < 10


def test_a_training_that_diverges_ends_early(tmp_path, monkeypatch):
    def explodes(method, model, inputs, targets, learning_rate):
        def step():
            for p in model.parameters():
                p.data.fill_(math.nan)

        return step

    monkeypatch.setattr(study, "make_step", explodes)
    data = study.flat_images()
    run = study._train(SETTINGS, data, "MLP", "rank-one", 0, 1, 0.05)
    assert len(run["train"]) == 2
    assert math.isnan(run["train"][-1])
    assert math.isnan(run["test"][-1])


def test_memory_is_measured_of_every_method(monkeypatch):
    works = study._steps(list(study.METHODS), "MLP")
    assert len(works) == len(study.METHODS)
    for work in works:
        work()
