"""No number of the report is typed by hand: the templates have none, and another result makes another page."""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from report.page import render
from report.page.context import build_context, load_results

REPORT = Path(__file__).parents[2] / "report"
RESULTS = REPORT / "results"

# Numbers that are no results: how sure an interval is, the 1 that a ratio is compared with, settings, closed forms.
ALLOWED = """
95 %; FG-RANK1; below 10^-16^; contain 1; below 1; left of 1; Above 1; K = 1; (1 + K)/2; of width 1024; batch 64;
2022, figure 6; l1; l2; l∞; float64; float32; radius 1; -1 means; 0 means; about 10 %; Rosenbrock's 100; 100 steps;
5 standard; zero at 0.5; backprop: 2/; powers of √2; below 1.461; Between -4 and 4; 10^-16^; 1, 2, 4 and 16;
n = 1,024; 16 tangents; 64 numbers; n = 4; (-1, 1, …, 1); below 4; 784-800-800-10; K = 16
"""

SETTINGS = {"settings", "parameters", "environment", "source", "learning_rate", "lr", "b_lr", "rates", "threshold"}

SHOWN = {  # a result, and the sections that show it
    "timings.json": {"answer", "models", "logistic", "mlp", "cnn", "published", "claims"},
    "1b_logistic_forward.json": {"models", "logistic", "published"},
    "2a_mlp_backprop.json": {"models", "mlp", "published"},
    "3b_cnn_forward.json": {"models", "cnn"},
    "bench-cpu.json": {"answer", "cost", "claims"},
    "bench-cpu-1-thread.json": {"cost"},
    "descent.json": {"cost", "scaling"},
    "scaling.json": {"scaling"},
    "budget.json": {"claims", "cost"},
    "traffic.json": {"traffic"},
    "functions.json": {"functions", "claims"},
    "sensitivity.json": {"answer", "sensitivity", "claims"},
    "tangents.json": {"tangents"},
    "frank_wolfe.json": {"frank-wolfe", "claims"},
    "scratch.json": {"scratch", "claims"},
    "protocols/logistic.json": {"answer", "protocols", "claims"},
    "protocols/mlp.json": {"answer", "protocols", "claims"},
    "protocols/steps.json": {"answer", "protocols", "claims"},
    "feedback/steps.json": {"answer", "feedback"},
    "feedback/MNIST-2x800-FDFA.json": {"answer", "feedback", "claims"},
}


def prose(template: str) -> str:
    """Return what a template prints whatever the results are."""
    for pattern in (
        r"<#.*?#>|\{%.*?%\}|\{\{.*?\}\}",  # of jinja
        r"\$\$?.*?\$\$?|```.*?```|`.*?`",  # formulas, code
        r"\(figures/[^)]*\)|(?<!!)\[[^\[\]]*\]\([^)]*\)|\{#[^}]*\}|\{\.[^}]*\}|\[-?@[^\]]*\]|@\w+|width=\d+%",
    ):
        template = re.sub(pattern, " ", template, flags=re.DOTALL)
    return template


def shaken(value: Any, draw: random.Random, key: str = "") -> Any:
    """Return a result with every measured number a little different."""
    if isinstance(value, dict):
        return {k: v if k in SETTINGS else shaken(v, draw, k) for k, v in value.items()}
    if isinstance(value, list):
        return [shaken(v, draw, key) for v in value]
    if isinstance(value, float):
        return value * draw.uniform(0.8, 1.2)
    if key in ("test_errors", "iterations") and isinstance(value, int):
        return round(value * draw.uniform(0.8, 1.2)) + 1
    return value


def sections(results: Path) -> dict[str, str]:
    """Return the text of the report by the names of its headings."""
    text = render.markdown(build_context(load_results(results)))
    pieces = re.split(r"^##+ .*\{#([\w-]+) ?\}$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.fixture(scope="module")
def committed():
    return sections(RESULTS)


@pytest.mark.parametrize("template", sorted(REPORT.glob("*/*.md.j2")), ids=lambda path: path.name)
def test_templates_have_no_numbers_of_their_own(template):
    text = re.sub(r"\s+", " ", prose(template.read_text("utf-8"))).replace("\N{MINUS SIGN}", "-")
    for phrase in sorted(ALLOWED.replace("\n", " ").split(";"), key=len, reverse=True):
        text = text.replace(phrase.strip(), " ")
    assert [text[max(0, m.start() - 40) : m.end() + 20] for m in re.finditer(r"\d[\d.,]*", text)] == []


@pytest.mark.parametrize("name", SHOWN)
def test_another_result_changes_every_section_that_shows_it(name, committed, tmp_path):
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / name).read_text("utf-8"))
    (tmp_path / name).write_text(json.dumps(shaken(content, random.Random(0))), "utf-8")
    changed = {key for key, text in sections(tmp_path).items() if committed.get(key) != text}
    assert SHOWN[name] <= changed
    assert changed <= SHOWN[name] | {"claims", "answer", "choice"}, "shown somewhere else"


def test_claims_have_no_published_numbers_of_their_own():
    # A published number comes from published.toml. What is left are bounds of rules, and names of cases and settings.
    tree = ast.parse((REPORT / "sections" / "claims.py").read_text("utf-8"))
    known = {"K = 1", "K = 16", "2 x 800", "step of 0.01", "below 20", "1024", "-1/n", "1/", "10 classes"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"\[@\w+\]|figure \d|section \d", "", node.value)
            for phrase in sorted(known, key=len, reverse=True):
                text = text.replace(phrase, "")
            assert not re.search(r"\d", text), node.value


def test_every_result_is_shown_somewhere():
    def kind(name: str) -> str:
        return re.sub(r"(\d[ab]_\w+|\w*(MNIST|CIFAR10-jpeg)-.*|cnn|logistic|mlp)\.json", "*", name)

    files = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json")}
    assert set(map(kind, files)) <= set(map(kind, SHOWN))
