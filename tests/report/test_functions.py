"""The report's section on test functions follows what was measured; and the study behind it, in small."""

from __future__ import annotations

import copy
import io
import json
import math

import jinja2
import pytest
from PIL import Image

from fwdlib.results import write_json
from report import wording
from report.page import render
from report.studies import functions

VERSIONS = {"python": "3.11.7", "torch": "2.15.0"}
MACHINE = {"versions": VERSIONS, "system": "Linux", "processor": "a CPU", "cores": 2, "threads": 1}
MINUS = "\N{MINUS SIGN}"


def rows(ends):
    paths = [[[0.0, 0.5], [1.0, 0.2], [3.0, 0.5]] for _ in ends]
    return {"steps": [0, 10, 1000], "values": [[14.0, 1.0, end] for end in ends], "paths": paths}


def content():
    descents = {
        "Beale": {"backprop": rows([5.5e-5]), "forward gradient": rows([4e-5, 5e-5, 6e-5] * 3)},
        "Rosenbrock": {"backprop": rows([5.3e-6]), "forward gradient": rows([4e-6, 5e-6, 6e-6] * 3)},
    }
    seconds = {}
    for title, ratio in (("Beale", 0.8), ("Rosenbrock", 1.3), (functions.WRITTEN_OUT, 3.0)):
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
        "settings": {"seeds": list(range(9)), "seeds_of_divergence": [0, 1], "iterations_of_divergence": 1000}
        | {"seeds_of_growth": 200},
        "environment": MACHINE,
        "descents": descents,
        "divergence": {title: copy.deepcopy(grid) for title in functions.FUNCTIONS},
        "growth": growth,
        "steps": {"seconds": seconds, "environment": MACHINE},
    }


@pytest.fixture
def load(tmp_path):
    def through_a_file(found):
        write_json(tmp_path / "functions.json", found)
        return functions.load(tmp_path)

    return through_a_file


def section(found):
    comments = {"comment_start_string": "<#", "comment_end_string": "#>"}
    loader = jinja2.FileSystemLoader(render.HERE)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **comments)
    environment.filters |= {word: getattr(wording, word) for word in ("number", "count", "interval")}
    environment.filters |= {"machine": render.machine}
    return environment.get_template("sections/functions.md.j2").render(functions=functions.context(found))


# what the page says


def test_nothing_is_said_where_a_part_is_missing(tmp_path, load):
    assert functions.load(tmp_path) is None
    assert functions.context(None) is None
    assert functions.figures(None) == {}
    found = content()
    del found["growth"]
    assert load(found) is None


def test_table_has_ends_intervals_and_what_was_published(load):
    text = section(load(content()))
    times = f"\N{MULTIPLICATION SIGN} 10^{MINUS}"
    beale = f"| Beale | 5.50 {times}5^ | 5.00 {times}5^ [4.00 {times}5^, 6.00 {times}5^] "
    assert beale + f"| about 5 {times}5^ | 9 of 9 | 0.800 | 0.87 |" in text
    assert f"| about 5 {times}6^ | 9 of 9 | 1.30 | 0.75 |" in text
    assert "Rosenbrock with a learning rate of 0.0005 for 25,000 iterations." in text
    assert "Every seed arrives, with both methods." in text
    assert "on Beale forward mode takes less time than backprop, on Rosenbrock forward mode takes more time" in text
    assert "with Rosenbrock's 100 as a factor the ratio is 3.00." in text
    assert "the same machine and versions, 1 thread." in text


@pytest.mark.parametrize(
    ("late", "backprop", "verdict"),
    [
        (0, 1e-5, "Every seed arrives"),
        (1, 1e-5, "At least nine of ten seeds arrive"),
        (2, 1e-5, "**Not all arrive as published**"),
        (0, 2e-3, "**Not all arrive as published**"),
    ],
)
def test_the_verdict_counts_the_seeds_and_backprop(load, late, backprop, verdict):
    found = content()
    found["descents"]["Beale"] = {
        "backprop": rows([backprop]),
        "forward gradient": rows([math.inf] * late + [1e-5] * (10 - late)),
    }
    text = section(load(found))
    assert verdict in text
    assert f"| {10 - late} of 10 |" in text


@pytest.mark.parametrize(
    ("ratios", "words"), [([0.9, 1.1] * 4, "about as much time as"), ([1.1] * 8, "more time than")]
)
def test_times_are_told_apart_by_their_interval(load, ratios, words):
    found = content()
    found["steps"]["seconds"]["Rosenbrock: forward gradient"] = [1e-3 * ratio for ratio in ratios]
    assert f"on Rosenbrock forward mode takes {words} backprop" in section(load(found))


def test_times_that_go_the_same_way_are_one_sentence(load):
    found = content()
    found["steps"]["seconds"]["Rosenbrock: forward gradient"] = [0.9e-3] * 8
    assert "on both functions forward mode takes less time than backprop." in section(load(found))


def test_divergence_is_between_the_last_safe_rate_and_the_first_that_is_lost(load):
    found = content()
    assert "| Sphere | 0.0500 | 0.0400 | 0.0800 | 0.0150 | 0.0100 | 0.0400 |" in section(load(found))
    assert (
        "All 4 functions diverge if the learning rate is large enough, with either method, and with forward"
        in section(found)
    )
    found["divergence"]["Sphere"]["diverged"]["forward gradient"] = [0.1, 0.0, 1.0, 0.5]
    text = section(load(found))
    assert f"| Sphere | 0.0500 | 0.0400 | 0.0800 | 0.0150 | {chr(0x2013)} | {chr(0x2013)} |" in text
    assert "diverge if the learning rate is large enough" not in text


def test_paper_s_learning_rates_are_compared_with_the_limit(load):
    found = content()
    found["divergence"]["Rosenbrock"]["limits"]["forward gradient"] = 1e-3
    assert "are 0.67 and 0.50 times the limit in the mean square (Beale, Rosenbrock)" in section(load(found))


def test_growth_is_compared_with_theory_in_standard_errors(load):
    text = section(load(content()))
    assert "is within 1.0 standard errors of this" in text
    assert "it still converges up to about 0.47, while the mean over runs grows from 0.25 on" in text


def test_other_machine_of_the_times_is_named(load):
    found = content()
    found["steps"]["environment"] = MACHINE | {"processor": "another CPU"}
    assert "Times of steps: another CPU, 2 cores" in section(load(found))


def test_figures_are_those_that_the_section_shows(load, monkeypatch):
    monkeypatch.setattr(functions, "animation", lambda found: b"GIF")
    found = load(content())
    text, drawn = section(found), functions.figures(found)
    assert drawn.pop(functions.ANIMATION) == b"GIF"
    assert f'src="figures/{functions.ANIMATION}"' in text
    assert all(f"figures/{name}.svg" in text for name in drawn)
    assert text.count("(figures/") == len(drawn)
    by_second = drawn["functions-descents"].axes[1]
    forward = next(line for line in by_second.lines if line.get_label() == "forward gradient")
    assert list(forward.get_xdata()) == pytest.approx([0.8e-3 * 10, 0.8e-3 * 1000])


def test_animation_is_drawn_twice_byte_for_byte_alike(load, monkeypatch):
    found, seen = load(content()), []
    animate = functions.minimise_figures.animate_paths
    monkeypatch.setattr(
        functions.minimise_figures, "animate_paths", lambda d: (seen.append(d), animate(d, num_frames=3))[1]
    )
    first = functions.animation(found)
    assert Image.open(io.BytesIO(first)).n_frames == 3
    assert functions.animation(found) == first
    assert len(seen[0]["Beale"]["forward gradient"]["paths"]) == 9


# the study


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(functions, "PUBLISHED", {"Beale": functions.PUBLISHED["Beale"]._replace(num_iterations=30)})
    monkeypatch.setattr(functions, "FUNCTIONS", {name: functions.FUNCTIONS[name] for name in ("Beale", "Rosenbrock")})
    for name, value in {
        "SEEDS": [0, 1],
        "SEEDS_OF_DIVERGENCE": [0],
        "NUM_ITERATIONS": 10,
        "SEEDS_OF_GROWTH": 3,
    }.items():
        monkeypatch.setattr(functions, name, value)
    monkeypatch.setattr(functions, "measure_steps", lambda: content()["steps"])
    monkeypatch.setitem(functions.PARTS, "steps", functions.measure_steps)


def test_study_keeps_what_is_done_and_takes_anew_what_is_named(small, tmp_path, monkeypatch):
    file = tmp_path / "functions.json"
    found = functions.measure(file=file)
    assert set(found) == {"settings", "environment", *functions.PARTS}
    assert {name: len(kept["values"]) for name, kept in found["descents"]["Beale"].items()} == {
        "backprop": 1,
        "forward gradient": 2,
    }
    assert found["descents"]["Beale"]["backprop"]["steps"][-1] == 30
    assert found["growth"]["typical_limit"] == pytest.approx(0.469, abs=0.005)
    on_disk = json.loads(file.read_text())
    monkeypatch.setitem(functions.PARTS, "descents", None)  # would fail
    assert functions.measure(file=file)["descents"] == on_disk["descents"]
    monkeypatch.setitem(functions.PARTS, "steps", lambda: {"seconds": "anew"})
    assert functions.measure(["steps"], file)["steps"] == {"seconds": "anew"}
    assert json.loads(file.read_text())["divergence"] == on_disk["divergence"]


def test_settings_survive_the_file(tmp_path):
    write_json(tmp_path / "settings.json", functions.settings_now())
    assert json.loads((tmp_path / "settings.json").read_text()) == functions.settings_now()


def test_study_refuses_a_file_of_other_settings(small, tmp_path, monkeypatch):
    file = tmp_path / "functions.json"
    write_json(file, {"settings": {"seeds": [1]}})
    with pytest.raises(ValueError, match=r"was made with other settings: .* Delete the file to start anew"):
        functions.measure(file=file)


def test_steps_are_timed_for_both_methods_and_both_ways_to_write_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(functions, "interleave", lambda steps, **options: seen.update(steps) or {})
    functions.measure_steps()
    assert set(seen) == {f"{t}: {m}" for t in ("Beale", "Rosenbrock", functions.WRITTEN_OUT) for m in functions.METHODS}
    for step in seen.values():
        step()
