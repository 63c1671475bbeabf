"""The process of one notebook, without a kernel: when it tries again, and what it leaves."""

from __future__ import annotations

import json

import papermill
import pytest

from fwdlib.runs import notebook


@pytest.mark.parametrize(("failures", "calls"), [(0, 1), (2, 3), (9, 3)])
def test_a_kernel_that_does_not_start_is_tried_three_times(tmp_path, monkeypatch, failures, calls):
    made = []

    def execute_notebook(*_, **__):
        made.append(1)
        if len(made) <= failures:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    monkeypatch.setattr(notebook.time, "sleep", lambda _: None)
    monkeypatch.setattr(notebook.children, "when_parent_ends", lambda _: None)
    monkeypatch.setattr(notebook.tempfile, "tempdir", None)
    notebook.main(tmp_path, json.dumps({"notebook": "n.ipynb", "parameters": {}, "timeout": 1}))
    assert len(made) == calls
    message = "the notebook did not start: RuntimeError: Kernel died before replying to kernel_info"
    assert (tmp_path / "error.txt").read_text() == (message if failures > 2 else "")
