"""Shared fixtures. Tests run single-threaded and offline: no test waits for a network that may not be there."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import matplotlib.style
import pytest
import torch
from matplotlib.figure import Figure

from fwdlib import archives, data
from fwdlib.plotting import STYLE

os.environ.setdefault("MPLBACKEND", "agg")
torch.set_num_threads(1)  # not by OMP_NUM_THREADS, which the processes that some tests start would inherit


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """Neither data nor cache nor network; tests add what they need."""
    for name in ("FWDLIB_DATA", "FWDLIB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FWDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(archives, "_answered", {})
    monkeypatch.setattr(archives, "_waited", 0.0)

    def no_network(*args, **kwargs):
        raise URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def bare_account(bare_machine, monkeypatch, tmp_path):
    """A bare machine without kernels of the user's own; results go to a folder that is not there."""
    for name in ("FWDLIB_QUICK", "JUPYTER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FWDLIB_RESULTS", str(tmp_path / "new" / "results"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


@pytest.fixture
def damaged(monkeypatch, tmp_path) -> Path:
    """FWDLIB_DATA with a penguin table that is not the published one."""
    path = tmp_path / "data" / data.PENGUIN_CSV.path
    path.parent.mkdir(parents=True)
    path.write_text("species\n")
    monkeypatch.setenv("FWDLIB_DATA", str(tmp_path / "data"))
    return path


@pytest.fixture
def svg() -> Callable[[Figure], bytes]:
    """Return what turns a figure into the bytes of its SVG file."""

    def write(figure: Figure) -> bytes:
        file = io.BytesIO()
        with matplotlib.style.context(STYLE):
            figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    return write


@pytest.fixture
def drawn(svg) -> Callable[..., Figure]:
    """Return what calls a function that draws, checks it and returns the figure.

    Drawn twice, a figure has the same bytes, and the user's style is left alone.
    """

    def check(draw: Callable[..., Figure], *args, **options) -> Figure:
        before = dict(matplotlib.rcParams)
        figure = draw(*args, **options)
        assert svg(figure) == svg(draw(*args, **options))
        assert dict(matplotlib.rcParams) == before
        return figure

    return check
