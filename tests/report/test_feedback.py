"""The report's section on feedback, and the study behind it, in small."""

from __future__ import annotations

import json

import pytest
import torch

from fwdlib.data import Dataset, Source
from fwdlib.results import write_json
from report.names import DEPTH_MODES, DEPTHS, LEARNS, LOCAL_MODES, MODES, TASKS, feedback_file
from report.sections import feedback
from report.studies import feedback as study
from report.studies.common import RESULTS
from tests.report.records import MACHINE


def training(mode, seed, errors, purpose="measured", status="completed"):
    return {
        **{"power": 2, "feedback_power": 4, "seed": seed, "purpose": purpose, "lr": 4e-4, "b_lr": 1.6e-3},
        **{"status": status, "iterations": 20, "num_test": 1000, "train_loss": [2.3, 0.5], "test_loss": [2.3, 0.5]},
        "test_errors": [900, errors],
    }


def content(mode, errors, substitute=None, **changes):
    source = Source("digits" if substitute else "MNIST", "a file", substitute, f"{substitute}", "free", "someone", 0)
    runs = [training(mode, 100, 500, "tuning"), *(training(mode, seed, e) for seed, e in enumerate(errors, 1))]
    return {
        "runs": runs,
        "settings": {"train_mode": mode, "epochs": 10, "batch_size": 64, "optimizer": "Adam", "num_held_out": 10_000},
        "source": source._asdict(),
        "environment": MACHINE,
        **changes,
    }


def file_of(folder, mode, task="MNIST-2x800"):
    return folder / "feedback" / feedback_file(task, mode)


@pytest.fixture
def folder(tmp_path):
    for mode, errors in {"BP": (15, 17, 16), "FDFA": (18, 19, 20), "FG": (400, 420, 410)}.items():
        write_json(file_of(tmp_path, mode), content(mode, errors))
    return tmp_path


def test_only_what_was_measured_counts(folder):
    found = feedback.load(folder)
    assert list(found["studies"]) == ["MNIST-2x800"]
    assert list(found["studies"]["MNIST-2x800"]) == ["BP", "FDFA", "FG"]
    only_tuned = content("DFA", ())
    write_json(file_of(folder, "DFA"), only_tuned)
    assert feedback.load(folder)["studies"] == found["studies"]


def test_accuracies_and_how_far_fdfa_is_behind(folder):
    context = feedback.context(feedback.load(folder))
    (study,) = context["studies"]
    assert context["missing"] == [title for title in feedback.TITLES.values() if title != "MNIST, 2 x 800"]
    assert list(study["rows"]) == ["BP", "FDFA", "FG"]
    assert study["rows"]["BP"]["accuracy"].estimate == pytest.approx(98.4)
    assert study["rows"]["BP"]["b_lr"] is None
    assert study["rows"]["FDFA"]["b_lr"] == 1.6e-3
    assert study["behind"]["FDFA"].estimate == pytest.approx(0.3)
    assert study["behind"]["FDFA"].low < 0.3 < study["behind"]["FDFA"].high


def test_what_diverged_has_learned_nothing_and_is_not_drawn(folder):
    broken = content("FG", (400, 420))
    broken["runs"].append(training("FG", 3, 900, status="diverged"))
    write_json(file_of(folder, "FG"), broken)
    found = feedback.load(folder)
    row = feedback.context(found)["studies"][0]["rows"]["FG"]
    assert (row["diverged"], row["num_seeds"]) == (1, 3)
    assert row["accuracies"][3] == 0
    assert len(feedback.curves(found["studies"])["MNIST, 2 x 800"]["forward gradient"]) == 2


def test_times_are_ratios_to_backprop(folder):
    taken = {"BP": [0.01] * 9, "FDFA": [0.011] * 9}
    write_json(folder / "feedback" / "steps.json", {"seconds": {"MNIST-2x800": taken}, "environment": {}})
    steps = feedback.context(feedback.load(folder))["steps"]
    assert steps["rows"]["MNIST-2x800"]["FDFA"].estimate == pytest.approx(1.1)


# the study


@pytest.fixture
def small(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = 0.3 * torch.randn(120, 1, 4, 4, generator=draw) + torch.randn(3, 1, 4, 4, generator=draw)[labels]
    source = Source("blobs", "made up", None, "0", "free", "nobody", 0)
    data = Dataset(images[:96], labels[:96], images[96:], labels[96:], ("a", "b", "c"), source)
    monkeypatch.setattr(study.experiment, "load", lambda *_: data)
    monkeypatch.setitem(study.OPTIONS, "small", {"dataset": "MNIST", "n_layers": 1, "batch_size": 24})
    length = study.Length(2, 3, (1, 2), ("BP", "FDFA"))
    return study.FULL._replace(tasks={"small": length}, num_held_out=24)


def test_study_tunes_then_trains_and_keeps_what_is_done(small, tmp_path, monkeypatch):
    found = study.measure_mode(small, tmp_path, "small", "FDFA")
    measured = [run for run in found["runs"] if run["purpose"] == "measured"]
    tuned = [run for run in found["runs"] if run["purpose"] == "tuning" and run["seed"] == 100]
    assert [run["seed"] for run in measured] == [1, 2]
    assert {run["num_test"] for run in tuned} == {24}
    assert [run["iterations"] for run in measured] == [8, 8]
    assert all(len(run["test_errors"]) == 3 for run in measured)
    chosen = {(run["power"], run["feedback_power"]) for run in measured}
    best = min(tuned, key=lambda run: (run["test_errors"][-1], run["test_loss"][-1]))
    assert len(chosen) == 1
    assert best["test_errors"][-1] == min(run["test_errors"][-1] for run in tuned)
    on_disk = json.loads(file_of(tmp_path, "FDFA", "small").read_text())
    assert [run["test_errors"] for run in on_disk["runs"]] == [run["test_errors"] for run in found["runs"]]
    monkeypatch.setattr(study, "_train", None)  # nothing is trained again
    assert study.measure_mode(small, tmp_path, "small", "FDFA")["runs"] == on_disk["runs"]


def test_study_refuses_a_file_of_other_settings(small, tmp_path):
    study.measure_mode(small, tmp_path, "small", "BP")
    other = small._replace(tasks={"small": small.tasks["small"]._replace(epochs=3)})
    with pytest.raises(ValueError, match=r"made with other settings: .* Delete the file to start anew"):
        study.measure_mode(other, tmp_path, "small", "BP")


@pytest.mark.parametrize(
    ("parts", "modes", "is_timed"),
    [
        (["MNIST-cnn"], list(LOCAL_MODES), False),
        (["MNIST-2x800-FDFA", "steps"], ["FDFA"], True),
        (study.PARTS, [mode for length in study.SHORT.tasks.values() for mode in length.modes], True),
    ],
)
def test_parts_are_tasks_modes_and_steps(parts, modes, is_timed, tmp_path, monkeypatch):
    measured, timed = [], []
    monkeypatch.setattr(study, "measure_mode", lambda settings, folder, task, mode: measured.append(mode))
    monkeypatch.setattr(study, "measure_steps", lambda *_: timed.append(True))
    study.measure(study.SHORT, tmp_path, parts)
    assert measured == modes
    assert bool(timed) == is_timed


def test_sections_and_study_have_the_same_modes():
    assert MODES == tuple(study.MODES) == tuple(LEARNS)
    assert TASKS.keys() == feedback.TITLES.keys()
    assert study.FULL.tasks.keys() == TASKS.keys() | DEPTHS.keys() == study.OPTIONS.keys()
    modes = {name: task.modes for name, task in TASKS.items()} | dict.fromkeys(DEPTHS, DEPTH_MODES)
    assert {name: length.modes for name, length in study.FULL.tasks.items()} == modes


@pytest.mark.parametrize(("task", "mode"), [(name, mode) for name, task in TASKS.items() for mode in task.modes])
def test_the_committed_files_can_be_continued(task, mode, monkeypatch):
    if not (file := RESULTS / "feedback" / feedback_file(task, mode)).is_file():
        pytest.skip("not measured yet")
    monkeypatch.setattr(study.experiment, "load", lambda *_: Dataset(*[None] * 5, Source(*"abcdef", 0)))
    runs = json.loads(file.read_text())["runs"]
    monkeypatch.setattr(study, "_train", lambda *_: pytest.skip("not complete yet"))
    found = study.measure_mode(study.FULL, RESULTS, task, mode)
    assert found["runs"] == runs  # nothing is trained again
    assert len(feedback.measured(found)) == len(study.SEEDS)
