"""What a record says is shown as it is: it becomes no markup, no link and no script, in HTML as in the PDF."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import pypandoc
import pytest

from report.page import render
from report.page.context import TASKS
from report.page.escaping import Markdown, code, escaped, policy
from tests.report.pages import Page, squeezed
from tests.report.records import change, draw

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onerror="alert(1)',
    "[here](javascript:alert(1))",
    "<javascript:alert(1)>",
    "![a picture](/etc/passwd){onerror=alert(1)}",
    "penguins (<urlopen error timed out>)",
    "**bold** *italic* `code` ~sub~ ^sup^ $x^2$ $$y$$",
    "`<b>`{=html} `#panic()`{=typst} #read(x)",
    "a | b \\ c\\",
    "[@baydin2022] @baydin2022 [-@x]",
    "<!-- a comment --> &lt; &#60; &amp;",
    "a\n\n# heading\n\n```{=html}\n<b>\n```\n::: x",
    "{{ names }} {% endfor %} {# x #}",
    "--- 1. 'x' \"y\"",
    "[a]: javascript:alert(1)",
]


def shown(text: str, page: str) -> bool:
    """Tell whether a page shows a text as it is, up to the form of quotes."""
    return squeezed(straight(text)) in straight(page)


def straight(text: str) -> str:
    for curly, plain in (("\N{LEFT SINGLE QUOTATION MARK}", "'"), ("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        text = text.replace(curly, plain)
    return text.replace("\N{NO-BREAK SPACE}", " ")


def assert_tame(page: Page) -> None:
    assert len(page.all("script")) == 1
    names = {name for _, attributes in page.tags for name in attributes}
    assert [name for name in names if name.removeprefix("data-").startswith("on")] == []
    assert "style" not in names
    assert [a["href"] for a in page.all("a") if a.get("href", "").startswith("javascript")] == []
    assert all(a["src"].startswith("data:") for a in page.all("img"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_becomes_text(text):
    markdown = f"| a | b |\n|:---|---:|\n| {escaped(text)} | 2 |\n\nSee {escaped(text)}.\n\n- {code(text)}\n"
    inlines = json.dumps(json.loads(pypandoc.convert_text(markdown, "json", render.MARKDOWN))["blocks"])
    kinds = set(re.findall(r'"t": "([A-Z]\w+)"', inlines)) - {"Quoted", "SingleQuote", "ColWidth"}
    assert kinds <= {"Table", "Para", "Plain", "Str", "Space", "Code", "BulletList", *kinds_of_a_table()}
    plain = pypandoc.convert_text(markdown, "html", render.MARKDOWN, extra_args=["--wrap=none"])
    found = squeezed(html.unescape(re.sub(r"<[^>]*>", "", plain)))
    assert straight(found).count(squeezed(straight(text))) == 3


def kinds_of_a_table() -> set[str]:
    empty = pypandoc.convert_text("| a | b |\n|:---|---:|\n| a | 2 |\n", "json", render.MARKDOWN)
    return set(re.findall(r'"t": "([A-Z]\w+)"', json.dumps(json.loads(empty))))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_in_an_attribute_becomes_text(text):
    page = pypandoc.convert_text(f'![x](a.svg){{alt="{escaped(text)}"}}', "html", render.MARKDOWN)
    (image,) = re.findall(r"<img([^>]*)>", page)
    assert set(re.findall(r'([\w-]+)="[^"]*"', image)) == {"src", "alt"}
    assert squeezed(html.unescape(re.search(r'alt="([^"]*)"', image)[1])) == squeezed(text)


def test_our_own_markup_stays_and_what_is_made_of_it_does_not():
    own = Markdown("*a*")
    assert escaped(own) == "*a*"
    assert escaped(own + "*b*") == escaped(f"{own}*b*") == r"\*a\*\*b\*"


def test_hostile_records_are_shown_as_they_are(results, tmp_path):
    texts = iter(HOSTILE * 3)
    source = {name: next(texts) for name in ("name", "origin", "substitute_for", "fingerprint", "licence", "citation")}
    parameters = {name: next(texts) for name in ("optimizer", "tangents", "learning_rate", "num_tangents")}
    machine = {"processor": next(texts), "system": next(texts), "versions": {"torch": next(texts), next(texts): "1"}}
    status, title = next(texts), "$\\frac{ <b>$"

    def edit(record):
        record.source.update(source)
        record.parameters.update(parameters)
        record.environment = record.environment | machine
        record.runs[0].status = status
        record.title = title

    for task in TASKS.values():
        for name in (task.backprop, task.forward):
            change(results, name, edit)
    page = Page(draw(results, tmp_path / "page") / "report.html")
    assert_tame(page)
    said = [*source.values(), *parameters.values(), *machine["versions"], *machine["versions"].values(), status]
    assert [text for text in [*said, machine["processor"]] if not shown(text, page.text)] == []
    assert (tmp_path / "page" / "report.pdf").read_bytes().startswith(b"%PDF")


def test_an_origin_that_names_an_error_is_shown(results, tmp_path):
    origin = "scikit-learn, as the download failed (<urlopen error timed out>)"
    for name in ("3a_cnn_backprop", "3b_cnn_forward"):
        change(results, name, lambda r: r.source.update(name="digits", substitute_for="KMNIST", origin=origin))
    assert f"({origin})" in Page(draw(results, tmp_path / "page") / "report.html").text


def test_hostile_results_of_a_study_are_shown_as_they_are(results, tmp_path):
    bench = json.loads((ROOT / "report" / "results" / "bench-cpu.json").read_text())
    for entry, text in zip(bench["models"].values(), HOSTILE, strict=False):
        entry["title"] = text
    (results / "bench-cpu.json").write_text(json.dumps(bench))
    for name in ("tangents.json", "frank_wolfe.json"):
        content = (ROOT / "report" / "results" / name).read_text()
        (results / name).write_text(content.replace('"processor": "', '"processor": "<b>*bold* '))
    page = Page(draw(results, tmp_path / "page") / "report.html")
    assert_tame(page)
    titles = HOSTILE[: len(bench["models"])]
    assert [text for text in titles if not shown(text, page.text)] == []
    assert page.text.count("<b>*bold* ") >= 2


# --- the page's policy -----------------------------------------------------------------------------------------------


def test_the_policy_allows_our_script_and_style_alone(saved, tmp_path):
    page = Page(draw(saved, tmp_path / "page") / "report.html")
    assert_tame(page)
    (found,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "unsafe" not in found
    assert page.source.index("Content-Security-Policy") < page.source.index("<style")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"; {tag}-src 'sha256-{digest}'" in found


def test_a_page_without_scripts_allows_none():
    assert "script-src 'none'" in policy("<style></style>")


def test_the_committed_page_has_the_policy(tmp_path):
    shutil.copy(ROOT / "report" / "report.html", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert_tame(page)
    (found,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert found == policy(page.source)
