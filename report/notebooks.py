"""Refresh the committed notebooks: ``python -m report.notebooks`` (``make notebooks``).

Each is executed from top to bottom on real data and written back with its outputs, but without progress bars, widgets,
stderr and time stamps. A notebook in which nothing but measured times came out differently is left as it was: a cell
names its outputs that hold times, by number, under ``timed`` in its metadata. The Colab badge and the line that
installs fwdlib there come from the repository's address in pyproject.toml. Without an address there is no badge, and
Colab gets the wheel. The start notebook's table of reasons, and the verdicts at the end of the notebooks beyond the
six, are computed from the committed results.
"""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import os
import re
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image
from tqdm import tqdm

from fwdlib import results, runtime
from fwdlib.atomic import check_writable, message_of
from report.page.context import build_context, load_results
from report.sections import choice
from report.sections.verdicts import Finding

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
COLAB = "https://colab.research.google.com"
SETUP_TEXT = "## Setup\n\nOn your own machine there is nothing to do here. In Colab, {colab}run this cell."
SETUP_CODE = """\
import sys

if "google.colab" in sys.modules:  # nothing to do on your own machine
    %pip install --quiet --no-deps {package} palmerpenguins"""
REASONS = "reasons"  # tag of the cell that holds them
REASONS_TEXT = """\
## Why avoid backprop at all?

If you can run backprop, do: nothing here trains a network of ordinary size faster. The first row is that case. The
other rows are the reasons to want something else, each with what the report measured, in brackets its 95 % interval.

{table}"""

TIMED = "timed"  # metadata of a cell: the numbers of its outputs that hold measured times
CLAIMS = "claims"  # metadata of a cell: for each author and year, the key in report/page/references.bib
CLAIMS_BOX = re.compile(r"^> \*\*Published, and checked\.\*\*.*(?:\n>.*)*", re.MULTILINE)
CLAIMS_TEXT = """\
> **Published, and checked.** What the report finds in longer studies ([all claims](../../report/report.html#claims)):
>
{lines}"""


@dataclass
class Options:
    """Execute the committed notebooks on real data and write them back, cleaned."""

    notebooks: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Which ones; all of them by default."""
    timeout: int = 600
    """Seconds for one notebook."""
    write_only: bool = False
    """Write the badges and the setup cells, and execute nothing."""
    times: bool = False
    """Write a notebook also if nothing but measured times differs, for example after a run on a quieter machine."""


def main(options: Options) -> None:
    """Refresh the notebooks that ``options`` names.

    Raises:
        SystemExit: with a message, if a notebook fails or ran on substitute data; its file is not changed then. Also if
            a file cannot be written, before anything runs.
    """
    paths = list(options.notebooks) or sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    address = config["project"].get("urls", {}).get("Repository")
    try:
        for path in paths:
            check_writable(path)
    except OSError as error:
        sys.exit(message_of(error))
    for path in (bar := tqdm(paths, unit="notebook")):
        bar.set_postfix_str(path.stem)
        notebook = nbformat.read(path, as_version=4)
        write_setup(notebook, path.resolve().relative_to(ROOT).as_posix(), address)
        write_reasons(notebook)
        write_claims(notebook)
        if not options.write_only:
            executed = copy.deepcopy(notebook)
            try:
                execute(executed, path.stem, options.timeout)
                clean(executed)
                is_new = options.times or without_times(executed) != without_times(notebook)
            except (CellExecutionError, TimeoutError, ValueError) as error:
                bar.close()
                sys.exit(f"{path} was not refreshed: {error}")
            if is_new:
                notebook = executed
            else:
                bar.write(f"{path}: nothing new but measured times; its outputs are kept")
        results.write_text(path, nbformat.writes(notebook) + "\n")


def write_setup(notebook: NotebookNode, name: str, address: str | None) -> None:
    """Write the badge under the title, the text under "## Setup" and the code after it, in place.

    Args:
        notebook: to change.
        name: its path inside the repository.
        address: of the repository, ``https://github.com/owner/name``, or None.
    """
    title, *rest = notebook.cells[0].source.split("\n")
    rest = [line for line in rest if not line.startswith("[![Open in Colab]")]
    if address:
        target = f"{COLAB}/github/{address.removeprefix('https://github.com/')}/blob/main/{name}"
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})"
        rest = ["", badge, *rest]
    notebook.cells[0].source = "\n".join([title, *rest])
    package = f"git+{address}" if address else "fwdlib-*.whl"
    upload = (
        ""
        if address
        else "upload the wheel that `make wheel` builds into `dist/` (the folder symbol on the left), then "
    )
    setup = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Setup"))
    notebook.cells[setup].source = SETUP_TEXT.format(colab=upload)
    notebook.cells[setup + 1].source = SETUP_CODE.format(package=package)


def write_reasons(notebook: NotebookNode) -> None:
    """Write the report's table of reasons, from the committed results, into the cell with the tag for it, if any."""
    for cell in notebook.cells:
        if REASONS in cell.metadata.get("tags", ()):
            found = choice.rows(_context())
            cell.source = REASONS_TEXT.format(table=choice.markdown(found, "../report/report.html"))


def write_claims(notebook: NotebookNode) -> None:
    """Write the report's verdicts into the box of the cell that names sources of claims in its metadata, if any.

    Raises:
        ValueError: if the cell has no box to write into, or the report judges no claim of a source.
    """
    for cell in notebook.cells:
        if CLAIMS not in cell.metadata:
            continue
        found, lines = _context()["claims"], []
        for author, key in cell.metadata[CLAIMS].items():
            judged = [each for each in found if f"[@{key}]" in each.claim.source]
            if not judged:
                raise ValueError(f"the report judges no claim of {key}; see CLAIMS in report/sections/claims.py")
            lines += [_verdict_line(each, author) for each in judged]
        box = CLAIMS_TEXT.format(lines="\n".join(lines))
        cell.source, number = CLAIMS_BOX.subn(lambda _, box=box: box, cell.source)
        if number != 1:
            raise ValueError("the cell with claims has no line that begins with '> **Published, and checked.**'")


@functools.cache
def _context() -> dict[str, Any]:
    # Of the page, from the committed results, which no notebook changes.
    return build_context(load_results(ROOT / "report" / "results"))


def _verdict_line(finding: Finding, author: str) -> str:
    reason = f": {finding.reason}" if finding.reason else ""
    return f"> - *{finding.claim.text.removesuffix('.')}* ({author}): **{finding.verdict}**{reason}."


def execute(notebook: NotebookNode, name: str, timeout: int) -> None:
    """Run all cells in a new kernel, in an empty folder, and keep their outputs.

    Args:
        notebook: to run, in place.
        name: of the record that it saves.
        timeout: seconds for the whole notebook.

    Raises:
        CellExecutionError: if a cell fails.
        TimeoutError: if it takes longer.
        ValueError: if its record was made with substitute data.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FWDLIB_RESULTS": folder, "FWDLIB_QUICK": ""}
        if data := runtime.data_dir():
            environment["FWDLIB_DATA"] = str(data)
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
        record = Path(folder) / f"{name}.json"
        source = record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("source")
    # A notebook that needs no data names no source, or keeps no record.
    if source and source["substitute_for"]:
        raise ValueError(
            f"it ran on {source['name']} in place of {source['substitute_for']}. Committed notebooks "
            f"show the real data: set FWDLIB_DATA to a folder that has it, or connect to the network."
        )


def clean(notebook: NotebookNode) -> None:
    """Remove, in place, what a committed notebook should not contain."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # what a widget shows where there is none
                    output.data.pop(WIDGET, None)
            cell.outputs = [output for output in cell.outputs if _belongs(output)]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller_png(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def without_times(notebook: NotebookNode) -> NotebookNode:
    """Return a copy in which the outputs that hold measured times have neither numbers nor pictures."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for i in cell.metadata.get(TIMED, ()):
            if i < len(cell.outputs):
                cell.outputs[i] = _without_numbers(cell.outputs[i])
    return notebook


def _without_numbers(output: Any) -> Any:
    if isinstance(output, dict):
        return {name: _without_numbers(value) for name, value in output.items() if name != "image/png"}
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "#", output)) if isinstance(output, str) else output


def smaller_png(encoded: str) -> str:
    """Return a base64 PNG with its colours reduced to 128: a figure looks the same at a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    image = image.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _belongs(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout"
    return WIDGET not in output.get("data", {})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
