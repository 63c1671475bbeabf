"""A Sphinx extension: the HTML that a notebook has put out shows tables and pictures, and can do nothing else."""

from __future__ import annotations

import re

import bleach
from bleach.css_sanitizer import CSSSanitizer
from docutils import nodes
from sphinx.application import Sphinx

TAGS = {
    *("div", "p", "br", "span", "pre", "code", "b", "i", "strong", "em", "sub", "sup", "img"),
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
}
ATTRIBUTES = {
    "*": ["class", "style"],
    "table": ["border"],
    **dict.fromkeys(("th", "td"), ("rowspan", "colspan", "valign")),
    "img": ["src", "alt"],
}
STYLES = CSSSanitizer(allowed_css_properties=["text-align"])


def clean(html: str) -> str:
    """Return the harmless part of some HTML: text, tables, and pictures that are part of it.

    Example:
        >>> clean('<table onclick="f()"><tr><td>1 < 2</td></tr></table><script>f()</script><img src="http://x/">')
        '<table><tbody><tr><td>1 &lt; 2</td></tr></tbody></table><img>'
    """
    shown = re.sub(
        r"<(style|script)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE
    )  # else a text would remain
    options = {"protocols": ["data"], "css_sanitizer": STYLES, "strip": True}
    return bleach.clean(shown, tags=TAGS, attributes=ATTRIBUTES, **options)


def clean_outputs(app: Sphinx, document: nodes.document) -> None:
    """Replace the HTML of all outputs by its harmless part."""
    for output in document.findall(lambda node: getattr(node, "get", {}.get)("nb_element") == "cell_code_output"):
        for raw in output.findall(nodes.raw):
            raw[:] = [nodes.Text(clean(raw.astext()))]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect :func:`clean_outputs` to Sphinx's build."""
    app.connect("doctree-read", clean_outputs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
