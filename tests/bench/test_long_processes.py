"""The work whose memory is measured is what it says."""

from __future__ import annotations

import pytest
import torch

from fwdlib.bench import long_processes


@pytest.mark.parametrize("build", [long_processes.simulation, long_processes.recurrence])
def test_both_methods_compute_the_same_gradient(build):
    forward, backprop = (build(method, 5)() for method in long_processes.METHODS)
    torch.testing.assert_close(dict(forward.grads), dict(backprop.grads), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="method"):
        build("magic", 5)


def test_times_are_by_method_and_number_of_parameters():
    found = long_processes.times_by_parameters([1, 2], size=4, num_steps=2, seconds=0)
    assert {name: list(times) for name, times in found.items()} == {name: [1, 4] for name in long_processes.METHODS}
