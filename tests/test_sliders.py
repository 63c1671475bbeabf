"""The sliders: their closed forms are those of a run, the web pages' script computes the same, the widget follows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fwdlib import runtime, sliders
from fwdlib.estimators import forward_gradient

SCRIPT = Path(__file__).resolve().parents[1] / "report" / "page" / "sliders.js"
CASES = [(p, k, rate) for p in (1, 15, 867, 10**6) for k in (1, 3, 1000) for rate in (1e-6, 0.0213, 0.5, 2.5)]


@pytest.mark.parametrize(("num_params", "num_tangents", "rate"), [(6, 1, 0.1), (6, 4, 0.3)])
def test_a_step_on_a_bowl_multiplies_the_mean_loss_by_the_closed_form(num_params, num_tangents, rate):
    def bowl(params):
        return params["x"].square().sum() / 2

    start = {"x": torch.ones(num_params, dtype=torch.float64)}
    draw = runtime.generator(0)
    options = {"num_tangents": num_tangents, "tangents": "normal", "generator": draw}
    after = torch.stack(
        [bowl({"x": start["x"] - rate * forward_gradient(bowl, start, **options).grads["x"]}) for _ in range(500)]
    )
    expected = sliders.mean_losses(1, rate, sliders.second_moment(num_params, num_tangents))[1]
    ratio = after / bowl(start)
    assert abs(ratio.mean() - expected) < 5 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize(("num_params", "num_tangents"), [(1, 1), (2, 1), (6, 1), (6, 4), (300, 7)])
def test_the_runs_have_the_mean_of_the_closed_form(num_params, num_tangents):
    rate = sliders.largest_rate(sliders.second_moment(num_params, num_tangents)) / 2
    after = torch.tensor([sliders.run_losses(1, rate, num_params, num_tangents, seed)[1] for seed in range(1, 4001)])
    expected = sliders.mean_losses(1, rate, sliders.second_moment(num_params, num_tangents))[1]
    assert abs(after.mean() - expected) < 5 * after.std() / len(after) ** 0.5
    assert after.std() > 0


def test_a_run_is_that_of_a_forward_gradient():
    # the two parts of the estimate, along the gradient and across it, have the same second moments
    rate, (num_params, num_tangents) = 0.1, (6, 2)
    start = {"x": torch.ones(num_params, dtype=torch.float64)}
    draw = runtime.generator(0)
    options = {"num_tangents": num_tangents, "tangents": "normal", "generator": draw}

    def bowl(params):
        return params["x"].square().sum() / 2

    real = [bowl({"x": start["x"] - rate * forward_gradient(bowl, start, **options).grads["x"]}) for _ in range(2000)]
    real = torch.stack(real) / bowl(start)
    ours = torch.tensor([sliders.run_losses(1, rate, num_params, num_tangents, seed)[1] for seed in range(1, 2001)])
    bound = 5 * (real.square().var() + ours.square().var()).sqrt() / len(ours) ** 0.5
    assert abs(real.square().mean() - ours.square().mean()) < bound


def test_a_loss_that_grows_becomes_infinite():
    assert sliders.mean_losses(200, 2.5, sliders.second_moment(10**6, 1))[-1] == float("inf")


def test_at_the_largest_rate_the_mean_loss_stays():
    for num_params, num_tangents, _ in CASES:
        moment = sliders.second_moment(num_params, num_tangents)
        assert sliders.mean_losses(3, sliders.largest_rate(moment), moment) == pytest.approx([1.0] * 4)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the PATH")
def test_the_script_of_the_web_pages_computes_the_same():
    program = f"""
    const s = require({json.dumps(str(SCRIPT))});
    const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
    console.log(JSON.stringify(cases.map(([p, k, rate]) => {{
      const moment = s.secondMoment(p, k);
      const curves = [...s.meanLosses(20, rate, moment), ...s.runLosses(20, rate, p, k, 3)];
      return [moment, s.relativeError(p, k), s.largestRate(moment), ...curves];
    }})));"""
    run = subprocess.run(["node", "-e", program], input=json.dumps(CASES), capture_output=True, text=True, check=True)
    for (p, k, rate), found in zip(CASES, json.loads(run.stdout), strict=True):
        moment = sliders.second_moment(p, k)
        ours = [moment, sliders.relative_error(p, k), sliders.largest_rate(moment)]
        ours += sliders.mean_losses(20, rate, moment) + sliders.run_losses(20, rate, p, k, 3)
        assert found == pytest.approx(ours, rel=1e-12, abs=0)


def test_the_widget_draws_again_when_a_slider_moves_and_begins_where_it_is_told():
    box = sliders.Sliders(num_params=1000, num_tangents=10, rate=0.01).widget()
    *found, picture = box.children
    assert [slider.value for slider in found] == pytest.approx([10, 0.01, 1000])
    before = picture.value
    found[1].value = 1.0
    assert picture.value != before
    assert bytes(picture.value).startswith(b"\x89PNG")


def test_where_no_widget_is_shown_there_is_the_figure():
    bundle = sliders.Sliders()._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= bundle.keys()


@pytest.mark.parametrize(("rate", "verdict"), [(0.001, "falls"), (0.1, "grows")])
def test_the_figure_says_whether_the_mean_loss_falls(rate, verdict):
    (axes,) = sliders.plot_bowl(867, 1, rate).axes
    assert f"mean loss {verdict}" in axes.get_title(loc="left")
