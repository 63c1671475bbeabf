"""The report's section on processes follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from fwdlib import runtime
from fwdlib.results import write_json
from report.names import SENSITIVITY
from report.sections import sensitivity as section
from report.studies import sensitivity as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE

NEEDS_COMPILER = pytest.mark.skipif(not runtime.has_compiler(), reason="no C++ compiler")
BY_TWENTY = "reverse, compiled by 20"
SMALL = study.SHORT._replace(
    cases=("Lotka-Volterra, 1 trajectory",),
    shorter=50,
    rounds=6,
    horizons=(10, 20),
    parameters=(1,),
    steps=(2, 4),  # so few that the compiler is done soon
    stored=(1,),
    stored_steps=(4,),
)


def case(ratios, **others):
    seconds = {study.FORWARD: [1.0] * 9} | {name: [1 / ratio] * 9 for name, ratio in ratios.items()}
    compiled = {name: 30.0 for name in seconds if "compiled" in name}
    return {
        "num_steps": 1000,
        "num_params": 6,
        "num_tangents": 6,
        "seconds": seconds,
        "compile_seconds": compiled,
        "errors": {study.FORWARD: 3e-14, study.EAGER_FORWARD: 2e-14},
        "skipped": {},
        **others,
    }


def column(border, num):
    """Times of a column: forward mode takes num / border of reverse mode's, from 100 steps on."""
    found = {}
    for steps in (10, 100, 1000):
        seconds = {study.FORWARD: 1e-3 + 1e-5 * steps * num / border, study.OF_THE_MAP: 1e-5 * steps}
        if steps <= 100:
            seconds |= {study.PLAIN: 2e-6 * steps, study.REVERSE: 1e-3 * steps}
        found[str(steps)] = {name: [value] * 7 for name, value in seconds.items()}
    return found


def entry(per_step, steps, stopped=None):
    return {"bytes": {str(t): [float(per_step * t)] for t in steps}, "stopped": stopped}


def content():
    reverse = {study.REVERSE: 0.01, study.CHECKPOINTED: 0.008, "reverse, compiled by 5": 0.4, BY_TWENTY: 0.7}
    flat = {"bytes": {"100": [3e6, 3.1e6, 2.9e6], "100000": [3e6, 3e6, 3.1e6]}, "stopped": None}
    stop = {"num_steps": 10_000, "reason": "memory"}
    memory = {}
    for title in section.GROWTHS.values():
        memory |= {
            f"{title}: {study.FORWARD}": flat,
            f"{title}: {study.REVERSE}": entry(1e6, (100, 1000), stop),
            f"{title}: {study.CHECKPOINTED}": entry(1e5, (100, 1000)),
        }
    return {
        "settings": json.loads(json.dumps(study.FULL._replace(steps=(10, 100, 1000)).kept())),
        "environment": MACHINE,
        "cases": {
            "Lotka-Volterra, 1 trajectory": case(reverse | {"torchdiffeq odeint_adjoint": 0.01, study.TORCH: 0.003}),
            "recurrent, 128 units, relu": case(reverse | {study.PLAIN: 1.8}),
        },
        "memory": memory,
        "map": {str(num): column(100, num) for num in (1, 10, 50, 200)},
        "stored": {str(num): {"forward": 1e5 * num, "reverse": {"10000": 1e9}} for num in (1, 100)},
    }


text_of = partial(printing.text_of, section)


# what the page says


@pytest.mark.parametrize("part", sorted(section.NEEDED))
def test_nothing_is_said_where_a_part_is_missing(load, part):
    found = content()
    del found[part]
    assert load(found) is None


def test_the_headline_is_the_ratio_to_the_fastest_reverse_mode(load):
    text = text_of(load(content()))
    assert f"| Lotka-Volterra, 1 trajectory | 1,000 | 6 (6) | {BY_TWENTY} | 0.700 | 1.00 s |" in text
    assert "| 30.0 s, 30.0 s | the first | 3.00 x" in text
    assert "| forward over | eager | check­pointed | compiled by 5 | compiled by 20 | odeint, adjoint |" in text
    assert f"| Recurrent, 128 units, relu | 0.0100 | 0.00800 | 0.400 | 0.700 | {chr(0x2013)} |" in text
    assert "**Where a rival wins.** In none of these cases." in text
    assert "step by step with all unit tangents at once, the time is 0.00300 (Lotka-Volterra, 1 trajectory)" in text


def test_forward_mode_is_ahead_when_its_longer_compilation_is_made_up_for(load):
    found = content()
    case = found["cases"]["Lotka-Volterra, 1 trajectory"]
    case["compile_seconds"]["forward, compiled"] = 32.0  # two seconds more, of which a gradient saves 1 / 0.7 - 1
    (row,) = (row for row in section.context(load(found))["rows"] if row["title"] == "Lotka-Volterra, 1 trajectory")
    assert row["ahead_after"] == pytest.approx(2 / (1 / 0.7 - 1), rel=1e-4)
    assert "32.0 s, 30.0 s | 5 |" in text_of(load(found))


def test_a_rival_that_wins_comes_first(load):
    found = content()
    found["cases"]["recurrent, 128 units, relu"]["seconds"][BY_TWENTY] = [0.5] * 9
    (slower,) = section.context(load(found))["slower"]
    assert slower["ahead_after"] is None
    text = text_of(load(found))
    assert f"recurrent, 128 units, relu: {BY_TWENTY} is faster, forward mode takes 2.00 times its time" in text
    assert text.index("Where a rival wins") < text.index("**The cases**")


def test_an_interval_that_contains_one_decides_nothing(load):
    found = content()
    found["cases"]["recurrent, 128 units, relu"]["seconds"][BY_TWENTY] = [0.8, 1.2] * 4 + [1.0]
    assert (
        "but in recurrent, 128 units, relu (1.00 [0.833, 1.25] of reverse, compiled by 20) the interval does not"
        in text_of(load(found))
    )


def test_gradients_that_differ_are_said_to(load):
    found = content()
    assert "The gradients are the same" in text_of(load(found))
    found["cases"]["recurrent, 128 units, relu"]["errors"][study.FORWARD] = 1e-7
    assert "differ by up to 1.00 x 10^-7^ of the gradient's length" in text_of(load(found))


def test_a_solver_that_is_not_installed_is_said_to_be(load):
    found = content()
    del found["cases"]["Lotka-Volterra, 1 trajectory"]["seconds"]["torchdiffeq odeint_adjoint"]
    found["cases"]["recurrent, 128 units, relu"]["seconds"]["torchdiffeq odeint_adjoint"] = [100.0] * 9
    found["cases"]["Lotka-Volterra, 1 trajectory"]["skipped"]["torchdiffeq odeint_adjoint"] = study.NOT_INSTALLED
    assert "| 0.700 | not installed |" in text_of(load(found))


def test_memory_grows_with_the_range_over_the_runs(load):
    found = section.context(load(content()))
    row = found["memory"]["hypergradients of an MLP"]
    assert row["methods"][study.FORWARD]["growth"] == pytest.approx((3 / 3.1, 1, 3.1 / 2.9))
    assert row["methods"][study.REVERSE]["expected"] == 1e10
    assert row["share"] == pytest.approx(3e6 / 1e8)


def test_the_border_is_interpolated_and_follows_from_the_cost_of_a_step(load):
    found = section.context(load(content()))["map"]
    assert found["border_at"] == 1000
    assert found["borders"]["compiled reverse mode"] == pytest.approx(88, rel=0.02)  # the fixed cost counts, too
    assert found["borders"]["eager reverse mode"] is None
    assert found["model"]["border"] == pytest.approx(100, rel=0.02)
    assert found["model"]["fixed"] == pytest.approx(1e-3, rel=0.02)
    assert found["memory_border"] == [(1.0, 1), (100.0, 100)]


def test_a_cell_that_was_too_slow_is_left_out(load):
    found = content()
    del found["map"]["200"]["1000"]
    made = section.context(load(found))["map"]
    assert (made["num_measured"], made["num_cells"]) == (11, 12)
    assert section.figures(found)["sensitivity-map"].axes[0].texts[-1].get_text() == "not run"


def test_figures_are_those_that_the_page_shows(load):
    found = load(content())
    drawn, text = section.figures(found), text_of(found)
    assert set(drawn) == {"sensitivity-memory", "sensitivity-map"}
    assert "figures/sensitivity-memory.svg" in text  # the map is in the answer
    panels = drawn["sensitivity-memory"].axes
    assert [axes.get_title("left") for axes in panels] == list(section.GROWTHS.values())
    assert max(panels[0].lines[2].get_xdata()) == 10_000  # where reverse mode was stopped
    border = next(line for line in drawn["sensitivity-map"].axes[0].lines if line.get_label() == "the same memory")
    assert list(border.get_xdata()) == [1, 100]


# the study


def test_the_ways_agree_on_every_case():
    for title, one in study.CASES.items():
        make = partial(one.make, *(8 if n in (128, 512, 1000) else n for n in one.arguments), 6)
        process, params = make()
        expected = study.method(study.REVERSE, make)().grads
        for name in (study.EAGER_FORWARD, study.CHECKPOINTED):
            found = study.method(name, make)().grads
            assert study._distance(found, expected) < 1e-12, (title, name)
        assert all(p.dtype == torch.float64 for p in params.values())
        assert process.num_steps == 6


def test_the_solver_computes_about_the_same_gradient():
    pytest.importorskip("torchdiffeq")
    make = partial(study.populations, 2, 20)
    expected = study.method(study.REVERSE, make)().grads
    for name in study.SOLVERS:
        assert study._distance(study.method(name, make)(), expected) < 1e-4


@NEEDS_COMPILER
@pytest.mark.slow
def test_study_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(study.CASES, "Lotka-Volterra, 1 trajectory", study.Case(study.populations, (1,), 1000, (2,)))
    monkeypatch.setattr(
        study,
        "MEMORIES",
        {"hypergradients of an MLP": study.Memory(study.hyperparameters, (), (study.REVERSE,), lambda s: s.horizons)},
    )
    found = study.measure(SMALL, tmp_path, tuple(study.PARTS))
    assert set(found) == {"settings", "environment", *study.PARTS}
    measured = found["cases"]["Lotka-Volterra, 1 trajectory"]
    assert measured["skipped"] == {}
    assert max(measured["errors"].values()) < 1e-12
    assert {len(seconds) for seconds in measured["seconds"].values()} == {6}
    assert set(found["map"]["1"]) == {"2", "4"}
    assert found["memory"][f"hypergradients of an MLP: {study.REVERSE}"]["stopped"] is None

    def measured_again(*_):
        raise AssertionError("what the file has is measured again")

    monkeypatch.setattr(study, "_measure_case", measured_again)
    monkeypatch.setattr(study, "_measure_column", measured_again)
    kept = json.loads((tmp_path / study.SENSITIVITY).read_text())
    again = study.measure(SMALL, tmp_path, ["cases", "map"])
    assert (again["cases"], again["map"]) == (kept["cases"], kept["map"])


def test_reverse_mode_is_stopped_before_it_needs_too_much(monkeypatch):
    monkeypatch.setattr(study, "peaks_bytes", lambda make, arguments, name, lengths: [1e6 * t for t in lengths])
    one = study.Memory(study.populations, (1,), (study.REVERSE,), lambda _: (10, 100, 1000, 10_000))
    found = study._memory_over_steps(one, study.REVERSE, study.FULL, {})
    assert list(found["bytes"]) == ["10", "100", "1000"]
    assert found["stopped"] == {"num_steps": 10_000, "reason": "memory"}
    forward = study._memory_over_steps(one, study.FORWARD, study.FULL, {})
    assert forward["bytes"]["10000"] == [1e10] * study.FULL.repeats


def test_study_refuses_a_file_of_other_settings(tmp_path):
    write_json(tmp_path / SENSITIVITY, {"settings": {"rounds": 1}})
    with pytest.raises(ValueError, match=r"was made with other settings: .* Delete the file to start anew"):
        study.measure(SMALL, tmp_path, ["cases"])


def test_study_and_section_call_things_the_same():
    assert set(study.PARTS) == section.NEEDED
    for name in ("FORWARD", "EAGER_FORWARD", "PLAIN", "REVERSE", "CHECKPOINTED", "TORCH"):
        assert getattr(study, name) == getattr(section, name)
    assert section.ADJOINT in study.SOLVERS
    assert set(section.TITLES.values()) <= set(study.CASES)
    assert set(section.GROWTHS.values()) <= set(study.MEMORIES)


def test_committed_results_have_the_settings_of_the_study():
    found = section.load(RESULTS)
    assert found["settings"] == json.loads(json.dumps(study.FULL.kept()))
    assert set(found["cases"]) <= set(study.FULL.cases)
    assert section.context(found)["is_exact"]
