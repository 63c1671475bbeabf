"""The whole benchmark: its result, its files and its command."""

from __future__ import annotations

import json

import pytest

from fwdlib import cli
from fwdlib.bench import benchmark, measuring, table
from fwdlib.bench.compared import COMPARED, SWEPT


@pytest.fixture
def tiny(monkeypatch):
    extent = benchmark.Extent(0.02, 6, 6, 1e-4, 8, (1, 2), (4,), (3,))
    monkeypatch.setattr(benchmark, "FULL", extent)
    monkeypatch.setattr(benchmark, "QUICK", extent)


def test_run_gives_what_can_be_saved_and_shown(tiny, monkeypatch):
    def measured(name, methods, *args):
        if name == "1x8":
            raise RuntimeError("killed")
        return dict.fromkeys(methods, 987_600_000)

    monkeypatch.setattr(benchmark, "measure_memory", measured)
    found = benchmark.run(models=["penguins-logistic"])
    assert json.loads(json.dumps(found)) == found
    entry = found["models"]["penguins-logistic"]
    assert entry["memory"] == dict.fromkeys(COMPARED, 987_600_000)
    assert list(found["depth"]) == ["1", "2"]
    assert found["depth"]["1"]["skipped"]["memory"] == "RuntimeError: killed"
    assert set(found["depth"]["2"]["memory"]) == set(SWEPT)
    for swept in found["depth"].values():
        assert set(swept["seconds"]) == {"forward", *(f"{method}, eager" for method in SWEPT)}
    assert found["width"]["4"]["title"] == "4 layers of width 4"
    assert (found["width"]["4"]["batch"], found["batch"]["3"]["batch"]) == (64, 3)
    for sweep in ("width", "batch"):
        (swept,) = found[sweep].values()
        assert {*swept["seconds"], *swept["skipped"]} > {"backprop, compiled", "rank-one, compiled", "rank-one, eager"}
        assert set(swept["memory"]) == set(SWEPT)
    assert found["environment"]["device"] == "cpu"
    shown = table.text(found | {"load": 0.0})
    assert shown.startswith("No C++ compiler was found")
    assert shown.count("987.6") == len(COMPARED) + 3 * len(SWEPT)  # no ratio of times comes near it
    assert max(map(len, shown.splitlines())) <= 130


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"models": ["penguins-logistic", "resnet"]}, "'mnist-mlp'"),
        ({"device": "tpu"}, "'cpu'"),
        ({"batch": 0}, "batch"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(options, named, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_time", lambda *args, **timing: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        benchmark.run(**options)


def test_the_command_saves_and_prints(tiny, tmp_path, capsys):
    path = tmp_path / "new" / "bench.json"
    words = ["bench", "--models", "penguins-logistic", "--no-memory", "--no-sweeps", "--batch", "8", "--out", str(path)]
    assert cli.main(words) == 0
    found = json.loads(path.read_text())
    assert found["models"]["penguins-logistic"]["batch"] == 8
    assert found["depth"] == found["width"] == found["batch"] == {}
    printed = capsys.readouterr().out
    assert "penguins logistic 4-3, batch 8" in printed
    assert str(path) in printed


def test_an_interrupted_run_leaves_no_file(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "interleave", interrupted)
    assert cli.main(["bench", "--models", "penguins-logistic", "--out", str(tmp_path / "bench.json")]) == 130
    assert capsys.readouterr().err.endswith("stopped\n")
    assert list(tmp_path.iterdir()) == []
