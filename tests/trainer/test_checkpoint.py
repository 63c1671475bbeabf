"""Checkpoints: a run that was cut off ends as one that was not, bit for bit; what is refused; a full disk."""

import errno
import json
import os
import zipfile
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from fwdlib import training
from fwdlib.data import Dataset, Source
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.trainer.session import TrainerSession
from fwdlib.training import evaluate, make_optimizer
from tests.same import assert_same


class Averaging:
    """An estimator with a state: the mean of the gradients so far, plus noise of its own."""

    def __init__(self):
        self.reset(0)

    def reset(self, seed):
        self.mean, self.count, self.seed = {}, 0, seed

    def state_dict(self):
        return {"mean": self.mean, "count": self.count, "seed": self.seed}

    def load_state_dict(self, state):
        self.mean, self.count, self.seed = state["mean"], state["count"], state["seed"]

    def __call__(self, objective, params, *, generator=None):
        estimate = backprop_gradient(objective, params)
        self.count += 1
        for name, grad in estimate.grads.items():
            noise = torch.randn(grad.shape, generator=generator)
            self.mean[name] = self.mean.get(name, 0) + (grad + 0.1 * noise + self.seed) / self.count
        return estimate._replace(grads=dict(self.mean))


def jitter(inputs):
    return inputs + 0.1 * torch.rand(inputs.shape)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def adam(params):
    return torch.optim.Adam(params, lr=0.01, fused=True)


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(0)
    source = Source("noise", "a test", None, "0123456789abcdef", "", "", 0)
    halves = [(torch.randn(n, 4, generator=draw), torch.randint(3, (n,), generator=draw)) for n in (60, 30)]
    return Dataset(*halves[0], *halves[1], tuple("abc"), source)


@pytest.fixture
def train(data, tmp_path):
    """Train with everything that has a state; batches of 25 of 60, so that no pass ends with an evaluation."""
    defaults = {
        "optimizer": adam,
        "scheduler": partial(StepLR, step_size=1, gamma=0.5),
        "max_iterations": 13,
        "batch_size": 25,
        "evaluate_every": 3,
        "augment": jitter,
        "seeds": (7,),
        "progress": None,
        "checkpoint": tmp_path / "checkpoint.pt",
    }

    def call(build=network, estimator=backprop_gradient, data=data, **options):
        options = defaults | options
        session = TrainerSession(
            options.pop("checkpoint"), resume=options.pop("resume", False), settings=options.pop("settings", None)
        )
        return training.train(build, data, estimator, session=session, **options)

    return call


def content(path):
    return torch.load(path, weights_only=True)


def without_times(run):
    return repr(asdict(run) | {"step_seconds": len(run.step_seconds)})


def interrupting(after, base):
    """An estimator that is interrupted in the middle of its call number ``after``, as often as it gets there."""
    calls = []

    def estimator(objective, params, *, generator=None):
        calls.append(1)
        estimate = base(objective, params, generator=generator)
        if len(calls) == after:
            raise KeyboardInterrupt
        return estimate

    estimator.__name__ = base.__name__
    return estimator


# --- to go on --------------------------------------------------------------------------------------------------------


CASES = {
    "backprop": {},
    "forward gradient": {"estimator": partial(forward_gradient, num_tangents=2, tangents="normal")},
    "from factors": {"estimator": partial(forward_gradient, num_tangents=2), "optimizer": make_optimizer("SGD", 0.01)},
    "momentum, no scheduler": {"optimizer": sgd, "scheduler": None},
    "whole training part": {"batch_size": None, "augment": None},
}


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(train, tmp_path, name, stop):
    def interrupt(run):
        if len(run.test_loss) > stop:
            raise KeyboardInterrupt

    options = CASES[name]
    whole = train(checkpoint=tmp_path / "whole.pt", **options)
    with pytest.raises(KeyboardInterrupt):
        train(on_evaluation=interrupt, **options)
    torch.rand(3)  # whatever happens in between
    resumed = train(resume=True, **options)
    assert without_times(resumed.runs[0]) == without_times(whole.runs[0])
    assert len(resumed.runs[0].step_seconds) == 13
    assert_same(resumed.params, whole.params)
    assert_same(content(tmp_path / "checkpoint.pt"), content(tmp_path / "whole.pt"))


@pytest.mark.parametrize("after", [1, 2, 3, 4, 8, 14])
def test_it_may_be_interrupted_anywhere(train, tmp_path, after):
    def base(objective, params, *, generator=None):
        return forward_gradient(objective, params, generator=generator, tangents="normal")

    whole = train(estimator=base, checkpoint=tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(estimator=interrupting(after, base))
    resumed = train(estimator=base, resume=True)
    assert without_times(resumed.runs[0]) == without_times(whole.runs[0])
    assert_same(resumed.params, whole.params)
    assert_same(content(tmp_path / "checkpoint.pt"), content(tmp_path / "whole.pt"))


def test_it_may_be_interrupted_again_and_again(train, tmp_path):
    whole = train(checkpoint=tmp_path / "whole.pt")
    for evaluations in range(1, 6):

        def interrupt(run, evaluations=evaluations):
            if len(run.test_loss) == evaluations:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(on_evaluation=interrupt, resume=True)
    assert_same(train(resume=True).params, whole.params)
    assert_same(content(tmp_path / "checkpoint.pt"), content(tmp_path / "whole.pt"))


def test_the_state_of_an_estimator_is_kept(train, tmp_path):
    def interrupt(run):
        if run.iterations == 6:
            raise KeyboardInterrupt

    whole = train(estimator=Averaging(), checkpoint=tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(estimator=Averaging(), on_evaluation=interrupt)
    estimator = Averaging()
    assert_same(train(estimator=estimator, resume=True).params, whole.params)
    assert estimator.count == 14
    assert_same(content(tmp_path / "checkpoint.pt")["estimator"], content(tmp_path / "whole.pt")["estimator"])


def test_a_finished_run_is_not_trained_again(train):
    whole = train()
    again = train(resume=True)
    assert without_times(again.runs[0]) == without_times(whole.runs[0])
    assert again.runs[0].step_seconds == whole.runs[0].step_seconds
    assert again.seconds == whole.seconds
    assert_same(again.params, whole.params)


@pytest.mark.parametrize("short", [5, 6])
def test_a_finished_run_goes_on_to_more_iterations(train, tmp_path, short):
    whole = train(checkpoint=tmp_path / "whole.pt")
    train(max_iterations=short)
    longer = train(resume=True)
    assert without_times(longer.runs[0]) == without_times(whole.runs[0])
    assert_same(longer.params, whole.params)


def test_without_a_file_it_starts_from_the_beginning(train, tmp_path):
    assert_same(train(resume=True).params, train(checkpoint=None).params)


def test_a_checkpoint_is_there_after_each_evaluation_and_changes_nothing(train, tmp_path):
    seen = []
    path = tmp_path / "checkpoint.pt"
    with_file = train(on_evaluation=lambda run: seen.append(content(path)["progress"]["iteration"]))
    assert seen == [0, 3, 6, 9, 12, 13]
    assert_same(with_file.params, train(checkpoint=None).params)


def test_the_file_has_the_model_that_was_evaluated(train, data, tmp_path):
    history = train()
    model = network()
    model.load_state_dict(content(tmp_path / "checkpoint.pt")["model"])
    loss, errors = evaluate(model, dict(model.named_parameters()), data.test_inputs, data.test_targets)
    assert (loss.item(), errors.item()) == (history.runs[0].test_loss[-1], history.runs[0].test_errors[-1])


# --- what is refused -------------------------------------------------------------------------------------------------


def wider():
    return nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))


def deeper():
    return nn.Sequential(*network(), nn.ReLU(), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"build": wider}, r"the shape of 0\.weight is \(8, 4\) there, \(9, 4\) here; .*; and 3 more differ"),
        ({"build": deeper}, r"the shape of 6\.weight is nothing there, \(3, 3\) here"),
        ({"optimizer": sgd}, "the optimizer is Adam there, SGD here"),
        ({"optimizer": make_optimizer("Adam", 0.02, fused=True)}, "the optimizer's lr is 0.01 there, 0.02 here"),
        ({"scheduler": partial(StepLR, step_size=1, gamma=0.9)}, "the scheduler's gamma is 0.5 there, 0.9 here"),
        ({"scheduler": None}, "the scheduler is StepLR there, nothing here"),
        (
            {"estimator": partial(forward_gradient, tangents="normal")},
            "the estimator is backprop_gradient there, forward_gradient here",
        ),
        ({"estimator": Averaging()}, "the estimator is backprop_gradient there, Averaging here"),
        ({"batch_size": 20}, "batch_size is 25 there, 20 here"),
        ({"evaluate_every": 4}, "evaluate_every is 3 there, 4 here"),
        ({"seeds": (8,)}, "seed is 7 there, 8 here"),
        ({"settings": {"alpha": 0.5}}, "alpha is 1.0 there, 0.5 here"),
    ],
)
def test_a_checkpoint_of_a_different_run_says_what_differs(train, tmp_path, options, message):
    path = tmp_path / "checkpoint.pt"
    train(max_iterations=3, settings={"alpha": 1.0})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"checkpoint\.pt belongs to a different run: {message}.*to start"):
        train(resume=True, **{"settings": {"alpha": 1.0}, **options})
    assert path.read_bytes() == before


def test_the_data_belong_to_a_checkpoint(train, data):
    train(max_iterations=3)
    other = data._replace(source=data.source._replace(fingerprint="fedcba9876543210"))
    with pytest.raises(ValueError, match="the data is 0123456789abcdef there, fedcba9876543210 here"):
        train(data=other, resume=True)


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_middle(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def damage_weights(path):
    stored = content(path)["model"]["0.weight"].numpy().tobytes()
    whole = path.read_bytes()
    assert whole.count(stored) == 1
    path.write_bytes(whole.replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))


def empty(path):
    path.write_bytes(b"")


def words(path):
    path.write_text("not a checkpoint")


def other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


def other_content(path):
    torch.save({"weights": torch.zeros(3)}, path)


def dangerous_content(path):
    torch.save({"format": 1, "call": os.system}, path)


def without(*keys):
    """Return what takes an entry out of a checkpoint, by the keys that lead to it."""

    def damage(path):
        whole = content(path)
        inner = whole
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        torch.save(whole, path)

    damage.__name__ = f"without {'.'.join(keys)}"
    return damage


DAMAGE = [damage_end, damage_middle, damage_weights, empty, words, other_archive, other_content, dangerous_content]
DAMAGE += [without("about"), without("progress"), without("optimizer"), without("optimizer", "state")]
DAMAGE += [without("progress", "run"), without("progress", "run", "seed"), without("random numbers", "own")]
DAMAGE += [without("model", "0.weight")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_left_alone(train, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    train(max_iterations=3)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is (damaged|not a checkpoint).*: delete it to start anew"):
        train(resume=True)
    assert path.read_bytes() == before


def test_nobody_is_advised_to_load_what_was_refused(train, tmp_path):
    train(max_iterations=3)
    dangerous_content(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="they could run a program and are not loaded") as error:
        train(resume=True)
    assert "weights_only" not in str(error.value)
    assert "can still be loaded" not in str(error.value)


def test_a_checkpoint_beyond_the_iterations_asked_for(train):
    train(max_iterations=9)
    with pytest.raises(ValueError, match=r"after 9 iterations, so max_iterations must be at least that, got 8"):
        train(max_iterations=8, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 1)}, "a checkpoint holds a single seed, got 2"),
        ({"checkpoint": None, "resume": True}, "resume=True needs the checkpoint"),
    ],
)
def test_what_no_checkpoint_can_do(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_nothing_is_written_where_the_loss_is_not_finite(train, tmp_path):
    def estimator(objective, params):
        estimate = backprop_gradient(objective, params)
        calls.append(1)
        return estimate._replace(loss=torch.tensor(float("nan"))) if len(calls) == 10 else estimate

    calls = []
    history = train(estimator=estimator)  # nan at iteration 9, which is evaluated
    assert (history.runs[0].status, history.runs[0].iterations) == ("diverged", 9)
    kept = content(tmp_path / "checkpoint.pt")
    assert kept["progress"]["iteration"] == 6
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_full_disk_leaves_the_checkpoint_before_and_no_other_file(train, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train(max_iterations=3)
    before = path.read_bytes()

    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left on device") as error:
            train(resume=True)
    assert f"could not write {path}: " in str(error.value)
    assert "free some space" in str(error.value)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    whole = train(checkpoint=None)
    assert_same(train(resume=True).params, whole.params)


def test_what_a_checkpoint_says_of_its_run_is_plain_words(train, tmp_path):
    train(max_iterations=3)
    about = content(tmp_path / "checkpoint.pt")["about"]
    assert json.loads(json.dumps(about)) == about
    assert about["seed"] == "7"
    assert about["the shape of 1.running_mean"] == "(8,)"
