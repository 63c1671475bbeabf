"""Pages as a browser would load them and as a reader is offered them."""

from __future__ import annotations

from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path


def squeezed(text: str) -> str:
    return " ".join(text.split())


class Page(HTMLParser):
    """The tags of a page, and its text."""

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

    @cached_property
    def text(self) -> str:
        return squeezed("".join(self.words))

    @cached_property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]
