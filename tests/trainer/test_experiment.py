"""What `fwdlib train` trains and what it leaves behind: every mode and network; files that follow from the run."""

import csv
import json
import math
import os
import socket
from dataclasses import asdict, fields

import pytest
import torch
from torch import nn

from fwdlib import data as datasets
from fwdlib.data import Dataset, Source, load_images
from fwdlib.estimators import backprop_gradient
from fwdlib.history import Run
from fwdlib.locks import InUseError, held
from fwdlib.models import initialise, num_parameters
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.trainer import experiment
from fwdlib.trainer.experiment import BELONGS, COLUMNS, PASSING, crops, estimator, load, network, optimizer, rows, run
from fwdlib.trainer.settings import DATASETS, OPTIMIZER_NAMES, TRAIN_MODES, Settings
from fwdlib.training import train

pytestmark = pytest.mark.slow  # starts processes, or trains large networks

CPU = torch.device("cpu")
LEARNED = ("DKP", "FDFA", "FG-CV", "L-BP", "LG-BP", "LG-FG-A", "FG-GUIDED")


@pytest.fixture
def tiny(tmp_path):
    """Settings of a training that takes a moment."""
    defaults = {"dataset": "digits", "n_layers": 1, "epochs": 2, "batch_size": 256, "lr": 1e-3, "log_dir": tmp_path}

    def make(**changes):
        return Settings(**defaults | changes)

    return make


def images(channels=1, size=28, num_train=12, classes=10, name="MNIST"):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(num_train + 4, channels, size, size, generator=draw)
    targets = torch.arange(num_train + 4) % classes
    source = Source(name, "generated", None, "0123456789abcdef", "", "", 0)
    names = tuple(map(str, range(classes)))
    return Dataset(inputs[:num_train], targets[:num_train], inputs[num_train:], targets[num_train:], names, source)


@pytest.fixture
def generated(monkeypatch):
    """Generated images in the place of any data set."""

    def use(dataset):
        monkeypatch.setattr(experiment, "fetch", lambda name: None)
        monkeypatch.setattr(experiment, "load_images", lambda name, device: dataset)

    return use


def read(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "record.json").read_text())


# --- every mode, every network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TRAIN_MODES)
def test_every_mode_changes_every_weight_and_keeps_its_feedback(mode, tiny, tmp_path):
    settings = tiny(train_mode=mode, epochs=1, batch_size=479)
    record = run(settings, progress=False)
    assert record["status"] == "completed"
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    initial = initialise(network(settings, load(settings, CPU)), settings.seed).state_dict()
    assert content["model"].keys() == initial.keys()
    for name, value in content["model"].items():
        assert value.isfinite().all()
        assert not torch.equal(value, initial[name]), name
    assert ("estimator" in content) == (mode in ("DFA", "FG-A", *LEARNED))
    if mode in LEARNED:
        assert any(feedback.abs().sum() > 0 for feedback in content["estimator"]["feedback"])


@pytest.mark.parametrize("mode", TRAIN_MODES)
def test_every_mode_takes_a_step_of_the_cnn(mode, tiny):
    record = run(tiny(train_mode=mode, conv=True, batch_size=16, test_batch_size=20, dry_run=True), progress=False)
    assert (record["network"], record["iterations"], record["num_test"]) == ("cnn", 1, 20)
    assert record["epochs"][0]["train_loss"] < 10


def test_modes_learn(tiny, tmp_path):
    for mode in ("BP", "FDFA"):
        record = run(tiny(train_mode=mode, epochs=3, log_dir=tmp_path / mode), progress=False)
        assert record["epochs"][-1]["test_accuracy"] > 0.8


def test_the_choices_are_those_that_there_are():
    assert set(DATASETS) == set(datasets.IMAGE_SETS)
    for name in OPTIMIZER_NAMES:
        p = torch.ones(2)
        p.grad = torch.ones(2)
        made = optimizer(name, 0.1, 0.0)([p])
        made.step()
        assert made.param_groups[0]["weight_decay"] == 0
        assert p.max() < 1


@pytest.mark.parametrize(
    ("changes", "shape", "name", "num_params"),
    [
        ({"n_layers": 2}, (1, 28), "2x800", 784 * 800 + 800 * 800 + 800 * 10 + 1610 + 4 * 800),
        ({"dataset": "CIFAR10", "n_layers": 1}, (3, 32), "1x1000", 3072 * 1000 + 1000 * 10 + 1010 + 2 * 1000),
        ({"n_layers": 2, "norm": "none"}, (1, 28), "2x800-none", 784 * 800 + 800 * 800 + 800 * 10 + 1610),
        ({"conv": True}, (1, 28), "cnn", 390 + 15040 + 4000 * 128 + 128 + 1290 + 2 * (15 + 40 + 128)),
        ({"dataset": "CIFAR10", "conv": True}, (3, 32), "cnn", None),
        ({"mixer": "S/1/1"}, (1, 28), "mixer-S-1-1", 785 * 256 + 257 * 256 + 257 * 10),
    ],
)
def test_networks(changes, shape, name, num_params):
    settings = Settings(**changes)
    channels, size = shape
    net = network(settings, images(channels, size))()
    assert settings.network == name
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 10)
    assert num_params in (None, num_parameters(net))


def test_options_reach_the_estimators(tiny):
    data = images()
    options = {"num_tangents": 3, "b_lr": 0.02, "feedback_decay": 1e-6, "alpha": 0.5, "alpha_decay": 0.25}
    options |= {"num_groups": 8, "grid": 2}
    made = {}
    for mode in TRAIN_MODES:
        settings = tiny(train_mode=mode, **options)
        made[mode] = estimator(settings, network(settings, data), data, steps_per_epoch=2)
    assert made["BP"] is backprop_gradient
    model = network(settings, data)()
    objective = BatchLoss(model, data.train_inputs, data.train_targets)
    jvps = {mode: made[mode](objective, params_of(model)).jvps for mode in TRAIN_MODES}
    tangents = dict.fromkeys(("FG", "FG-RANK1", "FG-A", "FG-CV", "FDFA", "LG-FG-A"), 3)
    tangents["FG-GUIDED"] = 1  # one for each hidden layer
    assert {mode: len(values) for mode, values in jvps.items() if len(values)} == tangents
    for mode in LEARNED:
        (group,) = made[mode].optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.02, 1e-6)
    assert (made["LG-FG-A"].num_groups, made["LG-FG-A"].grid, made["L-BP"].grid) == (8, 2, 2)
    mixer = tiny(train_mode="LG-FG-A", mixer="M/1/16")
    local = estimator(mixer, network(mixer, data), data, steps_per_epoch=2)
    assert (local.num_groups, local.grid, local.head) == (16, 1, "mean")
    assert made["FG-CV"].alpha == pytest.approx(0.5 * 0.5)  # after one step of two
    made["FG-CV"](objective, params_of(model))
    assert made["FG-CV"].alpha == pytest.approx(0.5 * 0.25)


def test_only_the_learning_rate_of_the_weights_decays(tiny, tmp_path):
    run(tiny(train_mode="FDFA", epochs=3, gamma=0.5), progress=False)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.5**2)
    assert content["estimator"]["optimizer"]["param_groups"][0]["lr"] == 1e-4


# --- AlexNet ---------------------------------------------------------------------------------------------------------


def test_crops_are_drawn_for_each_image_by_itself():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = crops()(image.expand(4, 3, 32, 32))
        torch.manual_seed(0)
        again = crops()(image.expand(4, 3, 32, 32))
    assert first.shape == (4, 3, 224, 224)
    assert torch.equal(first, again)
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_alexnet_enlarges_test_images_and_takes_crops_as_they_are(generated):
    net = experiment.enlarging_alexnet(100)
    assert isinstance(net[0], nn.Upsample)
    crop = torch.rand(1, 3, 224, 224)
    assert torch.equal(net[0](crop), crop)
    assert net[0](torch.rand(1, 3, 32, 32)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("mode", ["BP", "FDFA"])
def test_alexnet_takes_a_step_on_crops(mode, generated, tmp_path):
    generated(images(3, 32, num_train=4, classes=100, name="CIFAR100"))
    settings = Settings(dataset="CIFAR100", train_mode=mode, batch_size=4, dry_run=True, log_dir=tmp_path)
    record = run(settings, progress=False)
    assert (record["network"], record["iterations"]) == ("alexnet", 1)
    assert record["epochs"][0]["train_loss"] < 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", TRAIN_MODES)
def test_alexnet_takes_an_epoch_by_every_mode(mode, generated):
    generated(images(3, 32, num_train=4, classes=10, name="CIFAR100"))
    settings = Settings(dataset="CIFAR100", train_mode=mode, batch_size=2)
    data = load(settings, CPU)
    build = network(settings, data)
    before = initialise(build, 0).state_dict()
    options = {"optimizer": "Adam", "learning_rate": 1e-4, "batch_size": 2, "augment": crops()}
    options |= {"max_iterations": 2, "evaluate_every": 2, "progress": None}
    history = train(build, data, estimator(settings, build, data, 2), **options)
    (run_,), (params,) = history.runs, history.params
    assert run_.status == "completed"
    assert all(map(math.isfinite, run_.train_loss))
    assert not any(torch.equal(p, before[name]) for name, p in params.items() if name.endswith("weight"))


# --- data ------------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_to_minus_one_to_one():
    data, raw = load(Settings(dataset="digits"), CPU), load_images("digits")
    for scaled, pixels in ((data.train_inputs, raw.train_inputs), (data.test_inputs, raw.test_inputs)):
        torch.testing.assert_close(scaled, 2 * pixels - 1)
    assert data.source == raw.source


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_row_and_a_record_for_each_epoch(tiny, tmp_path):
    returned = run(tiny(epochs=3, gamma=0.5), progress=False)
    table, record = read(tmp_path)
    assert tuple(table[0]) == COLUMNS
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert [float(row["learning_rate"]) for row in table] == [1e-3, 5e-4, 2.5e-4]
    for row, epoch, unrounded in zip(table, record["epochs"], returned["epochs"], strict=True):
        assert {name: float(value) for name, value in row.items()} == epoch
        assert epoch == pytest.approx(unrounded, rel=1e-5)
        assert epoch["images_per_second"] == pytest.approx(5 * 256 / epoch["seconds"], rel=1e-4)
    assert (record["status"], record["iterations"], record["steps_per_epoch"]) == ("completed", 15, 5)
    assert (record["num_train"], record["num_test"], record["network"]) == (1437, 360, "1x800")
    assert record["source"]["name"] == "digits"
    assert record["environment"]["versions"]["torch"]
    assert record["settings"] == {
        name: value for name, value in asdict(tiny(epochs=3, gamma=0.5)).items() if name not in PASSING
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.svg").read_text().count("<svg") == 1


def test_files_are_there_after_each_epoch(tiny, tmp_path, monkeypatch):
    seen = []
    real = experiment.write_logs

    def spy(folder, record, run):
        real(folder, record, run)
        progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
        seen.append((len(read(tmp_path)[0]), read(tmp_path)[1]["status"], progress["iteration"]))

    monkeypatch.setattr(experiment, "write_logs", spy)
    run(tiny(), progress=False)
    assert seen == [(0, "running", 0), (1, "running", 5), (2, "completed", 10)]


def test_a_run_goes_on_to_more_epochs_as_if_it_had_been_asked_for_them(tiny, tmp_path):
    run(tiny(epochs=1), progress=False)
    run(tiny(epochs=2, resume=True), progress=False)
    run(tiny(epochs=2, log_dir=tmp_path / "whole"), progress=False)
    models = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (tmp_path, tmp_path / "whole")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    losses = [[row["test_loss"] for row in read(folder)[0]] for folder in (tmp_path, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_parts_of_files_that_a_kill_left_are_removed(tiny, tmp_path):
    (tmp_path / ".checkpoint.pt.abc.part").write_bytes(b"half")
    run(tiny(epochs=1), progress=False)
    assert list(tmp_path.glob("*.part")) == []


def test_two_runs_do_not_write_into_one_folder(tiny, tmp_path):
    run(tiny(), progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with held(tmp_path), pytest.raises(InUseError, match="in use by process"):
        run(tiny(resume=True, epochs=3), progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_does_not_begin_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        run(tiny(batch_size=100_000, log_dir=tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()


def test_a_restart_goes_on_with_what_its_own_launch_has_begun_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    begun = tmp_path / experiment.BEGUN
    launch = f"{socket.gethostname()} {os.getppid()}"
    run(tiny(epochs=1), progress=False)
    assert not begun.exists()
    for other in (None, "another-host 1", launch):  # the last has an old date: of a process that had the same number
        if other is not None:
            begun.write_text(other)
            os.utime(begun, (1e9, 1e9))
        with pytest.raises(ValueError, match="add --resume"):
            run(tiny(), progress=False)
    begun.write_text(launch)
    assert len(run(tiny(), progress=False)["epochs"]) == 2


def test_rows_follow_from_the_run():
    record = {"settings": {"batch_size": 10, "lr": 0.1, "gamma": 0.5}, "num_test": 4}
    seconds = [0.5, 1.5, 1.0, 1.0]
    done = Run(0, "completed", 4, [3.0, 2.0, 1.0], [3.5, 2.5, 1.5], [4, 2, 1], seconds, every=2)
    assert [tuple(row.values()) for row in rows(done, record)] == [
        (1, 2.0, 2.5, 0.5, 2.0, 10.0, 0.1),
        (2, 1.0, 1.5, 0.75, 2.0, 10.0, 0.05),
    ]
    started = Run(0, "", 0, [3.0], [3.5], [4], [], every=2)
    assert rows(started, record) == []
    diverged = Run(0, "diverged", 3, [3.0, 2.0, float("nan")], [3.5, 2.5, 1.0], [4, 2, 4], seconds[:3], every=2)
    assert len(rows(diverged, record)) == 1


def test_what_diverges_later_keeps_the_epochs_before(tiny, tmp_path, monkeypatch):
    def torn(objective, params):
        calls.append(1)
        estimate = backprop_gradient(objective, params)
        return estimate._replace(loss=torch.tensor(float("nan"))) if len(calls) == 14 else estimate

    calls = []
    monkeypatch.setattr(experiment, "backprop_gradient", torn)
    with pytest.raises(ValueError, match=r"its loss was nan after 13 steps, in epoch 3\. .*checkpoint of epoch 2 in"):
        run(tiny(train_mode="BP", epochs=4), progress=False)
    table, record = read(tmp_path)
    assert len(table) == 2
    assert record["status"] == "diverged"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["iteration"] == 10


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_is_known_to_the_checkpoint_or_makes_no_difference():
    by_train = {"n_layers", "conv", "batch_size", "optimizer", "lr", "gamma", "weight_decay", "seed", "device"}
    free = {*PASSING, "epochs", "test_batch_size"}
    assert {field.name for field in fields(Settings)} == by_train | free | set(BELONGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "dataset must be one of 'MNIST', .*, got 'mnist'"),
        ({"train_mode": "FA"}, "train_mode must be one of 'BP', .*'FDFA', .*, got 'FA'"),
        ({"optimizer": "LBFGS"}, "optimizer must be one of 'Adam', .*, got 'LBFGS'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"feedback_decay": -1.0}, "feedback_decay must be 0 or a finite number above it, got -1.0"),
        ({"alpha_decay": 1.1}, "alpha_decay must be between 0 and 1, got 1.1"),
    ],
)
def test_settings_out_of_their_range(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Settings(**changes)
