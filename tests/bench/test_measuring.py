"""The benchmark: what it times, in what order, what it leaves out and says so, and memory in processes of their own."""

from __future__ import annotations

import copy
import itertools
import json
import time

import pytest
import torch
from torch import nn

from fwdlib import cli, runtime
from fwdlib.bench import compared, measuring
from fwdlib.bench.compared import MODELS, Variant, find_task, make_step, prepare, variants
from fwdlib.models import num_parameters

TINY = measuring.Settings(0.02, 6, 6, 1e-4, 8, (1, 2))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(runtime, "has_compiler", lambda: False)


@pytest.fixture(autouse=True)
def same_allocator(monkeypatch):
    """What keep_freed_memory asks for holds for the whole process, that of the other tests as well."""
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: False)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(measuring, "FULL", TINY)
    monkeypatch.setattr(measuring, "QUICK", TINY)


# --- interleave ------------------------------------------------------------------------------------------------------


def test_methods_take_turns_each_with_an_untimed_call_and_a_block():
    calls = []
    methods = {name: (lambda name=name: (calls.append(name), time.sleep(0.002))) for name in "abc"}
    found = measuring.interleave(methods, seconds=0, min_rounds=4, max_rounds=9, block_seconds=0.005)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys("abc", 4)
    assert all(0.002 <= value < 0.1 for seconds in found.values() for value in seconds)
    timed = calls[6:]  # two calls each say how many fill a block
    for name in "abc":
        rounds, rest = divmod(timed.count(name), 4)
        assert rest == 0
        assert 2 <= rounds <= 4  # the untimed one, and one to three of 2 ms or more to fill 5
    assert len(list(itertools.groupby(timed))) >= 12 - 3  # turns; the last of a round may be the first of the next


def test_slow_calls_go_without_the_untimed_one():
    calls = []
    methods = {"slow": lambda: (calls.append(1), time.sleep(0.004))}
    found = measuring.interleave(methods, seconds=0, min_rounds=3, block_seconds=1e-4)
    assert len(calls) == 2 + 3
    assert len(found["slow"]) == 3


def test_rounds_end_with_the_time_or_at_the_most():
    methods = {"a": lambda: time.sleep(0.001)}
    assert len(measuring.interleave(methods, seconds=60, max_rounds=8, block_seconds=1e-4)["a"]) == 8
    started = time.perf_counter()
    rounds = measuring.interleave(methods, seconds=0.05, min_rounds=1, max_rounds=10**6, block_seconds=1e-4)["a"]
    assert 0.05 <= time.perf_counter() - started < 5
    assert len(rounds) > 1


def test_the_device_is_waited_for_before_and_after_each_block():
    events = []
    measuring.interleave(
        {"a": lambda: events.append("call") or time.sleep(0.002)},
        seconds=0,
        min_rounds=2,
        block_seconds=1e-4,
        synchronize=lambda: events.append("wait"),
    )
    assert events == ["wait", "call", "wait"] * 4


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("penguins-logistic", 15),
        ("penguins-mlp", 867),
        ("mnist-logistic", 7850),
        ("mnist-mlp", 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 10250),
        ("kmnist-cnn", 50986),
        ("paper-cnn", 640 + 3 * (64 * 64 * 9 + 64) + 3136 * 1024 + 1024 + 10250),
        ("3x16", 3 * (16 * 16 + 16) + 170),
    ],
)
def test_models(name, num_params):
    task = find_task(name)
    model, inputs, targets = prepare(task, batch=2)
    assert num_parameters(model) == num_params
    assert model.training
    assert model(inputs).shape == (2, task.num_classes)
    assert targets.max() < task.num_classes


@pytest.mark.parametrize("name", ["mnist", "20x", "x256", "-1x8", "20x256x3"])
def test_unknown_models_are_answered_with_the_known(name):
    with pytest.raises(ValueError, match=name) as error:
        find_task(name)
    assert all(known in str(error.value) for known in MODELS)


def test_signals_keep_their_size_through_a_hundred_layers():
    model, inputs, _ = prepare(find_task("100x64"))
    for module in model:
        inputs = module(inputs)
        assert 1e-3 < inputs.std() < 1e3


def test_all_forms_are_there_once():
    keys = [str(variant) for variant in variants(nn.Conv2d(1, 1, 1))]
    assert len(set(keys)) == len(keys)
    both = (
        "backprop",
        "backprop channels_last",
        "rank-one",
        "rank-one channels_last",
        "per-example",
        "activity",
        "rank-one K=4",
        "rank-one K=16",
    )
    expected = {f"{name}, {mode}" for name in both for mode in ("eager", "compiled")}
    assert set(keys) == expected | {"forward gradient, eager", "backprop one graph, compiled"}
    assert not any("channels_last" in str(variant) for variant in variants(nn.Linear(1, 1)))


def test_quick_is_less_and_compiles_less():
    full, quick = variants(nn.Linear(1, 1)), variants(nn.Linear(1, 1), quick=True)
    assert set(quick) < set(full)
    assert {variant.method for variant in quick if variant.compiled} == {"backprop", "rank-one"}
    assert {variant.method for variant in quick} == set(compared.METHODS)


@pytest.mark.parametrize("method", compared.METHODS)
def test_a_step_trains_the_model_in_place(method, monkeypatch):
    model, inputs, targets = prepare(find_task("penguins-mlp"), batch=6)
    monkeypatch.setattr(compared, "LEARNING_RATE", 1e-3)
    before = copy.deepcopy(model.state_dict())
    loss = make_step(Variant(method), model, inputs, targets)()
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(_at(before)(inputs), targets).item(), rel=1e-5)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _at(state) -> nn.Module:
    model = find_task("penguins-mlp").build()
    model.load_state_dict(state)
    return model


def test_backprop_takes_the_step_of_gradient_descent(monkeypatch):
    monkeypatch.setattr(compared, "LEARNING_RATE", 0.1)
    model, inputs, targets = prepare(find_task("kmnist-cnn"), batch=3)
    other = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(other(inputs), targets)
    grads = torch.autograd.grad(loss, list(other.parameters()))
    make_step(Variant("backprop"), model, inputs, targets)()
    for p, q, grad in zip(model.parameters(), other.parameters(), grads, strict=True):
        torch.testing.assert_close(p, q - 0.1 * grad)


def test_channels_last_works_on_a_copy():
    model, inputs, targets = prepare(find_task("kmnist-cnn"), batch=2)
    pointers = [p.data_ptr() for p in model.parameters()]
    make_step(Variant("backprop", form="channels_last"), model, inputs, targets)()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())


def test_the_learning_rate_leaves_parameters_where_they_are():
    model, inputs, targets = prepare(find_task("penguins-mlp"))
    before = copy.deepcopy(model.state_dict())
    for method in compared.METHODS:
        step = make_step(Variant(method), model, inputs, targets)
        for _ in range(5):
            step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-4)


# --- time ------------------------------------------------------------------------------------------------------------


def test_time_of_all_that_runs_here(no_compiler):
    forms = lambda model: variants(model, quick=True)  # noqa: E731
    found = measuring.measure_time(find_task("penguins-logistic"), forms, TINY, torch.device("cpu"))
    assert set(found["seconds"]) == {"forward", *(f"{method}, eager" for method in compared.METHODS)}
    assert all(len(seconds) == 6 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert found["reference"] == "backprop, eager"
    assert found["skipped"]
    assert set(found["skipped"].values()) == {measuring.NO_COMPILER}
    assert (found["batch"], found["num_params"]) == (250, 15)


def test_a_variant_that_does_not_compile_is_skipped_with_the_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel for this\nand a long story")

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", broken)
    forms = [Variant("backprop"), Variant("backprop", compiled=True), Variant("rank-one")]
    found = measuring.measure_time(find_task("penguins-logistic"), lambda _: forms, TINY, torch.device("cpu"))
    assert found["skipped"] == {"backprop, compiled": "RuntimeError: no kernel for this"}
    assert set(found["seconds"]) == {"forward", "backprop, eager", "rank-one, eager"}


def test_an_eager_step_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring, "make_step", lambda *args: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measuring.measure_time(
            find_task("penguins-logistic"), lambda _: [Variant("rank-one")], TINY, torch.device("cpu")
        )


def test_the_reference_is_the_fastest_backprop_of_torch(monkeypatch):
    times = {
        "backprop, eager": 3.0,
        "backprop, compiled": 2.0,
        "backprop one graph, compiled": 1.0,
        "rank-one, eager": 0.5,
    }
    seconds = {"forward": [0.25] * 6, **{name: [value] * 6 for name, value in times.items()}}
    monkeypatch.setattr(measuring, "interleave", lambda *args, **kwargs: seconds)
    found = measuring.measure_time(find_task("penguins-logistic"), lambda _: [], TINY, torch.device("cpu"))
    assert found["reference"] == "backprop, compiled"
    shown = measuring.text({"load": 0.1, "models": {"penguins-logistic": found}, "depth": {}})
    last = shown.rstrip().splitlines()[-1].strip()
    assert last == (
        "fastest forward gradient: rank-one, eager; 0.25 [0.25, 0.25] of backprop, compiled; "
        "0.50 [0.50, 0.50] of backprop one graph, compiled"
    )
    (row,) = (line.split() for line in shown.splitlines() if line.strip().startswith("rank-one"))
    assert " ".join(row) == "rank-one, eager 500 [500, 500] 2.00 0.25 [0.25, 0.25]"


def test_a_busy_machine_is_named():
    assert measuring.text({"load": 3.5, "models": {}, "depth": {}}).startswith("The machine was busy (load 3.5")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_backprop_needs_more_memory_than_rank_one(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of tests that run beside each other wait for each other
    backprop, rank_one = (measuring.measure_memory("20x256", method) for method in ("backprop", "rank-one"))
    assert backprop > 20 * 256 * 256 * 4  # the gradient alone
    assert rank_one < backprop / 2


def test_memory_without_the_peak_of_linux(monkeypatch):
    pytest.importorskip("resource")
    monkeypatch.setattr(measuring, "_forget_peak", lambda: False)
    before, peak = measuring._resident_memory()
    held = torch.ones(1 << 24) if before else None
    assert peak() >= before > 1e7
    del held


def test_memory_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(measuring.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        measuring.measure_memory("penguins-logistic", "backprop")
    with pytest.raises(ValueError, match="'activity'"):
        measuring.measure_memory("penguins-logistic", "adam")


# --- all of it -------------------------------------------------------------------------------------------------------


def test_run_gives_what_can_be_saved_and_shown(tiny, monkeypatch):
    def measured(name, method, *args):
        if method == "activity":
            raise RuntimeError("killed")
        return 987_600_000

    monkeypatch.setattr(measuring, "measure_memory", measured)
    found = measuring.run(models=["penguins-logistic"])
    assert json.loads(json.dumps(found)) == found
    entry = found["models"]["penguins-logistic"]
    assert entry["memory"] == dict.fromkeys(compared.METHODS[:-1], 987_600_000)
    assert entry["skipped"]["memory of activity"] == "RuntimeError: killed"
    assert list(found["depth"]) == ["1", "2"]
    for swept in found["depth"].values():
        assert set(swept["memory"]) == set(measuring.SWEPT)
        assert set(swept["seconds"]) == {"forward", *(f"{method}, eager" for method in measuring.SWEPT)}
    assert found["environment"]["device"] == "cpu"
    shown = measuring.text(found | {"load": 0.0})
    assert shown.startswith("No C++ compiler was found")
    assert "skipped memory of activity: RuntimeError: killed" in shown
    assert shown.count("987.6") == 4 + 2 * 3  # no ratio of times comes near it
    assert max(map(len, shown.splitlines())) <= 130


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"models": ["penguins-logistic", "resnet"]}, "'mnist-mlp'"),
        ({"device": "tpu"}, "'cpu'"),
        ({"batch": 0}, "batch"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(options, named, monkeypatch):
    monkeypatch.setattr(measuring, "measure_time", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        measuring.run(**options)


def test_only_a_whole_result_gets_the_committed_name():
    names = [
        measuring.default_path("cpu").name,
        measuring.default_path("cuda:1").name,
        measuring.default_path("cpu", quick=True).name,
        measuring.default_path("cuda", batch=4096).name,
        measuring.default_path("cpu", partial=True, quick=True).name,
    ]
    assert names == [
        "bench-cpu.json",
        "bench-cuda.json",
        "bench-cpu-quick.json",
        "bench-cuda-batch4096.json",
        "bench-cpu-partial-quick.json",
    ]
    assert measuring.default_path("cpu").parent == runtime.project_root() / "report" / "results"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_saves_and_prints(tiny, tmp_path, capsys):
    path = tmp_path / "new" / "bench.json"
    words = ["bench", "--models", "penguins-logistic", "--no-memory", "--no-depth", "--batch", "8", "--out", str(path)]
    assert cli.main(words) == 0
    found = json.loads(path.read_text())
    assert found["models"]["penguins-logistic"]["batch"] == 8
    assert found["depth"] == {}
    printed = capsys.readouterr().out
    assert "penguins logistic 4-3, batch 8" in printed
    assert str(path) in printed


def test_an_interrupted_run_leaves_no_file(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "interleave", interrupted)
    assert cli.main(["bench", "--models", "penguins-logistic", "--out", str(tmp_path / "bench.json")]) == 130
    assert capsys.readouterr().err.endswith("stopped\n")
    assert list(tmp_path.iterdir()) == []
