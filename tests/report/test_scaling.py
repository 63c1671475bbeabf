"""The report's section on several processes, made from made-up measurements."""

from __future__ import annotations

import json

import pytest

from fwdlib.bench import links
from fwdlib.bench.scaling import NUM_TANGENTS
from report.names import SCALING
from report.sections import scaling
from report.studies import scaling as study
from report.studies.common import RESULTS
from tests.report import printing
from tests.report.records import MACHINE

FEW, MANY = scaling.FEW, scaling.MANY
SECONDS = {"BP": 0.010, FEW: 0.005, MANY: 0.020}


def row(count, megabits=None, slower=1.0):
    methods = {
        name: {
            "seconds": [SECONDS[name] * (slower if name == "BP" else 1) * (1 + i / 100) for i in range(9)],
            "alone": [SECONDS[name]] * 9,
            "bytes": 7_000_000 if name == "BP" else 592,
            "segments": 10,
        }
        for name in NUM_TANGENTS
    }
    exchange = [0.001] * 9 if count > 1 else []
    return {"count": count, "megabits": megabits, "methods": methods, "exchange": exchange, "num_params": 10**6}


@pytest.fixture
def measured():
    rows = [row(1), row(2), row(4), row(4, 100, 60.0), row(2, 100, 40.0)]
    settings = {"counts": [1, 2, 4], "rates": [None, 100], "num_rounds": 9, "batch_size": 64}
    return {"settings": settings, "environment": MACHINE, "rows": rows, "obstacle": "", "descent": None}


def descent(losses):
    runs = [
        {"method": method, "purpose": "measured", "status": "not reached", "train_loss": curve}
        for method, curves in losses.items()
        for curve in curves
    ]
    return {"settings": {"evaluate_every": 20, "model": "784-10"}, "runs": runs}


def test_ratios_are_those_of_rounds_and_rows_are_in_order(measured):
    found = scaling.context(measured)
    assert [(r["count"], r["megabits"]) for r in found["rows"]] == [(1, None), (2, None), (2, 100), (4, None), (4, 100)]
    assert found["slowest"]["ratios"][FEW].estimate == pytest.approx(120)
    assert found["most"] == {FEW: 592, MANY: 592}
    assert found["least"] == 7_000_000
    assert found["wire"] == {FEW: 592 + 520, MANY: 592 + 520}


def test_predictions_stand_beside_what_was_measured(measured):
    found = scaling.context(measured)
    predicted = 0.010 + 6 * 0.001 + 8 * 1.5 * 4e6 / 1e8
    assert found["rows"][-1]["methods"]["BP"]["predicted"] == pytest.approx(predicted)
    assert found["off"]["BP"][1] == pytest.approx(0.010 * 60 * 1.04 / predicted)


def test_in_a_round_bowl_scalars_are_ahead_over_no_link(measured):
    assert scaling.context(measured)["never"]


def test_the_measured_ratio_is_to_a_loss_that_all_seeds_came_to(measured):
    curves = {"backprop": [[2.3, 1.0, 0.5], [2.3, 1.9, 0.5]], "rank-one": [[2.3, 2.1, 2.0, 1.2], [2.3, 2.2, 1.5, 1.4]]}
    found = scaling.context(measured | {"descent": descent(curves)})["descent"]
    assert found["level"] == 1.4
    assert found["steps"]["backprop"] == (20, 30, 40)
    assert found["steps"]["rank-one"] == (60, 60, 60)
    assert found["ratio"] == 2
    assert found["even"][0] > 0
    assert found["without"] == pytest.approx(30 * SECONDS["BP"])


@pytest.mark.parametrize("curves", [{"backprop": [[2.3]]}, {"rank-one": [[2.3]]}])
def test_without_trainings_of_both_there_is_no_measured_ratio(measured, curves):
    assert scaling.context(measured | {"descent": descent(curves)})["descent"] is None


def test_one_process_alone_is_too_little_for_a_section(measured):
    assert scaling.context(measured | {"rows": [row(1)]}) is None


def test_without_root_the_page_says_why_links_are_not_slow(measured):
    text = printing.text_of(scaling, measured | {"obstacle": "only root may", "rows": [row(1), row(2)]})
    assert "Links could not be slowed on this machine (only root may)" in text
    assert "A model with three numbers" not in text


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure(count, rate, **options):
        asked.append((count, rate, options["slow"]))
        return row(count, rate)

    monkeypatch.setattr(study.sharing, "measure_step", measure)
    monkeypatch.setattr(links, "obstacle", lambda: "")
    settings = study.SHORT._replace(counts=(1, 2), rates=(None, 100))
    study.measure(settings, tmp_path)
    assert asked == [(1, None, False), (2, None, False), (2, 100, True)]
    study.measure(settings, tmp_path)
    assert len(asked) == 3
    file = tmp_path / SCALING
    assert len(json.loads(file.read_text())["rows"]) == 3
    file.unlink()
    monkeypatch.setattr(links, "obstacle", lambda: "only root may")
    assert len(study.measure(settings, tmp_path)["rows"]) == 2


def test_the_committed_measurements_can_be_continued(monkeypatch):
    monkeypatch.setattr(study.sharing, "measure_step", lambda *_, **__: pytest.fail("measured again"))
    assert len(study.measure(study.FULL, RESULTS)["rows"]) == 9
