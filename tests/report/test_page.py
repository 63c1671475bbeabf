"""The page, made from small made-up records: it says what the records say, and readers and browsers can use it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from fwdlib.results import write_json
from fwdlib.statistics import Interval
from report import wording
from report.page import context, render
from tests.report.pages import Page
from tests.report.records import MODELS, change, contents, draw, make_run, section, text_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(saved, tmp_path_factory) -> Path:
    return draw(saved, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def page(output) -> Page:
    return Page(output / "report.html")


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_the_models_are_described_as_they_are():
    for key, task in context.TASKS.items():
        assert task.num_tensors == len(list(MODELS[key]().parameters()))
        assert task.description == MODELS[key].__doc__.partition("\n")[0].rstrip(".").replace("->", "→")


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
    task = context.build_context(context.load_results(saved))["tasks"]["logistic"]
    assert task["ratios"]["step"] == pytest.approx((3, 3, 3))
    ratios = sorted((33 + s) / (30 + s) for s in range(8))
    assert task["ratios"]["iterations"] == pytest.approx((ratios[0], (ratios[3] + ratios[4]) / 2, ratios[-1]))
    assert task["speedup"] == pytest.approx(0.6 / 3.105e-3)
    assert "takes 3.00 times as long" in section(text_of(saved), "models")


@pytest.mark.parametrize("name", [name for task in context.TASKS.values() for name in (task.backprop, task.forward)])
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
    intervals = {"less": (0.5, 0.6, 0.9), "same": (0.9, 1, 1.1), "more": (1.1, 2, math.inf)}
    assert all(context.relation(Interval(*interval)) == relation for relation, interval in intervals.items())


def test_a_pair_with_a_seed_that_never_finished_is_not_left_out():
    inf = math.inf
    assert context.paired_ratio([2, 2, inf], [1, 1, 1]) == pytest.approx((math.nan, 2, math.nan), nan_ok=True)
    assert context.paired_ratio([inf, inf, 4], [1, 1, 1]).estimate == inf
    assert context.paired_ratio([3], [inf]).estimate == 0
    assert context.paired_ratio([inf, 6], [inf, 2]).estimate == 3
    assert math.isnan(context.paired_ratio([inf], [inf]).estimate)


def test_published_conclusion_is_judged_by_the_results(results):
    assert "**At the published settings: no.**" in section(text_of(results), "answer")
    content = json.loads((results / "timings.json").read_text())
    methods = content["tasks"]["logistic"]["methods"]
    methods["backprop"], methods["forward gradient"] = methods["forward gradient"], methods["backprop"]
    write_json(results / "timings.json", content)
    text = text_of(results)
    assert "**At the published settings: yes.**" in section(text, "answer")
    assert re.search(r"time of the training \| 0\.351 \| 0\.3.* points the same way", section(text, "published"))


# --- seeds that never finished, substitutes, quick mode -------------------------------------------------------------


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


def test_a_method_that_never_converges_is_no_error(results, tmp_path):
    def edit(record):
        record.runs = [make_run(s, 5, "diverged") for s in range(8)]

    change(results, "1b_logistic_forward", edit)
    content = json.loads((results / "timings.json").read_text())
    content["tasks"]["logistic"]["methods"]["forward gradient"]["status"] = ["diverged"] * 8
    write_json(results / "timings.json", content)
    text = text_of(results)
    assert "the whole training does not converge" in section(text, "models")
    assert "the training does not converge for the logistic regression" in section(text, "answer")
    assert "| 33.5 [30, 37] | never |" in section(text, "logistic")
    assert "not finite" in section(text, "logistic")
    assert (draw(results, tmp_path / "page") / "report.html").is_file()


def test_substitute_data_is_announced_on_the_first_page(results, tmp_path):
    for name in ("3a_cnn_backprop", "3b_cnn_forward"):
        change(results, name, lambda r: r.source.update(name="digits", substitute_for="KMNIST", origin="scikit-learn"))
    page = Page(draw(results, tmp_path / "page") / "report.html")
    notice = page.source.index("Substitute data.")
    assert page.source.index("<h1>") < notice < page.source.index('<h2 id="answer"')
    assert "KMNIST was not available when this report was made, so digits (scikit-learn) was used" in page.text
    assert any(attributes.get("role") == "note" for attributes in page.all("div"))
    assert "a substitute for KMNIST" in section(text_of(results), "cnn")
    assert "KMNIST is by" not in page.text


def test_real_data_are_not_announced(page):
    assert "Substitute" not in page.text
    assert "Quick mode" not in page.text


def test_quick_mode_is_announced(results):
    for task in context.TASKS.values():
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
    assert "so few seeds cannot distinguish" in text


# --- the pages -------------------------------------------------------------------------------------------------------


def test_two_renders_are_the_same_bytes(saved, output):
    first = contents(output)
    assert contents(draw(saved, output)) == first
    assert len([name for name in first if name.endswith(".svg")]) == 12


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
    targets = {a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")}
    assert len(page.ids) == len(set(page.ids))
    assert targets <= set(page.ids)
    assert {"answer", "method", "logistic", "mlp", "cnn", "limits", "reproduce", "environment"} <= targets


def test_figures_can_be_linked_to(page):
    names = {a["id"].removeprefix("fig-") for a in page.all("figure")}
    drawn = {"summary-iterations", "summary-step", "summary-total"}
    drawn |= {f"{t}-{q}" for t in context.TASKS for q in ("test-loss", "test-accuracy", "misclassifications")}
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


def test_links_to_notebooks_exist(page, output):
    links = [a["href"] for a in page.all("a") if a.get("href", "").endswith(".ipynb")]
    assert {Path(link).stem for link in links} == {
        getattr(t, m) for t in context.TASKS.values() for m in context.METHODS
    }
    assert all((output / link).is_file() for link in links)


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
    css = (ROOT / "report" / "page" / "report.css").read_text()
    light, dark, *_ = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{.*?\}", css, re.DOTALL)
    ]
    assert set(light) == set(dark)
    assert light != dark
    for scheme in (light, dark):
        pairs = [(text, back) for text in ("ink", "soft", "link") for back in ("page", "code")]
        for text, back in [*pairs, ("ink", "alarm-back")]:
            low, high = sorted((luminance(scheme[text]), luminance(scheme[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back, scheme[text], scheme[back])


def test_pdf_has_vector_figures(output):
    pdf = (output / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype/Image" not in pdf.replace(b" ", b"")
    assert b"CreationDate" not in pdf


# --- wording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        (wording.number, 9.9996, "10.0"),
        (wording.number, 0.0, "0.00"),
        (wording.number, 1234567.0, "1,234,567"),
        (wording.number, 0.00012345, "0.000123"),
        (render.loss, 2.30258, "2.303"),
        (render.loss, 9.9e-9, "< 0.0001"),
        (render.loss, -1e-6, "-0.000001000"),
        (render.loss, math.nan, "not finite"),
        (wording.duration, 12.0, "12.0 s"),
        (wording.duration, 0.0004, "400 \N{MICRO SIGN}s"),
        (wording.duration, math.inf, "never"),
        (wording.scientific, 433.0, "433"),
        (wording.scientific, -40106.2, "-40,106"),
        (wording.scientific, 2e9, "2.00 \N{MULTIPLICATION SIGN} 10^9^"),
    ],
)
def test_numbers_as_text(word, value, text):  # the docstrings have more
    assert word(value).replace("\N{MINUS SIGN}", "-") == text
