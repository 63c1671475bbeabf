"""Child processes: they end with their parent, however it ends, and take their own children with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fwdlib import children
from tests.processes import runs, wait_until

pytestmark = pytest.mark.slow  # starts processes, or trains large networks

SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]
# A child that ignores what can be ignored, with a child of its own; it writes both process ids.
FAMILY = """\
import os, signal, subprocess, sys, time
from pathlib import Path
for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(sent, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
Path("part").write_text(f"{os.getpid()} {inner.pid}")
Path("part").rename("pids")
time.sleep(100)"""
PARENT = f"""\
import sys
from fwdlib import children
children.start([sys.executable, "-c", {FAMILY!r}]).wait()"""
TIDY = """\
import os, sys, time
from pathlib import Path
from fwdlib import children
def clean_up():
    time.sleep(0.3)
    Path("clean").touch()
    time.sleep(float(sys.argv[1]))
children.when_parent_ends(clean_up)
Path("ready").touch()
time.sleep(100)"""


@pytest.fixture(autouse=True)
def this_fwdlib(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(children.__file__).parents[1]), prepend=os.pathsep)


def group_of(child: children.Child) -> list[psutil.Process]:
    found = [process for process in psutil.process_iter() if runs(process.pid)]
    return [process for process in found if os.getpgid(process.pid) == child.pid]


def family_in(folder: Path) -> list[int]:
    assert wait_until((folder / "pids").exists, 20)
    pids = [int(word) for word in (folder / "pids").read_text().split()]
    assert all(map(runs, pids))
    return pids


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_parent_that_ends_takes_child_and_grandchild_with_it(tmp_path, sent):
    options = {"stderr": subprocess.DEVNULL, "start_new_session": True}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, **options)
    pids = family_in(tmp_path)
    parent.send_signal(sent)
    parent.wait()
    assert wait_until(lambda: not any(map(runs, pids)), 2)


def test_a_program_that_somebody_else_starts_can_end_with_its_parent(tmp_path):
    child = "import os, time; from pathlib import Path; from fwdlib import children; children.end_with_parent()\n"
    child += "Path('part').write_text(str(os.getpid())); Path('part').rename('pids'); time.sleep(100)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    (pid,) = family_in(tmp_path)
    time.sleep(1)
    assert runs(pid)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not runs(pid), 2)


def test_end_takes_child_and_grandchild(tmp_path):
    child = children.start([sys.executable, "-c", FAMILY], folder=tmp_path)
    pids = family_in(tmp_path)
    children.end(child)
    assert child.returncode == -signal.SIGKILL
    assert wait_until(lambda: not group_of(child), 1)
    assert not any(map(runs, pids))
    children.end(child)  # again: nothing to do


def test_what_a_program_leaves_behind_ends_with_it():
    child = children.start(["sh", "-c", "sleep 100 & exit 3"])
    assert child.wait() == 3
    assert [process.name() for process in group_of(child) if process.name() == "sleep"] == ["sleep"]
    children.end(child)
    assert child.returncode == 3
    assert wait_until(lambda: not group_of(child), 1)


def test_a_child_is_the_program_itself_in_a_session_of_its_own():
    child = children.start(SLEEP)
    try:
        assert wait_until(lambda: psutil.Process(child.pid).cmdline() == SLEEP, 2)
        assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    finally:
        children.end(child)


@pytest.mark.parametrize(("more", "code"), [("0", 1), ("100", -signal.SIGKILL)])
def test_a_child_has_its_grace_to_clean_up_and_no_more(tmp_path, more, code):
    child = children.start([sys.executable, "-c", TIDY, more], folder=tmp_path, grace=2, stderr=subprocess.DEVNULL)
    assert wait_until((tmp_path / "ready").exists, 20)
    begun = time.monotonic()
    children.end(child)
    assert time.monotonic() - begun < 4
    assert (tmp_path / "clean").exists()
    assert child.returncode == code
    assert wait_until(lambda: not group_of(child), 1)


def test_a_child_that_is_let_go_without_a_word_ends_after_its_grace(tmp_path):
    child = children.start(SLEEP, grace=0.5)
    child.let_go()
    begun = time.monotonic()
    assert child.wait(10) == -signal.SIGKILL
    assert time.monotonic() - begun > 0.3


def test_run_returns_code_and_text_with_environment_and_folder(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['NAME']); print('no', file=sys.stderr); sys.exit(3)"
    ended = children.run([sys.executable, "-c", code], environment={"NAME": "x y"}, folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, f"{tmp_path} x y\n", "no\n")
    both = children.run(["sh", "-c", "echo a; echo b >&2"], stderr=subprocess.STDOUT)
    assert (both.stdout, both.stderr) == ("a\nb\n", None)


def test_run_ends_what_takes_too_long():
    with pytest.raises(subprocess.TimeoutExpired):
        children.run(["sh", "-c", "sleep 100 & wait"], timeout=0.2)
    assert not [process for process in psutil.Process().children(recursive=True) if process.name() == "sleep"]


def test_words_reach_the_program_as_they_are():
    words = ["a b", "$HOME", "'", '"', "*", "", "-x", "3>&1"]
    ended = children.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words])
    assert ended.stdout == f"{words}\n"
