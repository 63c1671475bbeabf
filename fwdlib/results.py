"""One record per run of a notebook: written whole or not at all, and read back as a record or as a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwdlib import runtime
from fwdlib.atomic import write_bytes
from fwdlib.history import History, Run
from fwdlib.statistics import Interval, difference_by_seed, median_interval

if TYPE_CHECKING:
    import pandas as pd

    from fwdlib.data import Source

FORMAT = 1


@dataclasses.dataclass
class Record:
    """The settings and the outcome of a training run: enough to redraw every figure without training again."""

    name: str
    """The notebook's name, for example ``"1b_logistic_forward"``; also the name of the file."""
    title: str
    """For the legend of figures: ``"forward gradient"`` or ``"backprop"``."""
    parameters: dict[str, Any]
    """The notebook's parameters."""
    source: dict[str, Any]
    """The data: :class:`fwdlib.data.Source` as a dict."""
    num_test: int
    num_params: int
    together: int
    runs: list[Run]
    """One for each seed."""
    alone: Run
    """The first seed again, trained alone: its times are the timings."""
    environment: dict[str, Any]
    quick: bool


def make_record(
    name: str, *, title: str, history: History, alone: History, parameters: dict[str, Any], source: Source
) -> Record:
    """Return the record of a run.

    Args:
        name: of the notebook, without ``.ipynb``.
        title: of the method, for legends.
        history: of all seeds.
        alone: of the first seed alone, for its times.
        parameters: of the notebook, the device among them.
        source: of the data.
    """
    return Record(
        name=name,
        title=title,
        parameters=parameters,
        source=source._asdict(),
        num_test=history.num_test,
        num_params=sum(p.numel() for p in history.params[0].values()),
        together=history.together,
        runs=history.runs,
        alone=alone.runs[0],
        environment=runtime.environment(parameters.get("device", "cpu")),
        quick=runtime.is_quick(),
    )


def save_run(name: str, *, folder: str | Path | None = None, **content: Any) -> Path:
    """Write the record of a run to ``<folder>/<name>.json``, whole or not at all.

    Args:
        name: of the notebook, without ``.ipynb``.
        folder: where the record goes. Default: :func:`fwdlib.runtime.results_dir`.
        content: the other arguments of :func:`make_record`.

    Returns:
        The path of the record.

    Raises:
        OSError: if it cannot be written; the message says where and why. The old file is left in place.
    """
    record = make_record(name, **content)
    path = Path(folder or runtime.results_dir()) / f"{name}.json"
    write_json(path, {"format": FORMAT, **dataclasses.asdict(record)}, exact=("parameters",))
    return path


def load_run(path: str | Path) -> Record:
    """Read a record that :func:`save_run` wrote.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is not a record of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no record at {path}; run the notebook {path.stem}.ipynb to make one")
    again = f"delete it and run {path.stem}.ipynb again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a record of format {FORMAT}; {again}")
    try:
        content["parameters"] = restored(content["parameters"])
        content["runs"] = [_read_run(run) for run in content["runs"]]
        content["alone"] = _read_run(content["alone"])
        return Record(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of format {FORMAT} ({error!r}); {again}") from error


def table(records: list[Record]) -> pd.DataFrame:
    """Return one row per seed of each record: its status, number of steps, losses and errors.

    Args:
        records: any number of records.

    Returns:
        Columns ``name, title, seed, status, iterations, train_loss, test_loss, test_errors, test_accuracy``.
    """
    import pandas as pd  # half a second, which no figure needs

    rows = [
        {
            "name": record.name,
            "title": record.title,
            "seed": run.seed,
            "status": run.status,
            "iterations": run.iterations,
            "train_loss": run.train_loss[-1],
            "test_loss": run.end(record.num_test)[0],
            "test_errors": run.end(record.num_test)[1],
            "test_accuracy": 1 - run.end(record.num_test)[1] / record.num_test,
        }
        for record in records
        for run in record.runs
    ]
    return pd.DataFrame(rows)


def summary(records: list[Record]) -> pd.DataFrame:
    """Return one column per record: how its seeds ended, their iterations, losses and errors, and the times.

    Iterations are the median over the seeds with its 95 % interval; a seed that did not reach the threshold counts as
    infinite. Loss and errors are medians over the seeds at the end. Times are those of the first seed, trained alone.

    Args:
        records: of one task or several.

    Returns:
        A table of text, for display.
    """
    import pandas as pd

    return pd.DataFrame({record.name: _summary_column(record) for record in records})


def comparison(first: Record, second: Record) -> pd.DataFrame:
    """Return :func:`summary` of two records, headed by their titles, with their difference pair by pair.

    A pair is a seed that both records have. Differences are means over the pairs with 95 % intervals; a pair in which a
    seed did not finish has no difference and is left out, as the first row says. Times are ratios.

    Args:
        first: the one that is subtracted, usually backprop's.
        second: of the same task.

    Returns:
        A table of text, for display.
    """
    import pandas as pd

    columns = {record.title: _summary_column(record) for record in (first, second)}
    return pd.DataFrame(columns | {"mean difference, seed by seed": _difference_column(first, second)})


def _difference_column(first: Record, second: Record) -> dict[str, str]:
    ends = [_finished(record) for record in (first, second)]
    number = sum(seed in ends[1] for seed in ends[0])
    steps, loss, wrong = (
        difference_by_seed(*({seed: end[i] for seed, end in of.items()} for of in reversed(ends))) for i in range(3)
    )
    accuracy = wrong and Interval(*(-100 * end / first.num_test for end in reversed(wrong)))
    one, other = (np.array(record.alone.step_seconds) for record in (first, second))
    texts = [
        f"{number} pairs",
        *(
            interval_text(difference, form) if difference else "none"
            for difference, form in ((steps, "{:+.1f}"), (loss, "{:+.4f}"), (accuracy, "{:+.1f} %"), (wrong, "{:+.1f}"))
        ),
        f"{other.mean() / one.mean():.2f} times" if one.size and other.size else "no step was needed",
        f"{other.sum() / one.sum():.2f} times" if one.size and other.size else "no step was needed",
    ]
    return dict(zip(_summary_column(first), texts, strict=True))


def _finished(record: Record) -> dict[int, tuple[float, float, float]]:
    # iterations, test loss and errors at the end of each seed that finished
    found = zip(record.runs, iterations(record), strict=True)
    return {run.seed: (num, *map(float, run.end(record.num_test))) for run, num in found if math.isfinite(num)}


def _summary_column(record: Record) -> dict[str, str]:
    ended = Counter(run.status for run in record.runs)
    loss, wrong = (
        median_interval(values).estimate
        for values in zip(*(run.end(record.num_test) for run in record.runs), strict=True)
    )
    steps = np.array(record.alone.step_seconds)
    return {
        "seeds": ", ".join(f"{count} {status}" for status, count in ended.most_common()),
        "iterations, median [95 % interval]": interval_text(median_interval(iterations(record)), "{:.0f}"),
        "test loss at the end, median": f"{loss:.3f}",
        "test accuracy at the end, median": f"{100 * (1 - wrong / record.num_test):.1f} %",
        "misclassifications at the end, median": f"{wrong:g} of {record.num_test}",
        "mean time of an iteration": f"{1e3 * steps.mean():.2f} ms" if steps.size else "no step was needed",
        "total time": f"{steps.sum():.2f} s for {record.alone.iterations} iterations",
    }


def iterations(record: Record) -> list[float]:
    """Return each seed's number of iterations, infinite for one that diverged or did not reach the threshold."""
    finished = ("reached", "completed")
    return [run.iterations if run.status in finished else float("inf") for run in record.runs]


def interval_text(interval: Interval, form: str = "{:.3g}") -> str:
    """Return ``estimate [low, high]``, each formatted by ``form``; only the estimate if there is no interval.

    Example:
        >>> interval_text(Interval(300.0, 312.4, float("inf")), "{:.0f}")
        '312 [300, never]'
    """
    low, estimate, high = ("never" if value == float("inf") else form.format(value) for value in interval)
    return f"{estimate} [{low}, {high}]" if interval.low == interval.low else f"{estimate}"


def write_json(path: Path, content: Any, exact: Sequence[str] = ()) -> None:
    """Write ``content`` as JSON, whole or not at all. Floats are rounded to six digits; nan and infinity become words.

    Args:
        path: of the file; its folder is made if needed.
        content: dicts, lists, strings and numbers.
        exact: keys of ``content`` whose floats keep all their digits; :func:`restored` reads their values back.

    Raises:
        OSError: as :func:`write_text`.
    """
    written = {key: _marked(content[key]) if key in exact else _rounded(content[key]) for key in content}
    write_text(path, json.dumps(written, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all.

    Args:
        path: of the file; its folder is made if needed.
        text: its new content.

    Raises:
        OSError: as :func:`fwdlib.atomic.write_bytes`. The old file is left in place.
    """
    write_bytes(path, text.encode(), "FWDLIB_RESULTS names the folder")


def restored(value: Any) -> Any:
    """Return what :func:`write_json` has written under one of the ``exact`` keys, as it was given."""
    if isinstance(value, dict):
        return float(value["float"]) if value.keys() == {"float"} else {k: restored(item) for k, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value


def _marked(value: Any) -> Any:
    # JSON has no nan and no infinity, and a word would be read back as one.
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    return [_marked(item) for item in value] if isinstance(value, (list, tuple)) else value


def _rounded(value: Any) -> Any:
    # Six digits are more than any figure or table shows, and make the file three times smaller.
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _read_run(content: dict[str, Any]) -> Run:
    run = Run(**content)
    for name in ("train_loss", "test_loss", "step_seconds"):
        setattr(run, name, [float(value) for value in getattr(run, name)])
    return run
