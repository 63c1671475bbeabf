"""The report's section on feedback, and the study behind it, in small."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fwdlib.data import Dataset, Source
from fwdlib.results import write_json
from report.page import context as page_context
from report.page import render
from report.sections import feedback
from report.studies import alignment
from report.studies.common import climb
from tests.report.test_build import make_results, section


def training(mode, seed, errors, purpose="measured", status="completed"):
    return {
        **{"power": 2, "feedback_power": 4, "seed": seed, "purpose": purpose, "lr": 4e-4, "b_lr": 1.6e-3},
        **{"status": status, "iterations": 20, "num_test": 1000, "train_loss": [2.3, 0.5], "test_loss": [2.3, 0.5]},
        "test_errors": [900, errors],
    }


def content(mode, errors, substitute=None, **changes):
    source = Source("digits" if substitute else "MNIST", "a file", substitute, f"{substitute}", "free", "someone", 0)
    runs = [training(mode, 100, 500, "tuning"), *(training(mode, seed, e) for seed, e in enumerate(errors, 1))]
    versions = {"python": "3.11.7", "torch": "2.15.0"}
    return {
        "runs": runs,
        "settings": {"train_mode": mode, "epochs": 10, "batch_size": 64, "optimizer": "Adam", "num_held_out": 10_000},
        "source": source._asdict(),
        "environment": {
            **{"versions": versions, "system": "Linux", "processor": "a CPU", "cores": 2, "threads": 2},
            **{"device": "cpu", "date": "2026-01-01"},
        },
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    for mode, errors in {"BP": (15, 17, 16), "FDFA": (18, 19, 20), "FG": (400, 420, 410)}.items():
        write_json(alignment.path_of("MNIST-2x800", mode, tmp_path / "feedback"), content(mode, errors))
    return tmp_path


def test_only_what_was_measured_counts(folder):
    found = feedback.load(folder)
    assert list(found["studies"]) == ["MNIST-2x800"]
    assert list(found["studies"]["MNIST-2x800"]) == ["BP", "FDFA", "FG"]
    only_tuned = content("DFA", ())
    write_json(alignment.path_of("MNIST-2x800", "DFA", folder / "feedback"), only_tuned)
    assert feedback.load(folder)["studies"] == found["studies"]
    assert feedback.context(feedback.load(folder / "nowhere")) is None


def test_accuracies_and_how_far_fdfa_is_behind(folder):
    (study,) = feedback.context(feedback.load(folder))["studies"]
    assert list(study["rows"]) == ["BP", "FDFA", "FG"]
    assert study["rows"]["BP"]["accuracy"].estimate == pytest.approx(98.4)
    assert study["rows"]["BP"]["b_lr"] is None
    assert study["rows"]["FDFA"]["b_lr"] == 1.6e-3
    assert study["behind"].estimate == pytest.approx(0.3)
    assert study["behind"].low < 0.3 < study["behind"].high


def test_what_diverged_has_learned_nothing_and_is_not_drawn(folder):
    broken = content("FG", (400, 420))
    broken["runs"].append(training("FG", 3, 900, status="diverged"))
    write_json(alignment.path_of("MNIST-2x800", "FG", folder / "feedback"), broken)
    found = feedback.load(folder)
    row = feedback.context(found)["studies"][0]["rows"]["FG"]
    assert (row["diverged"], row["num_seeds"]) == (1, 3)
    assert row["accuracies"][3] == 0
    assert len(feedback.curves(found["studies"])["MNIST, 2 x 800"]["forward gradient"]) == 2


def page(folder):
    return render.markdown(page_context.context(page_context.load(make_results(folder))))


def test_section_prints_the_table_and_the_verdict(folder):
    text = section(page(folder), "feedback")
    assert "| BP | 0.000400 |  | 98.40 [98.15, 98.65] | 3 |" in text
    assert "| FDFA | 0.000400 | 0.00160 | 98.10" in text
    assert "FDFA is 0.300" in text
    assert "points behind backprop" in text
    assert "What a step costs" not in text
    assert "Not measured here yet: DKP, DFA, FG-CV" in text


def test_section_prints_times_where_they_were_taken(folder):
    taken = {"BP": [0.01] * 9, "FDFA": [0.011] * 9}
    write_json(folder / "feedback" / "steps.json", {"seconds": {"MNIST-2x800": taken}, "environment": {}})
    assert "2 x 800: FDFA 1.10." in section(page(folder), "feedback")


def test_section_is_left_out_where_nothing_was_measured(tmp_path):
    assert "Learned feedback" not in page(tmp_path)


# the study


@pytest.fixture
def small(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = 0.3 * torch.randn(120, 1, 4, 4, generator=draw) + torch.randn(3, 1, 4, 4, generator=draw)[labels]
    source = Source("blobs", "made up", None, "0", "free", "nobody", 0)
    data = Dataset(images[:96], labels[:96], images[96:], labels[96:], ("a", "b", "c"), source)
    monkeypatch.setattr(alignment.experiment, "load", lambda *_: data)
    monkeypatch.setattr(alignment, "NUM_HELD_OUT", 24)
    study = alignment.Study({"dataset": "MNIST", "n_layers": 1, "batch_size": 24}, 2, 3, (1, 2), ("BP", "FDFA"))
    monkeypatch.setitem(alignment.STUDIES, "small", study)
    return data


def test_study_tunes_then_trains_and_keeps_what_is_done(small, tmp_path, monkeypatch):
    found = alignment.measure("small", "FDFA", tmp_path)
    measured = [run for run in found["runs"] if run["purpose"] == "measured"]
    tuned = [run for run in found["runs"] if run["purpose"] == "tuning"]
    assert [run["seed"] for run in measured] == [1, 2]
    assert {run["num_test"] for run in tuned} == {24}
    assert [run["iterations"] for run in measured] == [8, 8]
    assert all(len(run["test_errors"]) == 3 for run in measured)
    chosen = {(run["power"], run["feedback_power"]) for run in measured}
    best = min(tuned, key=lambda run: (run["test_errors"][-1], run["test_loss"][-1]))
    assert len(chosen) == 1
    assert best["test_errors"][-1] == min(run["test_errors"][-1] for run in tuned)
    on_disk = json.loads(alignment.path_of("small", "FDFA", tmp_path).read_text())
    assert [run["test_errors"] for run in on_disk["runs"]] == [run["test_errors"] for run in found["runs"]]
    monkeypatch.setattr(alignment, "_train", None)  # nothing is trained again
    assert alignment.measure("small", "FDFA", tmp_path)["runs"] == on_disk["runs"]


def test_study_refuses_a_file_of_other_settings(small, tmp_path, monkeypatch):
    alignment.measure("small", "BP", tmp_path)
    monkeypatch.setitem(alignment.STUDIES, "small", alignment.STUDIES["small"]._replace(epochs=3))
    with pytest.raises(ValueError, match=r"made with other settings: .* Delete the file to start anew"):
        alignment.measure("small", "BP", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"), [(["CIFAR"], "task must be one of 'MNIST-2x800'"), (["MNIST-cnn", "SGD"], "mode must be one")]
)
def test_study_refuses_other_words(words, message):
    with pytest.raises(ValueError, match=message):
        alignment.main(words)


@pytest.mark.parametrize(("bottom", "start"), [(3, 0), (-4, 0), (0, 0), (2, 5)])
def test_climb_finds_the_bottom_and_looks_at_little_else(bottom, start):
    seen = []

    def cost(power):
        seen.append(power)
        return (0, abs(power - bottom)) if abs(power - bottom) < 9 else (1, math.inf)

    assert climb(cost, start) == bottom
    assert set(seen) <= set(range(min(bottom, start) - 1, max(bottom, start) + 2))
