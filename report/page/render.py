"""From results to pages: one Markdown text, one HTML file, one PDF. The same results give the same bytes."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import psutil
import pypandoc
import typst

from fwdlib.history import Run
from report.page import context as page_context
from report.page import figures, pandoc
from report.wording import count, duration, enumerated, interval, megabytes, number, times

HERE = Path(__file__).parent
PAGES = ("report.html", "report.pdf")
CITE = ["--citeproc", f"--bibliography={HERE / 'references.bib'}"]
LINKS: tuple[pandoc.Link, ...] = (
    {"href": "site/index.html", "text": "The course, to read without running it"},
    {"href": PAGES[1], "text": "This report as PDF"},
)
NAMES = {"backprop": "backprop", "forward": "forward gradients"}  # in a sentence
SCRATCH = ".rendering-{pid}-"


def render(results: page_context.Results, output: Path) -> list[Path]:
    """Draw the figures and write both pages; all of it is made before the first file is put in place.

    Args:
        results: as :func:`report.page.context.load` reads them.
        output: folder of ``report.html``, ``report.pdf`` and ``figures/``.

    Returns:
        The two pages.

    Raises:
        OSError: if they cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    for folder in output.glob(SCRATCH.format(pid="*") + "*"):  # of a build that was killed
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH.format(pid=os.getpid()), dir=output) as name:
        scratch = Path(name)
        (scratch / "figures").mkdir()
        drawn = figures.draw(results, scratch / "figures")
        text = markdown(page_context.context(results))
        with ThreadPoolExecutor(2) as pool:  # each waits for programs of its own
            html, pdf = pool.submit(to_html, text, scratch), pool.submit(to_pdf, text, scratch)
            (scratch / PAGES[0]).write_text(html.result(), encoding="utf-8")
            (scratch / PAGES[1]).write_bytes(pdf.result())

        (output / "figures").mkdir(exist_ok=True)
        for path in drawn:
            path.replace(output / "figures" / path.name)
        for stale in set((output / "figures").glob("*.*")) - {output / "figures" / path.name for path in drawn}:
            stale.unlink()
        for file in PAGES:
            (scratch / file).replace(output / file)
    return [output / file for file in PAGES]


def markdown(context: dict[str, Any]) -> str:
    """Return the text of the report as pandoc's Markdown.

    Args:
        context: as :func:`report.page.context.context` returns it.

    Raises:
        jinja2.UndefinedError: if the template names something that the context does not have.
    """
    comments = {"comment_start_string": "<#", "comment_end_string": "#>"}  # {# begins the name of a heading
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, HERE.parent]), undefined=jinja2.StrictUndefined, **comments
    )
    words = {"number": number, "count": count, "loss": loss, "interval": interval, "duration": duration, "times": times}
    words |= {"megabytes": megabytes}
    sentences = {"signed": signed, "statuses": statuses, "strays": strays, "machine": machine, "capfirst": capfirst}
    environment.filters |= words | sentences | {"enumerated": enumerated}
    environment.globals |= words | {"names": NAMES, "infinity": math.inf, "summary_of": partial(summary_of, context)}
    return environment.get_template("report.md.j2").render(context)


def to_html(text: str, folder: Path) -> str:
    """Return one HTML page that needs no other file and no network.

    Args:
        text: Markdown.
        folder: holds ``figures/``.
    """
    options = ["--toc-depth=3", "--syntax-highlighting=none", *CITE]
    return pandoc.to_html(text, resources=folder, notebooks="site/", links=LINKS, options=options)


def to_pdf(text: str, folder: Path) -> bytes:
    """Return the PDF, set by typst with the fonts that it brings, so that it is the same on every machine.

    Args:
        text: Markdown.
        folder: holds ``figures/``.
    """
    options = ["--standalone", f"--template={HERE / 'page.typ'}", "--shift-heading-level-by=-1", "--wrap=none", *CITE]
    source = folder / "report.typ"
    source.write_text(
        pypandoc.convert_text(text, "typst-citations", pandoc.MARKDOWN, extra_args=options), encoding="utf-8"
    )
    return typst.compile(source, root=folder, ignore_system_fonts=True, format="pdf", timestamp=0)


def loss(value: float) -> str:
    """Return a loss to four digits, and one that is as good as zero as such."""
    return "< 0.0001" if 0 <= value < 1e-4 else number(value, 4, infinite="not finite")


def capfirst(text: str) -> str:
    """Return the text with its first letter in upper case, and the rest as it is."""
    return text[:1].upper() + text[1:]


def signed(difference: page_context.Interval) -> str:
    """Return a difference in words: ``15.3 [1.9, 29.1] iterations fewer``."""
    low, middle, high = difference
    if middle <= 0:
        low, middle, high = -high, -middle, -low
    return f"{interval(page_context.Interval(low, middle, high))} iterations {'fewer' if difference.estimate <= 0 else 'more'}"


def statuses(ended: dict[str, int]) -> str:
    """Return how many seeds ended how: ``19 reached, 1 not reached``."""
    return ", ".join(f"{number} {status}" for status, number in ended.items())


def strays(runs: list[Run]) -> str:
    """Return what became of the seeds that did not reach the threshold."""
    said = {
        "not reached": "seed {seed} had a training loss of {loss} after {n} iterations and never reached the threshold",
        "diverged": "seed {seed} diverged: after {n} iterations its training loss was no longer finite",
    }
    shown = [
        said[run.status].format(seed=run.seed, loss=loss(run.train_loss[-1]), n=run.iterations) for run in runs[:3]
    ]
    return "; ".join(shown) + (f"; and {len(runs) - 3} more like these" if len(runs) > 3 else "")


def machine(environment: dict[str, Any]) -> str:
    """Return what a run was made on."""
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return f"{environment['processor']}, {environment['cores']} cores, {environment['system']}; {versions}"


def summary_of(context: dict[str, Any], name: str) -> str:
    """Return the medians of a quantity for all models and both methods, for a figure's alternative text."""
    form = count if name == "iterations" else duration
    return "; ".join(
        f"{task['title']}, "
        + ", ".join(f"{page_context.METHODS[m]} {form(v[name].estimate)}" for m, v in task["methods"].items())
        for task in context["tasks"].values()
    )
