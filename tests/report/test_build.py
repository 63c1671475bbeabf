"""The report, made from small made-up records: what it says is what they say, and it is whole or not there."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from fwdlib.history import Run
from fwdlib.models import num_parameters
from fwdlib.results import FORMAT, Record, load_run, write_json
from fwdlib.statistics import Interval
from report import __main__ as program
from report import wording
from report.page import context as page_context
from report.page import render

ROOT = Path(__file__).parents[2]


def make_run(seed: int, iterations: int, status: str = "reached") -> Run:
    losses = [2.0 - 1.7 * i / iterations for i in range(iterations + 1)]
    if status == "diverged":
        losses[-1] = math.nan
    errors = [40 - 33 * i // iterations for i in range(iterations + 1)]
    return Run(seed, status, iterations, losses, [loss + 0.02 for loss in losses], errors, [])


def make_results(folder: Path) -> Path:
    """Write the six records and the timings: seed s takes 30 + s steps with backprop, 33 + s with forward gradients."""
    versions = {"python": "3.11.7", "torch": "2.15.0"}
    environment = {"versions": versions, "system": "Linux x86_64", "processor": "a CPU", "cores": 2, "threads": 1}
    timings = {"environment": {**environment, "threads": 2}, "tasks": {}}
    for key, task in page_context.TASKS.items():
        data = "KMNIST" if key == "cnn" else "penguins/processed"
        source = {
            "name": data,
            "origin": "a shelf",
            "substitute_for": None,
            "fingerprint": f"of {data}",
            "licence": "CC0 1.0",
            "citation": "Someone (2020)",
            "split_seed": 0,
        }
        fixed = key == "cnn"
        parameters = {
            "seed": 0,
            "num_seeds": 8,
            "learning_rate": 0.2,
            "threshold": None if fixed else 0.3,
            "max_iterations": 77,
            "optimizer": "SGD",
            **({"num_iterations": 9} if fixed else {}),
        }
        blocks = {"num_tangents": 1, "tangents": "normal", "blocks": "joint" if fixed else "parameter"}
        timed = {}
        for method, title in page_context.METHODS.items():
            late = 3 * (method == "forward")
            runs = [make_run(s, *((9, "completed") if fixed else (30 + s + late, "reached"))) for s in range(8)]
            record = Record(
                name=getattr(task, method),
                title=title,
                parameters=parameters | (blocks if late else {}),
                source=source,
                num_test=84,
                num_params=num_parameters(task.build()),
                stack_size=8,
                runs=runs,
                alone=runs[0],
                environment=environment,
                quick=False,
            )
            save(record, folder)
            step = [(3e-3 if late else 1e-3) * (1 + s / 100) for s in range(8)]
            timed[title] = {
                "seed": list(range(8)),
                "status": [run.status for run in runs],
                "iterations": [run.iterations for run in runs],
                "step_seconds": step,
                "total_seconds": [s * run.iterations for s, run in zip(step, runs, strict=True)],
            }
        timings["tasks"][key] = {"plain_seconds": [5e-4] * 3, "published_seconds": [0.6] * 3, "methods": timed}
    write_json(folder / "timings.json", timings)
    return folder


def save(record: Record, folder: Path) -> None:
    write_json(folder / f"{record.name}.json", {"format": FORMAT, **copy.deepcopy(record.__dict__)} | {
        "runs": [run.__dict__ for run in record.runs], "alone": record.alone.__dict__
    })  # fmt: skip


def text_of(folder: Path) -> str:
    return render.markdown(page_context.context(page_context.load(folder)))


def section(text: str, name: str) -> str:
    """Return one section of the Markdown, by its name in braces."""
    return re.search(rf"\{{#{name} ?\}}(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)[1]


def change(folder: Path, name: str, edit) -> None:
    record = load_run(folder / f"{name}.json")
    edit(record)
    save(record, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return make_results(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def results(tmp_path) -> Path:
    return make_results(tmp_path / "results")


@pytest.fixture(scope="module")
def output(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    render.render(page_context.load(saved), folder)
    return folder


class Page(HTMLParser):
    """What a browser would load, and what a reader is offered."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *names: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag in names]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def page(output) -> Page:
    return Page(output / "report.html")


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_records(saved):
    text = section(text_of(saved), "logistic")
    # eight seeds of 30..37 steps: median 33.5; 3 more with forward gradients; the interval is the whole range
    assert "| number of iterations | 33.5 [30, 37] | 36.5 [33, 40] |" in text
    assert "| how the 8 seeds ended | 8 reached | 8 reached |" in text
    assert "| test loss at the end | 0.3200 | 0.3200 |" in text
    assert "| misclassifications, of 84 | 7 | 7 |" in text
    assert "| test accuracy at the end [%] | 91.7 | 91.7 |" in text
    assert "| time of an iteration | 1.03 [1.00, 1.07] ms | 3.10 [3.00, 3.21] ms |" in text
    assert "R~b~ = 2.07 | R~f~ = 6.21" in text
    assert "3.00 iterations more" in text
    assert "15 parameters in 2 tensors" in text
    assert "learning rate 0.2; a seed stops once its training loss is at most 0.3, or after 77 iterations" in text


def test_ratios_are_of_pairs(saved):
    task = page_context.context(page_context.load(saved))["tasks"]["logistic"]
    assert task["ratios"]["step"] == pytest.approx((3, 3, 3))
    ratios = sorted((33 + s) / (30 + s) for s in range(8))
    assert task["ratios"]["iterations"] == pytest.approx((ratios[0], (ratios[3] + ratios[4]) / 2, ratios[-1]))
    assert task["speedup"] == pytest.approx(0.6 / 3.105e-3)
    assert "takes 3.00 times as long" in section(text_of(saved), "models")


@pytest.mark.parametrize(
    "name", [name for task in page_context.TASKS.values() for name in (task.backprop, task.forward)]
)
def test_another_record_makes_another_page(results, name):
    before = text_of(results)

    def edit(record):
        for run in record.runs:
            run.test_loss[-1] = 1.2345

    change(results, name, edit)
    after = text_of(results)
    assert "1.234" not in before
    assert "1.234" in after


def test_other_times_make_another_page(results):
    content = json.loads((results / "timings.json").read_text())
    for seconds in content["tasks"]["cnn"]["methods"]["forward gradient"].values():
        if isinstance(seconds[0], float):
            seconds[:] = [10 * value for value in seconds]
    write_json(results / "timings.json", content)
    assert "Convolutional network" in text_of(results)
    assert "takes 30.0 times as long" in section(text_of(results), "models")


def test_verdicts_follow_from_the_intervals():
    low, middle, high = Interval(1, 2, 3), Interval(2.5, 3, 4), Interval(5, 6, 7)
    assert page_context.overlap(low, middle) == "same"
    assert page_context.overlap(low, high) == "more"
    assert page_context.overlap(high, low) == "less"
    assert page_context.overlap(low, Interval(math.nan, 6, math.nan)) == "unclear"
    assert page_context.overlap(Interval(5, math.inf, math.inf), Interval(math.inf, math.inf, math.inf)) == "never"
    assert [page_context.relation(Interval(*r)) for r in ((0.5, 0.6, 0.9), (0.9, 1, 1.1), (1.1, 2, math.inf))] == [
        "less",
        "same",
        "more",
    ]


def test_a_pair_with_a_seed_that_never_arrived_is_not_left_out():
    inf = math.inf
    assert page_context.paired_ratio([2, 2, inf], [1, 1, 1]) == pytest.approx((math.nan, 2, math.nan), nan_ok=True)
    assert page_context.paired_ratio([inf, inf, 4], [1, 1, 1]).estimate == inf
    assert page_context.paired_ratio([3], [inf]).estimate == 0
    assert page_context.paired_ratio([inf, 6], [inf, 2]).estimate == 3
    assert math.isnan(page_context.paired_ratio([inf], [inf]).estimate)


def test_published_conclusion_is_judged_by_the_results(results):
    assert "**At the published settings: no.**" in section(text_of(results), "answer")
    content = json.loads((results / "timings.json").read_text())
    methods = content["tasks"]["logistic"]["methods"]
    methods["backprop"], methods["forward gradient"] = methods["forward gradient"], methods["backprop"]
    write_json(results / "timings.json", content)
    text = text_of(results)
    assert "**At the published settings: yes.**" in section(text, "answer")
    assert re.search(r"time of the training \| 0\.351 \| 0\.3.* points the same way", section(text, "published"))


# --- seeds that did not arrive, substitutes, quick mode --------------------------------------------------------------


def test_diverged_and_not_reached_seeds_are_told(results):
    def edit(record):
        record.runs[2] = make_run(2, 77, "not reached")
        record.runs[5] = make_run(5, 13, "diverged")

    change(results, "2b_mlp_forward", edit)
    text = text_of(results)
    assert "| 8 reached | 6 reached, 1 not reached, 1 diverged |" in text
    assert "[33, never]" in section(text, "mlp")
    assert "seed 2 had a training loss of 0.3000 after 77 iterations and never reached the threshold" in text
    assert "seed 5 diverged: after 13 iterations its training loss was no longer finite" in text
    assert "2 of 8 seeds never reached the threshold" in section(text, "models")
    assert "over the 6 seeds that reached the threshold with both" in section(text, "mlp")
    assert "nan" not in text.replace("forward_gradient", "")


def test_a_method_that_never_arrives_is_no_error(results, tmp_path):
    def edit(record):
        record.runs = [make_run(s, 5, "diverged") for s in range(8)]

    change(results, "1b_logistic_forward", edit)
    content = json.loads((results / "timings.json").read_text())
    content["tasks"]["logistic"]["methods"]["forward gradient"]["status"] = ["diverged"] * 8
    write_json(results / "timings.json", content)
    text = text_of(results)
    assert "the whole training does not arrive" in section(text, "models")
    assert "the training does not arrive for the logistic regression" in section(text, "answer")
    assert "| 33.5 [30, 37] | never |" in section(text, "logistic")
    assert "not finite" in section(text, "logistic")
    render.render(page_context.load(results), tmp_path)


def test_substitute_data_is_announced_on_the_first_page(results, tmp_path):
    for name in ("3a_cnn_backprop", "3b_cnn_forward"):
        change(results, name, lambda r: r.source.update(name="digits", substitute_for="KMNIST", origin="scikit-learn"))
    render.render(page_context.load(results), tmp_path)
    page = Page(tmp_path / "report.html")
    notice = page.source.index("Substitute data.")
    assert page.source.index("<h1>") < notice < page.source.index('<h2 id="answer"')
    assert "KMNIST was not at hand when this report was made; digits (scikit-learn) stood in for it" in page.text
    assert any(attributes.get("role") == "note" for attributes in page.all("div"))
    assert "a substitute for KMNIST" in section(text_of(results), "cnn")
    assert "KMNIST is by" not in page.text


def test_real_data_are_not_announced(page):
    assert "Substitute" not in page.text
    assert "Quick mode" not in page.text


def test_quick_mode_is_announced(results):
    for task in page_context.TASKS.values():
        for name in (task.backprop, task.forward):
            change(results, name, lambda record: setattr(record, "quick", True))
    assert text_of(results).index("Quick mode.") < text_of(results).index("{#answer}")


def test_times_that_cannot_be_are_announced(results):
    assert "Disturbed" not in text_of(results)
    content = json.loads((results / "timings.json").read_text())
    content["tasks"]["mlp"]["plain_seconds"] = [0.032] * 3  # of an evaluation, while an iteration takes 1 to 3 ms
    write_json(results / "timings.json", content)
    text = text_of(results)
    assert text.index("Disturbed times.") < text.index("{#answer}")
    assert "for the multilayer perceptron, a whole iteration" in text


def test_too_few_seeds_have_no_interval(results):
    for name in ("2a_mlp_backprop", "2b_mlp_forward"):
        change(results, name, lambda record: setattr(record, "runs", record.runs[:3]))
    text = section(text_of(results), "mlp")
    assert "| number of iterations | 31 | 34 |" in text
    assert "so few seeds cannot tell apart" in text


# --- the pages -------------------------------------------------------------------------------------------------------


def test_two_renders_are_the_same_bytes(saved, output, tmp_path):
    render.render(page_context.load(saved), tmp_path)
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [file.name for file in files if (output / file).read_bytes() != (tmp_path / file).read_bytes()] == []
    assert len([file for file in files if file.suffix == ".svg"]) == 12


def test_html_loads_nothing(page):
    fetched = [a["src"] for a in page.all("img")] + [a["href"] for a in page.all("link")]
    assert len(fetched) >= 12
    assert [url[:40] for url in fetched if not url.startswith("data:")] == []
    assert page.all("iframe", "object", "embed", "base") == []
    assert page.all("script") == [{}]  # page.js, written into the page
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'; img-src data:;" in policies[0]  # so the browser sees to it, too
    style = re.search(r"<style.*?</style>", page.source, re.DOTALL)[0]
    assert not re.search(r"@import|url\((?!data:)", style)


def test_html_is_well_formed_for_readers(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert "<title>Training without backpropagation</title>" in page.source
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    images = page.all("img")
    assert len(images) == 12
    assert all(len(a.get("alt", "")) > 30 for a in images)
    assert len({a["alt"] for a in images}) == len(images)
    assert page.all("math")


def test_links_within_the_page_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    targets = {a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")}
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)
    assert {"answer", "method", "logistic", "mlp", "cnn", "limits", "reproduce", "environment"} <= targets


def test_figures_can_be_linked_to(page):
    names = {a["id"].removeprefix("fig-") for a in page.all("figure")}
    drawn = {"summary-iterations", "summary-step", "summary-total"}
    drawn |= {f"{t}-{q}" for t in page_context.TASKS for q in ("test-loss", "test-accuracy", "misclassifications")}
    assert names == drawn


def test_every_row_of_a_table_has_a_heading(page):
    tables = re.findall(r"<tbody>.*?</tbody>", page.source, re.DOTALL)
    assert len(tables) >= 6
    for table in tables:
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert all(re.match(r"<tr[^>]*>\s*<th[^>]*>(?!</th>)", row) for row in rows), table[:300]
        assert all(row.count("<th") == 1 for row in rows)


def test_intervals_are_not_broken(page):
    assert "33.5 [30,\N{NO-BREAK SPACE}37]" in page.source
    assert not re.search(r"\[[\d.,]+, [\d.,]+\]", re.sub(r"<script.*?</script>", "", page.source, flags=re.DOTALL))


def test_links_to_notebooks_exist(page):
    links = {a["href"] for a in page.all("a") if a.get("href", "").startswith("site/")} - {"site/index.html"}
    assert {Path(link).stem for link in links} == {
        getattr(t, m) for t in page_context.TASKS.values() for m in page_context.METHODS
    }
    assert {Path(link).stem for link in links} <= {path.stem for path in (ROOT / "notebooks").rglob("*.ipynb")}
    assert not any(a.get("href", "").endswith(".ipynb") for a in page.all("a"))


def test_every_work_that_is_cited_is_listed(page):
    assert "???" not in page.source
    assert {"ref-baydin2022", "ref-predecessors2023", "ref-clanuwat2018", "ref-gorman2014"} <= {
        attributes.get("id") for attributes in page.all("div")
    }


def luminance(color: str) -> float:
    """Return the relative luminance of ``#rrggbb``, as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark():
    css = (ROOT / "report" / "report.css").read_text()
    light, dark, *_ = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{.*?\}", css, re.DOTALL)
    ]
    assert set(light) == set(dark)
    assert light != dark
    for scheme in (light, dark):
        pairs = [(text, back) for text in ("ink", "soft", "link") for back in ("page", "code")]
        pairs += [(text, "code") for text in ("keyword", "string", "number", "name", "comment")]
        for text, back in [*pairs, ("ink", "alarm-back")]:
            low, high = sorted((luminance(scheme[text]), luminance(scheme[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back, scheme[text], scheme[back])


def test_pdf_has_vector_figures(output):
    pdf = (output / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype/Image" not in pdf.replace(b" ", b"")
    assert b"CreationDate" not in pdf


# --- whole or not at all ---------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)])
def test_a_render_that_is_cut_short_changes_nothing(results, monkeypatch, capsys, error, code):
    for name in ("report.html", "report.pdf"):
        (results.parent / name).write_text("old")
    before = snapshot(results.parent)

    def stop(text, folder):
        raise error

    monkeypatch.setattr(render, "to_pdf", stop)
    assert program.main(["--only-render", "--output", str(results.parent)]) == code
    assert snapshot(results.parent) == before
    said = capsys.readouterr().err
    assert ("stopped" in said) if code == 130 else ("No space left" in said and "from an earlier build" in said)


def test_what_a_killed_render_leaves_is_removed(results):
    script = (
        "import sys, time; from pathlib import Path; from report import claims, render\n"
        "render.figures.draw = lambda *a: (print('here', flush=True), time.sleep(60))\n"
        "folder = Path(sys.argv[1]); render.render(page_context.load(folder / 'results'), folder)"
    )
    command = [sys.executable, "-c", script, str(results.parent)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert list(results.parent.glob(".rendering-*"))
    assert not (results.parent / "report.html").exists()
    assert program.main(["--only-render", "--output", str(results.parent)]) == 0
    assert not list(results.parent.glob(".rendering-*"))
    assert (results.parent / "report.html").is_file()


def write_notebook(folder: Path, name: str, source: str) -> None:
    cells = [nbformat.v4.new_code_cell("steps = 1", metadata={"tags": ["parameters"]})]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells += [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


def test_a_failing_notebook_stops_the_report(results, monkeypatch, capsys):
    write_notebook(results.parent, "broken", "raise ValueError('no such luck')")
    (results.parent / "plan.toml").write_text("[notebooks.broken]\n[timings]\nlogistic = 1\n")
    monkeypatch.setattr(program, "NOTEBOOKS", results.parent)
    monkeypatch.setattr(program, "PLAN", results.parent / "plan.toml")
    monkeypatch.setattr(program.Build, "_load_data", lambda self: "data")
    (results.parent / "report.html").write_text("old")
    assert program.main(["--output", str(results.parent), "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert "broken.ipynb, cell 2: ValueError: no such luck" in said
    copy = Path(re.search(r"executed copy: (.*)", said)[1])
    assert "no such luck" in copy.read_text()
    assert "No report was made" in said
    assert (results.parent / "report.html").read_text() == "old"
    assert not (results.parent / "report.pdf").exists()
    assert not (results.parent / "figures").exists()


@pytest.mark.parametrize("damage", ["missing", "not json", "no timings", "another seed", "another split"])
def test_unusable_results_are_named(results, capsys, damage):
    if damage == "missing":
        (results / "2a_mlp_backprop.json").unlink()
    elif damage == "not json":
        (results / "2a_mlp_backprop.json").write_text("{")
    elif damage == "no timings":
        (results / "timings.json").unlink()
    elif damage == "another seed":
        change(results, "2a_mlp_backprop", lambda record: record.runs.pop())
    else:
        change(results, "2a_mlp_backprop", lambda record: record.source.update(fingerprint="other"))
    assert program.main(["--only-render", "--output", str(results.parent)]) == 1
    said = capsys.readouterr().err
    assert ("timings.json" if damage == "no timings" else "2a_mlp_backprop") in said
    assert not (results.parent / "report.html").exists()


# --- the timing pass -------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(results, monkeypatch):
    """Return the calls of a stand-in for the measurement, which takes its numbers from the saved ones."""
    from report.studies import timings

    saved, calls = json.loads((results / "timings.json").read_text()), []
    (results / "timings.json").unlink()

    def measure(tasks, **options):
        calls.append(list(tasks))
        return {"environment": saved["environment"], "tasks": {key: saved["tasks"][key] for key in tasks}}

    monkeypatch.setattr(timings, "measure", measure)
    return calls


PAIRS = dict.fromkeys(page_context.TASKS, 2)


def test_times_are_taken_once(results, measured):
    build = program.Build(output=results.parent)
    build._take_times(PAIRS, "data")
    assert measured == [["logistic"], ["mlp"], ["cnn"]]
    page_context.load(results)  # complete
    build._take_times(PAIRS, "data")
    assert len(measured) == 3
    program.Build(output=results.parent, resume=False)._take_times(PAIRS, "data")
    assert len(measured) == 6


@pytest.mark.parametrize("what", ["data", "pairs", "result", "stamp", "settings"])
def test_times_are_taken_again_when_something_changed(results, measured, what):
    build = program.Build(output=results.parent)
    build._take_times(PAIRS, "data")
    if what == "result":
        (results / "timings.json").write_text("{}")
    elif what == "stamp":
        (results.parent / "executed" / "timings.json").write_text("{")
    elif what == "settings":
        change(results, "1b_logistic_forward", lambda record: record.parameters.update(learning_rate=0.1))
    build._take_times(PAIRS | {"cnn": 3 if what == "pairs" else 2}, "other" if what == "data" else "data")
    assert len(measured) == 6


def test_an_interrupted_timing_pass_leaves_no_stamp(results, measured, monkeypatch):
    from report.studies import timings

    build = program.Build(output=results.parent)

    def stop(tasks, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(timings, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        build._take_times(PAIRS, "data")
    assert not (results / "timings.json").exists()
    assert not (results.parent / "executed" / "timings.json").exists()


# --- a whole build ---------------------------------------------------------------------------------------------------


def test_a_build_and_another_that_reuses_it(saved, measured, tmp_path, monkeypatch, capsys):
    names = [getattr(task, method) for task in page_context.TASKS.values() for method in page_context.METHODS]
    for name in names:  # each "trains" by copying its saved record
        copy_it = f"import os, shutil\nshutil.copy({str(saved / name)!r} + '.json', os.environ['FWDLIB_RESULTS'])"
        write_notebook(tmp_path, name, copy_it)
    monkeypatch.setattr(program, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(program.Build, "_load_data", lambda self: "data")
    built = tmp_path / "built"
    assert program.main(["--output", str(built)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(built / "report.html"), str(built / "report.pdf")]
    assert re.search(r"report +\d+ s in all", said.err)
    assert {path.name for path in built.iterdir()} == {"executed", "figures", "results", *render.PAGES}
    assert len(measured) == 3
    before = snapshot(built)
    assert program.main(["--output", str(built)]) == 0
    assert snapshot(built) == before
    assert len(measured) == 3
    assert capsys.readouterr().err.count("reused") == 7


def test_the_plan_names_the_six_notebooks():
    plan = program.tomllib.loads(program.PLAN.read_text())
    names = {getattr(task, method) for task in page_context.TASKS.values() for method in page_context.METHODS}
    assert set(plan["notebooks"]) == names
    assert set(plan["timings"]) == set(page_context.TASKS)


def test_data_are_said_and_a_substitute_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FWDLIB_DATA", raising=False)
    monkeypatch.setenv("FWDLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("fwdlib.archives.answers", lambda url: False)
    start = time.monotonic()
    data = program.Build()._load_data()
    assert time.monotonic() - start < 10
    said = capsys.readouterr().err
    assert "!!! SUBSTITUTE: this is digits, not KMNIST" in said
    assert re.fullmatch(r"penguins/processed \w{16}, digits \w{16}", data)


def test_help_does_not_wait_for_torch():
    script = "import sys, report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, env=os.environ).returncode == 0


# --- wording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.9996, "10.0"), (0.0, "0.00"), (1234567.0, "1,234,567"), (0.00012345, "0.000123"), (math.nan, "never")],
)
def test_number(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.30258, "2.303"),
        (9.9e-9, "< 0.0001"),
        (0.0, "< 0.0001"),
        (-1e-6, "\N{MINUS SIGN}0.000001000"),
        (math.nan, "not finite"),
    ],
)
def test_loss(value, text):
    assert render.loss(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.0, "12.0 s"),
        (0.0004, "400 \N{MICRO SIGN}s"),
        (math.inf, "never"),
        (Interval(2, math.inf, math.inf), "never [2.00, never] s"),
    ],
)
def test_duration(value, text):
    assert wording.duration(value) == text
