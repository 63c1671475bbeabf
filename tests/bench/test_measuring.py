"""What is timed, in what order, and what is skipped with which reason; the memory of steps."""

from __future__ import annotations

import itertools
import sys
import time

import pytest
import torch
import torch._inductor

from fwdlib import runtime
from fwdlib.bench import measuring
from fwdlib.bench.compared import COMPARED, Variant, find_task, variants

TINY = {"seconds": 0.02, "min_rounds": 6, "max_rounds": 6, "block_seconds": 1e-4}


def time_of(name, forms):
    return measuring.measure_time(find_task(name), forms, torch.device("cpu"), None, lambda text: None, **TINY)


# --- time ------------------------------------------------------------------------------------------------------------


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


def test_another_clock_is_read():
    ticks = itertools.count()
    found = measuring.interleave(
        {"a": lambda: None}, seconds=0, min_rounds=2, block_seconds=1, clock=lambda: next(ticks)
    )
    assert found == {"a": [1.0, 1.0]}


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


def test_time_of_all_that_runs_here(no_compiler):
    forms = lambda model: variants(model, quick=True)  # noqa: E731
    found = time_of("penguins-logistic", forms)
    assert set(found["seconds"]) == {"forward", *(f"{method}, eager" for method in COMPARED)}
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
    found = time_of("penguins-logistic", lambda _: forms)
    assert found["skipped"] == {"backprop, compiled": "RuntimeError: no kernel for this"}
    assert set(found["seconds"]) == {"forward", "backprop, eager", "rank-one, eager"}


def test_a_step_that_does_not_compile_is_not_timed_as_compiled(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", broken)
    found = time_of("penguins-logistic", lambda _: [Variant("backprop"), Variant("rank-one", compiled=True)])
    assert "because RuntimeError: no kernel for this" in found["skipped"]["rank-one, compiled"]
    assert set(found["seconds"]) == {"forward", "backprop, eager"}


def test_a_package_that_is_not_installed_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchzero", None)
    found = time_of("penguins-logistic", lambda _: [Variant("backprop"), Variant("torchzero")])
    assert "torchzero" in found["skipped"]["torchzero, eager"]
    assert set(found["seconds"]) == {"forward", "backprop, eager"}


def test_a_package_that_fails_is_skipped(monkeypatch):
    made = measuring.make_step
    broken = lambda variant, *given: (lambda: 1 / 0) if variant.method == "torchzero" else made(variant, *given)  # noqa: E731
    monkeypatch.setattr(measuring, "make_step", broken)
    found = time_of("penguins-logistic", lambda _: [Variant("backprop"), Variant("torchzero")])
    assert found["skipped"] == {"torchzero, eager": "ZeroDivisionError: division by zero"}


def test_an_eager_step_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring, "make_step", lambda *args: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        time_of("penguins-logistic", lambda _: [Variant("rank-one")])


def test_the_reference_is_the_fastest_backprop_of_torch(monkeypatch):
    times = {
        "backprop, eager": 3.0,
        "backprop, compiled": 2.0,
        "backprop one graph, compiled": 1.0,
        "rank-one, eager": 0.5,
    }
    seconds = {"forward": [0.25] * 6, **{name: [value] * 6 for name, value in times.items()}}
    monkeypatch.setattr(measuring, "interleave", lambda *args, **kwargs: seconds)
    found = time_of("penguins-logistic", lambda _: [])
    assert found["reference"] == "backprop, compiled"


# --- memory ----------------------------------------------------------------------------------------------------------


def test_backprop_needs_more_memory_than_rank_one(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of tests that run beside each other wait for each other
    methods = ("backprop", "in-backward", "rank-one")
    backprop, in_backward, rank_one = measuring.measure_memory("20x256", methods).values()
    assert backprop > 20 * 256 * 256 * 4  # the gradient alone
    assert in_backward < backprop / 2  # the activations, and one gradient at a time
    assert rank_one < in_backward


def test_memory_of_an_unknown_method_or_model_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="'activity'"):
        measuring.measure_memory("penguins-logistic", ["adam"])
    with pytest.raises(ValueError, match="'mnist-mlp'"):
        measuring.measure_memory("resnet", ["backprop"])
