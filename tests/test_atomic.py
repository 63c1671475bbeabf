"""Whether a file could be written: every long command tries that first. And errors of the disk name a place."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fwdlib import cli
from fwdlib.atomic import check_writable, message_of, naming, write_bytes
from fwdlib.bench import benchmark

ROOT = Path(__file__).resolve().parents[1]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("name", ["a.json", "new/deep/a.json", "old.json"])
def test_a_try_leaves_nothing_behind(name, tmp_path):
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / name)
    assert names_in(tmp_path) == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for name, reason in {"file/a.json": "Not a directory", "file/b/a.json": "Not a directory"}.items():
        with pytest.raises(OSError, match=reason) as error:
            check_writable(tmp_path / name)
        assert message_of(error.value).startswith(f"could not write {tmp_path / name}: {reason}. To go on, choose")
    with pytest.raises(OSError, match=r"could not write .*: Is a directory"):
        check_writable(tmp_path)

    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=rf"{tmp_path / 'a.json'}: No space left on device. To go on, free some space"):
        check_writable(tmp_path / "a.json")
    assert names_in(tmp_path) == ["file"]


def test_an_error_of_the_disk_names_the_folder(tmp_path):
    with pytest.raises(OSError, match=rf"could not write {tmp_path}: No space left on device"), naming(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (OSError(errno.ENOSPC, "could not write x: full"), FileNotFoundError(errno.ENOENT, "No", "y")):
        with pytest.raises(OSError, match=r"could not write x: full|y") as found, naming(tmp_path):
            raise error
        assert found.value is error


# --- the commands ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "bench": ["-m", "fwdlib", "bench", "--out", "{}/bench.json"],
    "train": ["-m", "fwdlib", "train", "--log-dir", "{}"],
    "run": ["-m", "fwdlib", "run", "--notebook", "1a", "--output", "{}"],
    "report": ["-m", "report", "--output", "{}"],
    "evidence": ["-m", "report.evidence", "{}"],
    "notebooks": ["-m", "report.notebooks", "{}/1a.ipynb"],
    "study": ["-m", "report.studies.tangents", "--folder", "{}"],
}
LONG = "raise AssertionError('it began before it had tried')"
# what would take long, replaced by something that fails
BEFORE = f"""
import runpy, sys
from unittest import mock
def begun(*args, **options): {LONG}
for name in ("bench.benchmark.run", "trainer.experiment.load", "runs.declarations.get_data", "data.load_penguins"):
    mock.patch(f"fwdlib.{{name}}", begun).start()
mock.patch("nbclient.NotebookClient.execute", begun).start()
mock.patch("fwdlib.children.start", begun).start()
mock.patch("report.studies.tangents.measure", begun).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_a_command_tries_its_output_first(name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    words = [word.format(tmp_path / "file" / "deep") for word in COMMANDS[name][1:]]
    run = subprocess.run([sys.executable, "-c", BEFORE, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert f"could not write {tmp_path / 'file' / 'deep'}" in run.stderr
    assert "Traceback" not in run.stderr
    assert names_in(tmp_path) == ["file"]


def test_the_committed_report_is_tried_before_the_notebooks_run(monkeypatch, tmp_path, capsys):
    from report import __main__ as program

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(program, "HERE", tmp_path / "file")
    monkeypatch.setattr(program.Build, "_run", lambda *_: pytest.fail("it began before it had tried"))
    assert program.main(["--publish"]) == 1
    assert f"could not write {tmp_path / 'file' / 'report.html'}" in capsys.readouterr().err


def test_bench_prints_its_table_before_it_writes(monkeypatch, tmp_path, capsys):
    def measure(**_):
        (tmp_path / "bench.json").mkdir()  # after it was tried
        return {"load": 0, "models": {}, "depth": {}}

    monkeypatch.setattr(benchmark, "run", measure)
    monkeypatch.setattr("fwdlib.bench.table.text", lambda _: "the table")
    assert cli.main(["bench", "--out", str(tmp_path / "bench.json")]) == 1
    out, err = capsys.readouterr()
    assert "the table" in out
    assert "could not write" in err


def test_what_a_process_left_that_was_killed_while_it_wrote_goes_with_the_next_writing(tmp_path):
    names = [".a[1].json.old.part", ".a[1].json.new.part", ".b.json.old.part"]
    for name in names:
        (tmp_path / name).touch()
        if "old" in name:
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    write_bytes(tmp_path / "a[1].json", b"{}")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", *names[1:]}
