"""What a section's template prints, without the rest of the page."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from report.page import render


def text_of(section: ModuleType, found: Any) -> str:
    """Return the text of a section, with ASCII signs.

    Args:
        section: module of ``report.sections``, beside its template.
        found: as its ``load`` returns it.
    """
    name = section.__name__.rpartition(".")[2]
    environment = render.environment().overlay(finalize=str)  # values as they are
    text = environment.get_template(f"sections/{name}.md.j2").render({name: section.context(found)})
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{MULTIPLICATION SIGN}", "x")
