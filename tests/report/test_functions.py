"""The report's section on test functions follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import copy
import io
import json
import math
from functools import partial

import pytest
from PIL import Image

from fwdlib.methods import minimise_figures
from fwdlib.methods.stability import mean_square_limit
from fwdlib.results import write_json
from report import published
from report.names import WRITTEN_OUT
from report.sections import functions as section
from report.studies import functions as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE


def rows(ends):
    paths = [[[0.0, 0.5], [1.0, 0.2], [3.0, 0.5]] for _ in ends]
    return {"steps": [0, 10, 1000], "values": [[14.0, 1.0, end] for end in ends], "paths": paths}


def content():
    descents = {
        "Beale": {"backprop": rows([5.5e-5]), "forward gradient": rows([4e-5, 5e-5, 6e-5] * 3)},
        "Rosenbrock": {"backprop": rows([5.3e-6]), "forward gradient": rows([4e-6, 5e-6, 6e-6] * 3)},
    }
    seconds = {}
    for title, ratio in (("Beale", 0.8), ("Rosenbrock", 1.3), (WRITTEN_OUT, 3.0)):
        seconds |= {f"{title}: backprop": [1e-3] * 8, f"{title}: forward gradient": [1e-3 * ratio] * 8}
    grid = {
        "rates": [0.01, 0.02, 0.04, 0.08],
        "diverged": {"backprop": [0.0, 0.0, 0.0, 1.0], "forward gradient": [0.0, 0.3, 1.0, 1.0]},
        "limits": {"backprop": 0.05, "forward gradient": 0.015},
    }
    growth = {
        "rows": [{"rate": 0.1, "mean": 0.77, "error": 0.01, "typical": 0.7}],
        "expected": [0.76],
        "rates": [0.1, 0.2],
        "theory": {"backprop": [0.64, 0.36], "mean": [0.76, 0.84], "typical": [0.7, 0.66]},
        "typical_limit": 0.469,
    }
    return {
        "settings": {
            "paper": {"Beale": [0.01, 1000], "Rosenbrock": [5e-4, 25_000]},
            "seeds": list(range(9)),
            "seeds_of_divergence": [0, 1],
            "iterations_of_divergence": 1000,
            "seeds_of_growth": 200,
        },
        "environment": MACHINE,
        "descents": descents,
        "divergence": {title: copy.deepcopy(grid) for title in study.TEST_FUNCTIONS},
        "growth": growth,
        "steps": {"seconds": seconds, "environment": MACHINE},
    }


text_of = partial(printing.text_of, section)


# what the page says


def test_nothing_is_said_where_a_part_is_missing(load):
    found = content()
    del found["growth"]
    assert load(found) is None


def test_table_has_ends_intervals_and_what_was_published(load):
    text = text_of(load(content()))
    beale = "| Beale | 5.50 x 10^-5^ | 5.00 x 10^-5^ [4.00 x 10^-5^, 6.00 x 10^-5^] "
    assert beale + "| about 5 x 10^-5^ | 9 of 9 | 0.800 | 0.87 |" in text
    assert "on Beale forward mode takes less time than backprop, on Rosenbrock forward mode takes more time" in text
    assert "with Rosenbrock's 100 as a factor the ratio is 3.00." in text


@pytest.mark.parametrize(
    ("late", "backprop", "verdict"),
    [
        (0, 1e-5, "Every seed converges"),
        (1, 1e-5, "At least nine of ten seeds converge"),
        (2, 1e-5, "**Not all converge as published**"),
        (0, 2e-3, "**Not all converge as published**"),
    ],
)
def test_the_verdict_counts_the_seeds_and_backprop(load, late, backprop, verdict):
    found = content()
    found["descents"]["Beale"] = {
        "backprop": rows([backprop]),
        "forward gradient": rows([math.inf] * late + [1e-5] * (10 - late)),
    }
    text = text_of(load(found))
    assert verdict in text
    assert f"| {10 - late} of 10 |" in text


@pytest.mark.parametrize(
    ("ratios", "words"), [([0.9, 1.1] * 4, "about as much time as"), ([1.1] * 8, "more time than")]
)
def test_times_are_told_apart_by_their_interval(load, ratios, words):
    found = content()
    found["steps"]["seconds"]["Rosenbrock: forward gradient"] = [1e-3 * ratio for ratio in ratios]
    assert f"on Rosenbrock forward mode takes {words} backprop" in text_of(load(found))


def test_times_that_go_the_same_way_are_one_sentence(load):
    found = content()
    found["steps"]["seconds"]["Rosenbrock: forward gradient"] = [0.9e-3] * 8
    assert "on both functions forward mode takes less time than backprop." in text_of(load(found))


def test_divergence_is_between_the_last_safe_rate_and_the_first_that_is_lost(load):
    found = content()
    assert "| Sphere | 0.0500 | 0.0400 | 0.0800 | 0.0150 | 0.0100 | 0.0400 |" in text_of(load(found))
    assert (
        "All 4 functions diverge if the learning rate is large enough, with either method, and with forward"
        in text_of(found)
    )
    found["divergence"]["Sphere"]["diverged"]["forward gradient"] = [0.1, 0.0, 1.0, 0.5]
    text = text_of(load(found))
    assert f"| Sphere | 0.0500 | 0.0400 | 0.0800 | 0.0150 | {chr(0x2013)} | {chr(0x2013)} |" in text
    assert "diverge if the learning rate is large enough" not in text


def test_paper_s_learning_rates_are_compared_with_the_limit(load):
    found = content()
    found["divergence"]["Rosenbrock"]["limits"]["forward gradient"] = 1e-3
    assert "are 0.67 and 0.50 times the limit in the mean square (Beale, Rosenbrock)" in text_of(load(found))


def test_growth_is_compared_with_theory_in_standard_errors(load):
    text = text_of(load(content()))
    assert "is within 1.0 standard errors of this" in text
    assert "it still converges up to about 0.47, while the mean over runs grows from 0.015 on" in text


def test_other_machine_of_the_times_is_named(load):
    found = content()
    found["steps"]["environment"] = MACHINE | {"processor": "another CPU"}
    assert "Times of steps: another CPU, 2 cores" in text_of(load(found))


def test_figures_are_those_that_the_section_shows(load, monkeypatch):
    monkeypatch.setattr(section, "animation", lambda found: b"GIF")
    found = load(content())
    text, drawn = text_of(found), section.figures(found)
    assert drawn.pop(section.ANIMATION) == b"GIF"
    assert f'src="figures/{section.ANIMATION}"' in text
    assert all(f"figures/{name}.svg" in text for name in drawn)
    assert text.count("(figures/") == len(drawn)
    by_second = drawn["functions-descents"].axes[1]
    forward = next(line for line in by_second.lines if line.get_label() == "forward gradient")
    assert list(forward.get_xdata()) == pytest.approx([0.8e-3 * 10, 0.8e-3 * 1000])


def test_animation_is_drawn_twice_byte_for_byte_alike(load, monkeypatch):
    found, seen = load(content()), []
    animate = minimise_figures.animate_paths
    monkeypatch.setattr(minimise_figures, "animate_paths", lambda d: (seen.append(d), animate(d, num_frames=3))[1])
    first = section.animation(found)
    assert Image.open(io.BytesIO(first)).n_frames == 3
    assert section.animation(found) == first
    assert len(seen[0]["Beale"]["forward gradient"]["paths"]) == 9


# the study


SMALL = study.Settings({"Beale": (0.01, 30)}, (0, 1), (0,), iterations_of_divergence=10, seeds_of_growth=3)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(study, "TEST_FUNCTIONS", {n: study.TEST_FUNCTIONS[n] for n in ("Beale", "Rosenbrock")})
    monkeypatch.setitem(study.PARTS, "steps", lambda _: content()["steps"])


def test_study_keeps_what_is_done_and_times_steps_again(few, tmp_path, monkeypatch):
    found = study.measure(SMALL, tmp_path, tuple(study.PARTS))
    assert set(found) == {"settings", "environment", *study.PARTS}
    assert {name: len(kept["values"]) for name, kept in found["descents"]["Beale"].items()} == {
        "backprop": 1,
        "forward gradient": 2,
    }
    assert found["descents"]["Beale"]["backprop"]["steps"][-1] == 30
    assert found["growth"]["typical_limit"] == pytest.approx(0.469, abs=0.005)
    file = tmp_path / "functions.json"
    on_disk = json.loads(file.read_text())
    monkeypatch.setitem(study.PARTS, "descents", None)  # would fail
    assert study.measure(SMALL, tmp_path, ["descents"])["descents"] == on_disk["descents"]
    monkeypatch.setitem(study.PARTS, "steps", lambda _: {"seconds": "again"})
    assert study.measure(SMALL, tmp_path, ["steps"])["steps"] == {"seconds": "again"}
    assert json.loads(file.read_text())["divergence"] == on_disk["divergence"]


def test_committed_results_have_the_settings_of_the_study():
    found = section.load(RESULTS)
    assert found["settings"] == json.loads(json.dumps(study.FULL.kept()))
    assert section.context(found)["growth"]["mean_limit"] == pytest.approx(mean_square_limit([2.0, 2.0]))


def test_study_measures_what_the_section_needs():
    assert set(study.PARTS) == section.NEEDED
    assert tuple(study.METHODS) == section.METHODS
    assert set(published.load()["functions"]["descents"]) == set(study.FULL.descents) == set(study.SHORT.descents)


def test_study_refuses_a_file_of_other_settings(few, tmp_path):
    write_json(tmp_path / "functions.json", {"settings": {"seeds": [1]}})
    with pytest.raises(ValueError, match=r"was made with other settings: .* Delete the file to start anew"):
        study.measure(SMALL, tmp_path, ["descents"])


def test_steps_are_timed_for_both_methods_and_both_ways_to_write_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(study, "interleave", lambda steps, **options: seen.update(steps) or {})
    study.measure_steps(study.FULL)
    assert set(seen) == {f"{t}: {m}" for t in ("Beale", "Rosenbrock", WRITTEN_OUT) for m in study.METHODS}
    for step in seen.values():
        step()
