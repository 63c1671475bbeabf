"""The table: which numbers it shows, and what it warns of."""

from __future__ import annotations

from fwdlib.bench import table


def test_the_fastest_forward_gradient_is_compared_with_both_forms_of_compiled_backprop():
    times = {
        "forward": 0.25,
        "backprop, eager": 3.0,
        "backprop, compiled": 2.0,
        "backprop one graph, compiled": 1.0,
        "rank-one, eager": 0.5,
    }
    found = {"title": "penguins logistic 4-3", "batch": 250, "num_params": 15, "skipped": {}}
    found |= {"reference": "backprop, compiled", "seconds": {name: [value] * 6 for name, value in times.items()}}
    shown = table.text({"load": 0.1, "models": {"penguins-logistic": found}, "depth": {}})
    last = shown.rstrip().splitlines()[-1].strip()
    assert last == (
        "fastest forward gradient: rank-one, eager; 0.25 [0.25, 0.25] of backprop, compiled; "
        "0.50 [0.50, 0.50] of backprop one graph, compiled"
    )
    (row,) = (line.split() for line in shown.splitlines() if line.strip().startswith("rank-one"))
    assert " ".join(row) == "rank-one, eager 500 [500, 500] 2.00 0.25 [0.25, 0.25]"


def test_a_busy_machine_is_named():
    assert table.text({"load": 3.5, "models": {}, "depth": {}}).startswith("The machine was busy (load 3.5")
