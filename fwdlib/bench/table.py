"""The table that ``python -m fwdlib bench`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fwdlib.bench.benchmark import SWEEPS
from fwdlib.bench.compared import COMPILED, OURS, SWEPT, Variant
from fwdlib.bench.measuring import FORWARD, NO_COMPILER
from fwdlib.results import interval_text
from fwdlib.statistics import Interval, paired_ratio

BUSY = 0.7  # load average of the minute before


def text(found: dict[str, Any]) -> str:
    """Return a table of what was measured, for the terminal.

    Args:
        found: as :func:`fwdlib.bench.benchmark.run` returns it.
    """
    lines = []
    if found["load"] > BUSY:
        lines.append(
            f"The machine was busy (load {found['load']:.1f} before the start): do not trust the times below.\n"
        )
    if any(NO_COMPILER in entry["skipped"].values() for entry in found["models"].values()):
        lines.append("No C++ compiler was found: compiled variants are skipped.\n")
    for entry in found["models"].values():
        lines += [*_model_lines(entry), ""]
    for sweep in SWEEPS:
        if found.get(sweep):
            lines += [*_sweep_lines(found, sweep), ""]
    return "\n".join(lines).rstrip() + "\n"


def _model_lines(entry: dict[str, Any]) -> Iterator[str]:
    seconds, reference, memory = entry["seconds"], entry["reference"], entry.get("memory", {})
    yield f"{entry['title']}, batch {entry['batch']}, {entry['num_params']} parameters"
    compiling = entry.get("compile_seconds", {})
    rows = [("", "step [ms]", "R", f"ratio to {reference}", "memory [MB]", "compiled in [s]")]
    for name, values in seconds.items():
        ratio = "" if name == FORWARD else interval_text(paired_ratio(values, seconds[reference]), "{:.2f}")
        method, _, mode = name.partition(", ")
        megabytes = f"{memory[method] / 1e6:.1f}" if method in memory and mode == "eager" else ""
        in_seconds = f"{compiling[name]:.0f}" if name in compiling else ""
        rows.append((name, _milliseconds(values), _relative(values, seconds[FORWARD]), ratio, megabytes, in_seconds))
    yield from _aligned(rows)
    for name, reason in entry["skipped"].items():
        if reason != NO_COMPILER:
            yield f"  skipped {name}: {reason}"
    medians = {name: np.median(values) for name, values in seconds.items()}
    ours = [name for name in seconds if any(name.startswith(method) for method in OURS)]
    best = min(ours, key=medians.get)
    one_graph = str(Variant("backprop", compiled=True, form="one graph"))
    against = [reference, *([one_graph] if one_graph in seconds else [])]
    ratios = [f"{interval_text(paired_ratio(seconds[best], seconds[name]), '{:.2f}')} of {name}" for name in against]
    yield f"  fastest forward gradient: {best}; {'; '.join(ratios)}"


def _sweep_lines(found: dict[str, Any], sweep: str) -> Iterator[str]:
    batch, settings = next(iter(found[sweep].values()))["batch"], found["settings"]
    if sweep == "depth":
        net = f"MLP of n layers of width {settings['width']}, batch {batch}"
    else:
        width, size = ("n", batch) if sweep == "width" else (settings["mlp"]["width"], "n")
        net = f"MLP of {settings['mlp']['layers']} layers of width {width}, batch {size}"
    forms = {"eager": [Variant(method) for method in SWEPT]}
    forms |= {} if sweep == "depth" else {"compiled": [Variant(method, compiled=True) for method in COMPILED]}
    for mode, columns in forms.items():
        yield f"{net}: time over a plain forward evaluation, {mode}"
        rows = [("n", *(variant.method for variant in columns))]
        for value, entry in found[sweep].items():
            seconds, keys = entry["seconds"], map(str, columns)
            rows.append(
                (value, *(_relative(seconds[key], seconds[FORWARD]) if key in seconds else "-" for key in keys))
            )
        yield from _aligned(rows)
    yield f"{net}: memory [MB]"
    rows = [("n", *SWEPT)]
    for value, entry in found[sweep].items():
        memory = entry.get("memory", {})
        rows.append((value, *(f"{memory[method] / 1e6:.1f}" if method in memory else "-" for method in SWEPT)))
    yield from _aligned(rows)


def _milliseconds(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return interval_text(Interval(1e3 * low, 1e3 * middle, 1e3 * high), "{:.3g}")


def _relative(values: Sequence[float], forward: Sequence[float]) -> str:
    return f"{paired_ratio(values, forward).estimate:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip()
