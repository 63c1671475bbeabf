"""The course site, built once by `make site`: all that the notebooks hold, a whole reference, links that resolve.

The build takes about 20 s on two quiet cores, most of it the reference.
"""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import fwdlib
from report.site import descriptions, pages
from tests.report.pages import Page, squeezed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "report" / "site"
NOTEBOOKS = [
    *sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")),
    *sorted((ROOT / "notebooks/beyond").glob("[0-9]*.ipynb"), key=lambda path: int(path.stem.split("_")[0])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The site. A warning would have stopped the build."""
    folder = tmp_path_factory.mktemp("built")
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()  # newer than requirements.txt: nothing to install
    before = sorted(SOURCES.rglob("*.*"))
    words = [f"RUN={sys.executable}", f"VENV={folder / '.venv'}", f"SITE={folder / 'site'}"]
    run = subprocess.run(
        ["make", "--no-print-directory", "site", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == str(folder / "site" / "index.html")
    assert [path for path in sorted(SOURCES.rglob("*.*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]
    return folder / "site"


@pytest.fixture(scope="module")
def built(folder) -> dict[str, Page]:
    """Its pages by their paths."""
    return {
        path.relative_to(folder).as_posix(): Page(path)
        for path in folder.rglob("*.html")
        if "_static" not in path.parts
    }


def page_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix(".html").as_posix()


# --- the notebooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_holds_all_that_its_notebook_holds(built, path):
    made, cells = built[page_of(path)], nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    said = [cell.source for cell in code]
    said += [output.text for cell in code for output in cell.outputs if output.output_type == "stream"]
    said += [heading for cell in cells for heading in re.findall(r"^##? ([\w ,·:]+)$", cell.source, re.MULTILINE)]
    assert [text for text in said if squeezed(text) not in made.text] == []
    shown = [output.get("data", {}) for cell in code for output in cell.outputs]
    tables = sum(data.get("text/html", "").count("<table") for data in shown)
    assert made.source.count("<table") >= tables
    pictures = sum(1 if "image/png" in data else data.get("text/html", "").count("<img") for data in shown)
    assert len([image for image in made.all("img") if "logo" not in image.get("class", "")]) == pictures


def test_every_figure_is_described(built):
    for path in NOTEBOOKS:
        for image in built[page_of(path)].all("img"):
            assert len(image["alt"].split()) > 3, f"{path.stem}: {image}"
    alts = [image["alt"] for image in built["notebooks/1b_logistic_forward.html"].all("img")]
    first_line = descriptions.docstrings(ROOT / "fwdlib")["plotting.plot_seeds"].removeprefix("Draw ")
    assert any(alt.endswith(f": {first_line}") and alt.startswith("Figure of the section “") for alt in alts)


def test_folded_solutions_are_text_too(built):
    source = built["notebooks/1b_logistic_forward.html"].source
    folded = re.search(r"<details>\s*<summary>\s*Solution\s*</summary>(.*?)</details>", source, re.DOTALL)[1]
    assert "highlight-python" in folded
    assert "<details>" not in folded


def test_pages_follow_the_order_of_the_course(built):
    order = ["index.html", *map(page_of, NOTEBOOKS)]
    for before, here in itertools.pairwise(order):
        previous = {link["href"] for link in built[here].all("link") if link.get("rel") == "prev"}
        assert previous == {relative(before, here)}
        following = {link["href"] for link in built[before].all("link") if link.get("rel") == "next"}
        assert following == {relative(here, before)}


def relative(page: str, seen_from: str) -> str:
    return Path(os.path.relpath(page, Path(seen_from).parent)).as_posix()


def test_the_index_has_titles_and_claims(built):
    index = built["index.html"]
    for path in NOTEBOOKS:
        first = nbformat.read(path, as_version=4).cells[0].source
        assert squeezed(first.split("\n")[0].removeprefix("# ")) in index.text
        claim = re.sub(r"[*`$\\]", "", pages.claim(first))
        assert squeezed(claim)[:40] in index.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def test_a_notebook_can_be_downloaded(built, folder):
    links = [a["href"] for a in built["notebooks/beyond/8_cost.html"].all("a") if a.get("href", "").endswith(".ipynb")]
    copies = {(folder / "notebooks/beyond" / link).resolve().read_bytes() for link in links}
    assert copies == {(ROOT / "notebooks/beyond/8_cost.ipynb").read_bytes()}


# --- the reference ---------------------------------------------------------------------------------------------------


def test_every_module_is_on_one_page_of_the_reference(built):
    found = [module.name for module in pkgutil.walk_packages(fwdlib.__path__, "fwdlib.")]
    modules = {name for name in found if not any(part.startswith("_") for part in name.split("."))}
    for name in modules:
        where = [page for page, made in built.items() if f"module-{name}" in made.ids]
        assert len(where) == 1, f"{name}: {where}"


def test_every_public_name_is_in_the_index_of_the_reference(built, folder):
    links = {
        a["href"].partition("#")[2]: a["href"] for a in built["api/index.html"].all("a") if "#" in a.get("href", "")
    }
    for name in fwdlib.__all__:
        value = getattr(fwdlib, name)
        target = f"{value.__module__}.{value.__qualname__}"
        assert target in links, name
        assert target in built[(Path("api") / links[target].partition("#")[0]).as_posix()].ids


def test_formulas_of_docstrings_are_formulas(built):
    core = built["api/core.html"].source
    assert r"\frac{1}{K} \sum_{k=1}^{K} (\nabla f(\theta) \cdot v_k)\, v_k" in core
    assert core.count('class="math notranslate nohighlight"') > 5


def test_a_norm_stays_a_norm(built):
    assert "|grad f|^2" in built["api/core.html"].text


def test_a_link_to_the_report_begins_at_its_own_bracket():
    source = '"source": [\n "see [our report](../report/report.html#cost), [1b](1b.ipynb)"\n]'
    found = [match.group(1) for match in pages.REPORT_LINK.finditer(source)]
    assert found == ["our report"]


# --- all pages -------------------------------------------------------------------------------------------------------


def test_links_resolve(built, folder):
    broken = []
    for name, made in built.items():
        for link in [a["href"] for a in made.all("a") if "href" in a]:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                assert parts.scheme in {"", "http", "https", "mailto", "tcp", "tls"}, f"{link} in {name}"
                continue
            target = (folder / name).parent / unquote(parts.path) if parts.path else folder / name
            key = Path(target).resolve().relative_to(folder.resolve()).as_posix()
            if not target.is_file() or (
                key in built and parts.fragment and unquote(parts.fragment) not in built[key].ids
            ):
                broken.append(f"{link} in {name}")
    assert broken == []


def test_nothing_is_loaded_from_a_network(built, folder):
    for name, made in built.items():
        loaded = [a.get("src", "") for a in made.all("script", "img", "iframe", "source", "embed")]
        loaded += [a.get("href", "") for a in made.all("link")]
        assert [url[:80] for url in loaded if urlsplit(url).scheme not in {"", "data"} or url.startswith("//")] == [], (
            name
        )
    for style in folder.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import)\s*["']?(https?:|//)""", style.read_text(encoding="utf-8"))
        assert urls == [], style


def test_the_report_is_beside_the_pages(built, folder):
    links = [a["href"] for a in built["report.html"].all("a") if "href" in a]
    assert {"index.html", "report.pdf", "notebooks/1a_logistic_backprop.html"} <= set(links)
    assert not any(link.endswith(".ipynb") for link in links)
    assert (folder / "report.pdf").read_bytes() == (ROOT / "report" / "report.pdf").read_bytes()
    assert {"report.html", "report.pdf"} <= {a.get("href") for a in built["the-report.html"].all("a")}


def test_search_knows_the_text(folder):
    index = (folder / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)\s*", index, re.DOTALL)[1])
    assert {page_of(path).removesuffix(".html") for path in NOTEBOOKS} <= set(index["docnames"])
    assert "fwdlib.estimators" in index["objects"]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_functions_that_draw_are_found_without_importing_them(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "shapes.py").write_text(
        'import nowhere\n\n\ndef plot_one(x):\n    """Draw one.\n\n    More."""\n'
    )
    assert descriptions.docstrings(tmp_path) == {"shapes.plot_one": "Draw one."}


def test_a_figure_without_a_known_function_is_described_by_its_section():
    said = "Figure of the section “Late”, described in the text around it."
    assert descriptions.description("Late", None, {"plotting.plot_seeds": "Draw every seed's loss."}) == said
