"""The published numbers and words that the report quotes, as ``published.toml`` has them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")


def load() -> dict[str, Any]:
    """Return them."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
