"""Steps that several processes share: each learns what it should, and sends no more than it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.bench import links
from fwdlib.bench.shared_steps import METHODS, NO_EXCHANGE, make_step, period
from fwdlib.estimators import forward_gradient
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.trainer.distributed import joined, start

pytestmark = pytest.mark.slow  # starts processes
COUNT, RATE, STEPS = 2, 0.1, 12


def build():
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 3))


def batches():
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield torch.randn(8, 40, generator=draw), torch.randint(3, (8,), generator=draw)


def work(folder: Path, methods: tuple[str, ...]) -> None:
    with joined(torch.device("cpu")) as processes:
        for number, method in enumerate(methods):
            torch.manual_seed(3)
            model = initialise(build, 0)
            step = make_step(method, model, RATE, processes)
            sent = []
            for inputs, targets in batches():
                before = links.traffic()
                step(processes.share(inputs), processes.share(targets))
                sent.append(links.traffic().since(before).num_bytes)
            torch.save(model.state_dict(), folder / f"{number}-{processes.rank}.pt")
            (folder / f"{number}-{processes.rank}.json").write_text(json.dumps(sent))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train by every method at once; method -> the parameters and the bytes of each process."""
    folder = tmp_path_factory.mktemp("shared")
    methods = (*METHODS[:3], "local SGD, 4 steps", *METHODS[6:])
    start(COUNT, work, folder, methods)
    return {
        method: [
            (torch.load(folder / f"{i}-{rank}.pt"), json.loads((folder / f"{i}-{rank}.json").read_text()))
            for rank in range(COUNT)
        ]
        for i, method in enumerate(methods)
    }


def test_all_processes_end_with_the_same_parameters_if_they_exchange_any(trained):
    for method, of_processes in trained.items():
        first, second = (params for params, _ in of_processes)
        if method == NO_EXCHANGE:
            assert all((first[name] - second[name]).norm() > 1e-3 for name in first)
            continue
        for name, p in first.items():
            torch.testing.assert_close(second[name], p, rtol=1e-6, atol=1e-7)


def test_ddp_takes_the_steps_of_one_process(trained):
    model = initialise(build, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for inputs, targets in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(trained["DDP"][0][0], dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_without_exchange_a_process_steps_on_its_own_share_and_sends_nothing(trained):
    for rank, (found, sent) in enumerate(trained[NO_EXCHANGE]):
        model = initialise(build, 0)
        for inputs, targets in batches():
            loss = F.cross_entropy(model(inputs[rank::COUNT]), targets[rank::COUNT])
            for p, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.data.sub_(RATE * grad)
        torch.testing.assert_close(found, dict(model.state_dict()), rtol=1e-5, atol=1e-6)
        assert sum(sent) == 0


def test_local_sgd_averages_the_parameters_of_processes_that_stepped_alone(trained):
    model, before = initialise(build, 0), None
    for number, (inputs, targets) in enumerate(batches()):
        if number % 4 == 0:  # the processes have just met
            alone = [initialise(build, 0) for _ in range(COUNT)]
            for each in alone:
                each.load_state_dict(before or model.state_dict())
        for rank, each in enumerate(alone):
            loss = F.cross_entropy(each(inputs[rank::COUNT]), targets[rank::COUNT])
            for p, grad in zip(each.parameters(), torch.autograd.grad(loss, list(each.parameters())), strict=True):
                p.data.sub_(RATE * grad)
        states = [each.state_dict() for each in alone]
        before = {name: sum(state[name] for state in states) / COUNT for name in states[0]}
    torch.testing.assert_close(trained["local SGD, 4 steps"][0][0], before, rtol=1e-5, atol=1e-6)


def test_rank_one_takes_the_steps_of_one_process_with_the_same_tangents(trained):
    torch.manual_seed(3)
    model = initialise(build, 0)
    params = params_of(model)
    for batch in batches():
        grads = forward_gradient(BatchLoss(model, *batch), params, num_tangents=16, tangents="rank-one").grads
        grads.add_to_(params, -RATE)
    torch.testing.assert_close(trained["rank-one, K = 16"][0][0], dict(model.state_dict()), rtol=1e-4, atol=1e-5)


def test_each_method_sends_what_it_says(trained):
    sent = {method: of_processes[0][1] for method, of_processes in trained.items()}
    gradients = 4 * sum(p.numel() for p in build().parameters())
    assert all(gradients <= step < 1.2 * gradients + 1000 for step in sent["DDP"])
    assert all(step < 0.3 * gradients for step in sent["PowerSGD, rank 1"][2:])
    assert all(a < b for a, b in zip(sent["PowerSGD, rank 1"][2:], sent["PowerSGD, rank 4"][2:], strict=True))
    met = [step > 0 for step in sent["local SGD, 4 steps"]]
    assert met == [False, False, False, True] * 3
    assert all(0 < step < 500 for step in sent["rank-one, K = 1"])
    assert all(step < 1500 for step in sent["rank-one, K = 64"])


def test_the_number_in_a_name_is_its_period_and_unknown_names_are_refused():
    assert [period(method) for method in METHODS] == [1, 1, 1, 10, 100, 1000, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="method must be one of DDP"):
        make_step("gossip", build(), 0.1, None)
