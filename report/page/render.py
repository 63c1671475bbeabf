"""From results to pages: a Markdown text, an HTML file and a PDF. The same results give the same bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pypandoc
import typst

from fwdlib.history import Run
from fwdlib.statistics import Interval
from report.output import Output
from report.page import figures
from report.page.context import METHODS, Results, build_context
from report.page.escaping import Markdown, code, escaped, policy
from report.wording import count, duration, enumerated, interval, megabytes, number, times

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "sliders.js")  # become one, in the page
PAGES = ("report.html", "report.pdf")
MARKDOWN = "markdown-tex_math_single_backslash"
CITE = ["--citeproc", f"--bibliography={HERE / 'references.bib'}"]
NOTEBOOKS = HERE.parents[1] / "notebooks"
NAMES = {"backprop": "backprop", "forward": "forward gradients"}  # in a sentence


def render(results: Results, output: Output) -> list[Path]:
    """Draw the figures and write both pages. Nothing is put in place before all of it is made.

    Args:
        results: from :func:`report.page.context.load_results`.
        output: gets ``report.html``, ``report.pdf`` and ``figures/``, and what else is in its ``scratch``.

    Returns:
        The two pages.

    Raises:
        OutputError: if a file is in the way that no build has written.
        OSError: if they cannot be written.
    """
    scratch = output.scratch
    (scratch / "figures").mkdir(parents=True)
    figures.draw(results, scratch / "figures")
    notebooks = Path(os.path.relpath(NOTEBOOKS, output.folder)).as_posix()
    text = markdown(build_context(results)).replace("](../notebooks/", f"]({notebooks}/")
    with ThreadPoolExecutor(2) as pool:
        html, pdf = pool.submit(to_html, text, scratch), pool.submit(to_pdf, text, scratch)  # both wait for programs
        (scratch / PAGES[0]).write_text(html.result(), encoding="utf-8")
        (scratch / PAGES[1]).write_bytes(pdf.result())
    output.place()
    return [output.folder / page for page in PAGES]


def markdown(context: dict[str, Any]) -> str:
    """Return the text of the report as pandoc's Markdown. What the context holds becomes text, never markup.

    Raises:
        jinja2.UndefinedError: if the template uses a name that the context does not have.
    """
    found = environment()
    found.globals |= {"names": NAMES, "infinity": math.inf, "summary_of": partial(summary_of, context)}
    return found.get_template("report.md.j2").render(context)


def environment() -> jinja2.Environment:
    """Return what fills the templates of the page and of its sections."""
    comments = {"comment_start_string": "<#", "comment_end_string": "#>"}  # {# begins the name of a heading
    loader = jinja2.FileSystemLoader([HERE, HERE.parent])
    made = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, finalize=escaped, **comments)
    words = {form.__name__: _as_markdown(form) for form in (number, count, loss, interval, duration, times, megabytes)}
    sentences = {"signed": _as_markdown(signed), "statuses": statuses, "strays": strays, "machine": machine}
    made.filters |= words | sentences | {"capfirst": capfirst, "enumerated": enumerated, "safe": Markdown, "code": code}
    made.globals |= words
    return made


def _as_markdown(form: Callable[..., str]) -> Callable[..., Markdown]:
    # What these make of numbers has no markup, whatever the numbers are; so it stays readable in the Markdown.
    return lambda *args, **options: Markdown(form(*args, **options))


def to_html(text: str, folder: Path) -> str:
    r"""Return one HTML page that needs no other file, no network, and no script to be complete.

    Style sheet, script and figures are inside; formulas are MathML. Sections, figures and the first cells of tables get
    what links and screen readers need (``page.lua``). Browsers run and apply nothing but this script and this style.

    Args:
        text: Markdown.
        folder: holds ``figures/``.

    Example:
        >>> page = to_html("---\ntitle: One\nlang: en\n---\n\n$x^2$", HERE)
        >>> "<math" in page, page.count("<script>")
        (True, 1)
    """
    options = ["--standalone", f"--template={HERE / 'page.html'}", "--embed-resources", "--mathml", "--wrap=none"]
    options += [f"--resource-path={folder}{os.pathsep}{HERE}", f"--lua-filter={HERE / 'page.lua'}"]
    options += [f"--variable=script:{''.join((HERE / name).read_text('utf-8') for name in SCRIPTS)}"]
    options += ["--toc", "--toc-depth=3", "--syntax-highlighting=none", *CITE]
    page = pypandoc.convert_text(text, "html5", MARKDOWN, extra_args=options)
    return page.replace('content="POLICY"', f'content="{policy(page)}"', 1)


def to_pdf(text: str, folder: Path) -> bytes:
    """Return the PDF. typst sets it in the fonts that it brings, so it is the same on every machine."""
    options = ["--standalone", f"--template={HERE / 'page.typ'}", "--shift-heading-level-by=-1", "--wrap=none", *CITE]
    source = pypandoc.convert_text(text, "typst-citations", MARKDOWN, extra_args=options)
    return typst.compile(source.encode(), root=folder, ignore_system_fonts=True, format="pdf", timestamp=0)


def loss(value: float) -> str:
    """Return a loss to four digits; below 0.0001 it says only that."""
    return "< 0.0001" if 0 <= value < 1e-4 else number(value, 4, infinite="not finite")


def capfirst(text: str) -> str:
    """Return the text with its first letter in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]


def signed(difference: Interval) -> str:
    """Return a difference in words: ``15.3 [1.9, 29.1] iterations fewer``."""
    low, middle, high = difference
    if middle <= 0:
        low, middle, high = -high, -middle, -low
    return f"{interval(Interval(low, middle, high))} iterations {'fewer' if difference.estimate <= 0 else 'more'}"


def statuses(ended: dict[str, int]) -> str:
    """Return how many seeds ended in which way: ``19 reached, 1 not reached``."""
    return ", ".join(f"{number} {status}" for status, number in ended.items())


def strays(runs: list[Run]) -> str:
    """Return what happened to the seeds that did not reach the threshold."""
    said = {
        "not reached": "seed {seed} had a training loss of {loss} after {n} iterations and never reached the threshold",
        "diverged": "seed {seed} diverged: after {n} iterations its training loss was no longer finite",
    }
    shown = [
        said[run.status].format(seed=run.seed, loss=loss(run.train_loss[-1]), n=run.iterations) for run in runs[:3]
    ]
    return "; ".join(shown) + (f"; and {len(runs) - 3} more like these" if len(runs) > 3 else "")


def machine(environment: dict[str, Any]) -> str:
    """Return the machine and the versions of a run."""
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return f"{environment['processor']}, {environment['cores']} cores, {environment['system']}; {versions}"


def summary_of(context: dict[str, Any], name: str) -> str:
    """Return the medians of a quantity for all models and both methods, for a figure's alternative text."""
    form = count if name == "iterations" else duration
    return "; ".join(
        f"{task['title']}, " + ", ".join(f"{METHODS[m]} {form(v[name].estimate)}" for m, v in task["methods"].items())
        for task in context["tasks"].values()
    )
