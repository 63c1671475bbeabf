"""The folder of a build: what builds have not written is never touched, and one build at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fwdlib.locks import LOCK, InUseError
from report.output import HIDDEN, MANIFEST, OutputError, hold
from tests.report.records import contents

ROOT = Path(__file__).parents[2]


def build(folder: Path, files: dict[str, str]) -> None:
    with hold(folder) as output:
        for name, text in files.items():
            (output.scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (output.scratch / name).write_text(text)
        output.place()


def texts(folder: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in contents(folder).items() if name != MANIFEST}


def listed(folder: Path) -> list[str]:
    return json.loads((folder / MANIFEST).read_text())


def test_a_new_build_replaces_its_files_and_removes_those_it_no_longer_makes(tmp_path):
    build(tmp_path, {"page": "1", "figures/a": "1", "figures/b": "1", "results/r": "1"})
    build(tmp_path, {"page": "2", "figures/a": "2", "figures/c": "2"})
    assert texts(tmp_path) == {"page": "2", "figures/a": "2", "figures/c": "2", "results/r": "1"}
    assert listed(tmp_path) == ["figures/a", "figures/c", "page", "results/r"]


def test_files_of_others_survive(tmp_path):
    build(tmp_path, {"page": "1", "figures/a": "1"})
    for name in ("notes.txt", "figures/mine.svg", "figures/sub/other.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    build(tmp_path, {"page": "2"})
    build(tmp_path, {"figures/b": "2"})
    others = {"notes.txt": "mine", "figures/mine.svg": "mine", "figures/sub/other.svg": "mine"}
    assert texts(tmp_path) == {"page": "2", "figures/b": "2"} | others


@pytest.mark.parametrize("name", ["page", "figures/a"])
def test_a_file_of_somebody_else_in_the_way_stops_the_build(tmp_path, name):
    build(tmp_path, {"other": "1"})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        build(tmp_path, {"page": "2", "figures/a": "2", "other": "2"})
    assert texts(tmp_path) == {"other": "1", name: "mine"}


def test_a_folder_with_files_and_no_list_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt.*name a new or an empty folder"):
        build(tmp_path, {"page": "1"})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}
    with pytest.raises(OutputError, match="is not a folder"):
        build(tmp_path / "mine.txt", {"page": "1"})


@pytest.mark.parametrize("content", ["{", '{"name": "an app"}', '["../other"]', '["/etc/passwd"]', "[1]"])
def test_a_list_of_something_else_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(OutputError, match="is not a list of the files of a build"):
        build(tmp_path, {"page": "1"})
    assert (tmp_path / MANIFEST).read_text() == content


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_all_files_are_put_in_place_or_none(tmp_path, monkeypatch, error):
    build(tmp_path, {"page": "1", "figures/a": "1", "figures/b": "1"})
    moved, replace = [], Path.replace

    def fail_at_the_third(self, target):
        if "files" in self.parts:
            moved.append(self)
            if len(moved) == 3:
                raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_third)
    with pytest.raises(type(error)):
        build(tmp_path, {"page": "2", "figures/a": "2", "figures/c": "2", "new/d": "2"})
    assert texts(tmp_path) == {"page": "1", "figures/a": "1", "figures/b": "1"}


def run(folder: Path, code: str) -> subprocess.Popen:
    """Start a process that holds the folder and runs the code; return it once it has said so."""
    script = f"import os, sys, time\nfrom pathlib import Path\nfrom report.output import hold\n{code}"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_what_a_killed_build_has_replaced_is_put_back(tmp_path):
    build(tmp_path, {"page": "1", "figures/a": "1"})
    code = (
        "with hold(Path(sys.argv[1])) as output:\n"
        "    (output.scratch / 'figures').mkdir(parents=True)\n"
        "    for name in ('page', 'figures/a'): (output.scratch / name).write_text('2')\n"
        "    replace, moved = Path.replace, []\n"
        "    def once(self, target):\n"
        "        if moved: print('here', flush=True); time.sleep(60)\n"
        "        if 'files' in self.parts: moved.append(self)\n"
        "        return replace(self, target)\n"
        "    Path.replace = once\n"
        "    output.place()\n"
    )
    process = run(tmp_path, code)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(texts(tmp_path).values()) == ["1", "2"]
    with hold(tmp_path):
        assert texts(tmp_path) == {"page": "1", "figures/a": "1"}


def test_a_second_build_is_told_who_has_the_folder(tmp_path):
    process = run(tmp_path, "with hold(Path(sys.argv[1])): print('here', flush=True); time.sleep(60)")
    try:
        with pytest.raises(InUseError, match=rf"{tmp_path} is in use by process {process.pid} "):
            build(tmp_path, {"page": "1"})
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    build(tmp_path, {"page": "1"})  # a dead process keeps nobody out
    assert texts(tmp_path) == {"page": "1"}
    assert [path.name for path in (tmp_path / HIDDEN).iterdir()] == [LOCK]
