"""Steps that processes share, measured alone and over a slowed link."""

from __future__ import annotations

from statistics import median

import pytest

from fwdlib.bench import links, sharing
from fwdlib.bench.scaling import NUM_TANGENTS
from fwdlib.models import num_parameters

pytestmark = pytest.mark.slow  # starts processes


def test_a_measurement_has_every_method_and_round():
    found = sharing.measure_step(1, num_rounds=2, seconds=0)
    assert set(found["methods"]) == set(NUM_TANGENTS)
    assert all(len(each["seconds"]) == len(each["alone"]) == 2 for each in found["methods"].values())
    assert found["num_params"] == num_parameters(sharing.fully_connected())


def test_processes_that_compress_keep_the_order_of_their_exchanges():
    # a network of more than a megabyte, which DistributedDataParallel would cut into several buckets
    found = sharing.measure_step(2, num_rounds=2, seconds=0.05)
    sent = {name: found["methods"][name]["bytes"] for name in ("BP", *sharing.RIVALS)}
    assert 0 < sent["PowerSGD, rank 1"] < sent["PowerSGD, rank 4"] < 0.1 * sent["BP"]


@pytest.mark.skipif(bool(links.obstacle()), reason=links.obstacle() or "there is no obstacle")
def test_over_100_mbit_a_step_is_20_times_faster_than_backprops():
    found = sharing.measure_step(4, 100, slow=True, num_rounds=3, seconds=0.1)
    # the least of the rounds: other tests run beside this one
    backprop, forward = (min(found["methods"][name]["seconds"]) for name in ("BP", "FG-RANK1, K = 1"))
    assert backprop >= 20 * forward
    sent = found["methods"]["BP"]["bytes"]
    # three quarters of the gradients twice round the ring; no link can have carried them faster
    assert sent == pytest.approx(1.5 * 4 * found["num_params"], rel=0.15)
    assert median(found["methods"]["BP"]["seconds"]) >= 0.85 * 8 * sent / 100e6
    assert found["methods"]["FG-RANK1, K = 16"]["bytes"] <= 1000
