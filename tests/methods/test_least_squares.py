"""Fits by least squares against closed forms, and the pelts of lynxes and hares."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from fwdlib.methods.least_squares import levenberg_marquardt, linearised
from fwdlib.methods.lynx_hare import PUBLISHED, load_lynx_hare
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.processes import lotka_volterra, runge_kutta

DOUBLE = torch.float64
NOISE = [0.1, -0.2, 0.0, 0.3, -0.1, 0.05]


def straight_line():
    # After t steps the state is start + t * slope.
    seen = {t: torch.tensor(1 + 0.5 * t + e, dtype=DOUBLE) for t, e in enumerate(NOISE)}
    return ProcessLoss(lambda z, p: z + p["slope"], lambda p: p["start"], lambda z, p, o: z, 5, observations=seen)


def test_a_straight_line_is_fitted_as_linear_regression_does():
    process = straight_line()
    start = {"start": torch.zeros((), dtype=DOUBLE), "slope": torch.zeros((), dtype=DOUBLE)}
    fit = levenberg_marquardt(process, start, compiled=False, tolerance=1e-9)
    known = stats.linregress(range(6), [o.item() for o in process.observations.values()])
    assert fit.params["slope"].item() == pytest.approx(known.slope, rel=1e-8)
    assert fit.params["start"].item() == pytest.approx(known.intercept, rel=1e-8)
    low, estimate, high = fit.intervals()["slope"]
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 4) * known.stderr, rel=1e-8)
    assert estimate == pytest.approx(known.slope)
    at_zero = fit.errors_of_states()[0].item()
    assert at_zero == pytest.approx(known.intercept_stderr, rel=1e-8)
    assert fit.losses == sorted(fit.losses, reverse=True)


def test_the_jacobian_is_that_of_autograd():
    process, names = straight_line(), ("start", "slope")
    params = {name: torch.tensor(0.3, dtype=DOUBLE) for name in names}
    r, jacobian = linearised(process, params, compiled=False)
    assert r[2].item() == pytest.approx(0.3 + 2 * 0.3 - 2)
    torch.testing.assert_close(jacobian[:, 1], torch.arange(6, dtype=DOUBLE))


def test_refuses_a_process_without_observations_and_a_start_that_diverges():
    process = ProcessLoss(lambda z, p: z * p["a"], torch.ones(()), lambda z, p: z, 3)
    with pytest.raises(ValueError, match="needs a process with observations"):
        linearised(process, {"a": torch.ones(())})
    process = ProcessLoss(
        lambda z, p: z * p["a"], torch.ones(()), lambda z, p, o: z, 3, observations={3: torch.ones(())}
    )
    with pytest.raises(ValueError, match="diverges"):
        levenberg_marquardt(process, {"a": torch.tensor(1e30)}, compiled=False)


def test_the_pelts_are_those_of_the_published_table():
    pelts = load_lynx_hare()
    assert pelts.years.tolist() == list(range(1900, 1921))
    assert pelts.hare[:4].tolist() == [30.0, 47.2, 70.2, 77.4]
    assert pelts.lynx[-2:].tolist() == [10.1, 8.6]
    assert pelts.hare.dtype == pelts.lynx.dtype == DOUBLE


def test_the_published_rates_lie_within_the_intervals():
    pelts = load_lynx_hare()
    seen = torch.stack([pelts.hare, pelts.lynx], 1).log()

    def slope(z, p):
        population = tuple(u.exp() for u in z)
        return tuple(map(torch.div, lotka_volterra(population, {k: v.exp() for k, v in p.items()}), population))

    process = ProcessLoss(
        runge_kutta(slope, 0.25),
        lambda p: (p["hare"], p["lynx"]),
        lambda z, p, o: z[0],
        80,
        observations={4 * i: tuple(row) for i, row in enumerate(seen)},
    )
    guess = {"a": 0.44, "b": 0.022, "c": 0.68, "d": 0.021, "hare": 30.0, "lynx": 4.0}
    start = {name: torch.tensor(x, dtype=DOUBLE).log() for name, x in guess.items()}
    intervals = levenberg_marquardt(process, start, max_rounds=12, compiled=False).intervals()
    for name, value in PUBLISHED.items():
        low, estimate, high = torch.tensor(intervals[name]).exp().tolist()
        assert low < value < high
        assert estimate == pytest.approx(value, rel=0.05)
