"""The course's pages: all that the notebooks hold, links that resolve, nothing fetched, the same bytes again."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from report import site
from report.page import pandoc

ROOT = Path(__file__).resolve().parents[2]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
FIRST = """\
# 1a · The first & best

**Claim.** It goes *down*,
and $E = mc^2$.

See [1b](1b_second.ipynb) and [four](beyond/4_fourth.ipynb).

## Data
"""
TABLE = '<div><style scoped>th {color: red}</style><table border="1"><thead><tr><th></th><th>loss</th></tr></thead>'
TABLE += "<tbody><tr><th>a</th><td>0.5</td></tr></tbody></table></div>"


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.source = source
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *names: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag in names]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    @property
    def links(self) -> list[str]:
        return [attributes["href"] for attributes in self.all("a") if "href" in attributes]


def write(path: Path, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


def output(**data):
    return nbformat.v4.new_output("display_data", data={name.replace("_", "/"): value for name, value in data.items()})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A course of four: two pairs' halves, and two past them, of which one is the tenth."""
    root = tmp_path_factory.mktemp("course")
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    printed = nbformat.v4.new_output("stream", text="loss 0.25 < 1\n")
    drawing = code("%matplotlib inline\nshow(table, plotting.plot_seeds(run))\nmine(1)  # drawn, too")
    drawing.outputs = [output(text_html=TABLE), output(image_png=PNG), output(image_png=PNG)]
    calculating = code("x = 1\nprint(x)", outputs=[printed])
    solution = text(
        "<details><summary>Solution</summary>\n\nIt is $n^2$, **always**:\n\n```python\nn**2\n```\n\n</details>"
    )
    write(
        root / "notebooks/1a_first.ipynb",
        text(FIRST),
        calculating,
        text("Then.\n\n## A failure: late"),
        drawing,
        solution,
    )
    write(root / "notebooks/1b_second.ipynb", text("# 1b · The second\n\nNo claim. Back to [1a](1a_first.ipynb)."))
    write(
        root / "notebooks/beyond/4_fourth.ipynb",
        text("# 4 · The fourth\n\n**Claim.** A lot, see [1a](../1a_first.ipynb)."),
    )
    write(root / "notebooks/beyond/10_tenth.ipynb", text("# 10 · The tenth\n\n**Claim.** More."))
    return root


@pytest.fixture(scope="module")
def pages(root) -> dict[str, Page]:
    made = site.build(site.find(root), root / "report" / "site")
    return {name: Page(text) for name, text in made.items()}


def test_the_order_is_that_of_the_course(root):
    assert [path.stem for path in site.find(root)] == ["1a_first", "1b_second", "4_fourth", "10_tenth"]


def test_every_notebook_has_a_page(pages):
    names = {"index.html", "1a_first.html", "1b_second.html", "4_fourth.html", "10_tenth.html"}
    assert set(pages) == names
    for made in pages.values():
        assert made.all("html") == [{"lang": "en"}]
        assert len(made.all("h1")) == 1
        assert len(made.ids) == len(set(made.ids))


def test_a_page_holds_text_code_and_outputs(pages):
    first = pages["1a_first.html"]
    assert "<h1>1a · The first &amp; best</h1>" in first.source
    assert first.text.count("1a · The first & best") == 2  # title and heading; not a second time in the text
    assert "It goes down, and" in first.text
    assert '<annotation encoding="application/x-tex">E = mc^2</annotation>' in first.source
    assert "loss 0.25 < 1" in first.text
    assert '<span class="bu">print</span>' in first.source
    assert "<td>0.5</td>" in first.source
    assert "color: red" not in first.source


def test_folded_solutions_are_text_too(pages):
    source = pages["1a_first.html"].source
    folded = re.search(r"<details>\s*<summary>\s*Solution\s*</summary>(.*?)</details>", source, re.DOTALL)[1]
    assert "<strong>always</strong>" in folded
    assert "<math" in folded
    assert "sourceCode python" in folded


def test_headings_anywhere_in_a_cell_are_in_the_contents(pages):
    first = pages["1a_first.html"]
    assert {"#data", "#a-failure-late"} <= set(first.links)


def test_figures_are_described(pages):
    first, second = [image["alt"] for image in pages["1a_first.html"].all("img")]
    assert first == (
        "Figure of the section “A failure: late”: every seed's training loss over its iterations, "
        "marked by how it ended."
    )
    assert second == "Figure of the section “A failure: late”, described in the text around it."


def test_functions_that_draw_are_found_without_importing_them(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "shapes.py").write_text(
        'import nowhere\n\n\ndef plot_one(x):\n    """Draw one.\n\n    More."""\n'
    )
    assert site.docstrings(tmp_path) == {"shapes.plot_one": "Draw one."}


def test_links_lead_to_pages_and_files(pages, root):
    folder = root / "report" / "site"
    assert {"1b_second.html", "4_fourth.html", "../../notebooks/1a_first.ipynb"} <= set(pages["1a_first.html"].links)
    assert "1a_first.html" in pages["4_fourth.html"].links
    for name, made in pages.items():
        for link in made.links:
            parts = urlsplit(link)
            if parts.path.endswith(".html") and "report.html" not in parts.path:
                assert parts.path in pages, f"{link} in {name}"
            elif parts.path.endswith(".ipynb"):
                assert (folder / unquote(parts.path)).resolve().is_file(), f"{link} in {name}"
            elif not parts.path:
                assert parts.fragment in made.ids, f"{link} in {name}"


def test_pages_turn(pages):
    def turns(name):
        return {a["rel"]: a["href"] for a in pages[name].all("a") if a.get("rel") in ("prev", "next")}

    assert turns("1a_first.html") == {"next": "1b_second.html"}
    assert turns("1b_second.html") == {"prev": "1a_first.html", "next": "4_fourth.html"}
    assert turns("10_tenth.html") == {"prev": "4_fourth.html"}
    assert turns("index.html") == {}


def test_the_index_has_titles_claims_and_files(pages):
    index = pages["index.html"]
    for said in ("The six, in pairs", "Beyond the six", "1a · The first & best", "It goes down, and", "A lot, see 1a."):
        assert said in index.text
    assert index.text.index("The fourth") < index.text.index("The tenth")
    links = [link for link in index.links if not link.startswith("#")]
    assert links.count("../../notebooks/beyond/4_fourth.ipynb") == 1
    assert "10_tenth.html" in links
    assert "../report.html" not in links or (ROOT / "report" / "report.html").is_file()


def test_nothing_is_fetched(pages):
    for made in pages.values():
        loaded = [a["src"] for a in made.all("img")] + [a["href"] for a in made.all("link")]
        assert [url[:60] for url in loaded if not url.startswith("data:")] == []
        assert made.all("script") == [{}]
        assert made.all("iframe", "object", "embed", "base") == []


def test_the_same_notebooks_make_the_same_bytes(pages, root):
    again = site.build(site.find(root), root / "report" / "site")
    assert {name: made.source for name, made in pages.items()} == again


def test_a_page_of_a_notebook_that_is_gone_goes_too(tmp_path, monkeypatch, root, capsys):
    monkeypatch.setattr(site, "ROOT", root)
    (tmp_path / "9_gone.html").write_text("old")
    site.main(site.Options(output=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["index.html", "1a_first.html", "1b_second.html", "4_fourth.html", "10_tenth.html"]
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")


def test_the_page_s_template_escapes_the_text_of_links():
    made = pandoc.to_html("---\ntitle: T\n---\n", links=[{"href": "a&b.html", "text": "<b>"}])
    assert '<a href="a&amp;b.html">&lt;b&gt;</a>' in made


# --- the committed pages ---------------------------------------------------------------------------------------------


def test_the_committed_pages_are_those_of_the_committed_notebooks():
    folder, paths = ROOT / "report" / "site", site.find(ROOT)
    assert {path.stem for path in folder.glob("*.html")} == {path.stem for path in paths} | {"index"}
    stale = []
    for path in paths:
        made = Page((folder / f"{path.stem}.html").read_text(encoding="utf-8"))
        cells = nbformat.read(path, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        said = [cell.source for cell in code]
        said += [out.text for cell in code for out in cell.outputs if out.output_type == "stream"]
        said += [heading for cell in cells for heading in re.findall(r"^## ([\w ,]+)$", cell.source, re.MULTILINE)]
        shown = [out.get("data", {}) for cell in code for out in cell.outputs]
        pictures = sum(1 if "image/png" in data else data.get("text/html", "").count("<img") for data in shown)
        if len(made.all("img")) != pictures or not all(" ".join(text.split()) in made.text for text in said):
            stale.append(path.name)
    assert stale == [], "`make site` has not been run since these were changed"
