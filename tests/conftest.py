"""Shared fixtures. Tests run single-threaded and offline: no test waits for a network that may not be there."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "agg")
