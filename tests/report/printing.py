"""What a section's template prints, without the rest of the page."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jinja2

from report import wording
from report.page import render

WORDS = ("number", "count", "interval", "duration", "megabytes", "enumerated")


def text_of(section: ModuleType, found: Any) -> str:
    """Return the text of a section, with ASCII signs.

    Args:
        section: module of ``report.sections``, beside its template.
        found: as its ``load`` returns it.
    """
    comments = {"comment_start_string": "<#", "comment_end_string": "#>"}
    loader = jinja2.FileSystemLoader(render.HERE.parent / "sections")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **comments)
    filters = {word: getattr(wording, word) for word in WORDS} | {"loss": render.loss, "machine": render.machine}
    environment.filters |= filters
    environment.globals |= filters
    name = section.__name__.rpartition(".")[2]
    text = environment.get_template(f"{name}.md.j2").render({name: section.context(found)})
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{MULTIPLICATION SIGN}", "x")
