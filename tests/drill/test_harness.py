"""The drill's own rules: an item that leaves anything behind has failed, and nothing of it stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from report.site import pages
from tests.drill import __main__ as program
from tests.drill import harness
from tests.drill.harness import KINDS, Item, Skipped, Trial, Verdict
from tests.drill.items import ITEMS
from tests.processes import runs, wait_until

SLEEP = ("-c", "import time; time.sleep(100)")


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Return what tries a function as an item."""
    monkeypatch.setattr(harness, "PATIENCE", 0.5)

    def attempt(work) -> Verdict:
        verdict = harness.attempt(Item("whole", "it holds", True, work), tmp_path / "item", 3, False)
        assert not (tmp_path / "item").exists()
        return verdict

    return attempt


def test_an_item_that_leaves_nothing_is_ok(attempt):
    def clean(trial: Trial) -> str:
        (trial.folder / "results").mkdir()
        trial.end(trial.start(*SLEEP), 9)
        return f"drew {trial.moments.random():.3f}"

    expected = random.Random("3 clean").random()
    assert attempt(clean)[:2] == ("ok", f"drew {expected:.3f}")


def orphan(trial: Trial) -> str:
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, *{SLEEP!r}], start_new_session=True).pid)"
    return trial.run("-c", code).said


def temporary(trial: Trial) -> str:
    return trial.run("-c", "import tempfile; tempfile.mkdtemp(prefix='mine-')").said


def unfinished(trial: Trial) -> str:
    (trial.folder / "deep").mkdir()
    (trial.folder / "deep" / ".table.csv.x.part").touch()
    return ""


KEPT = []


def descriptor(trial: Trial) -> str:
    KEPT.append(os.open(os.devnull, os.O_RDONLY))
    return ""


def thread(trial: Trial) -> str:
    KEPT.append(threading.Event())
    threading.Thread(target=KEPT[-1].wait, daemon=True).start()
    return ""


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (orphan, "LEFT: process "),
        (temporary, "LEFT: temporary mine-"),
        (unfinished, "LEFT: unfinished .table.csv.x.part"),
        (descriptor, "LEFT: file descriptors and threads"),
        (thread, "LEFT: file descriptors and threads"),
    ],
)
def test_an_item_that_leaves_something_has_failed(attempt, monkeypatch, work, told):
    monkeypatch.setattr(harness, "wait_until", lambda condition, _: bool(condition()))
    verdict = attempt(work)
    assert verdict.state == "FAILED"
    assert told in verdict.happened
    if work is orphan:
        assert not runs(int(verdict.happened.split(";")[0]))  # it was ended
    if work is descriptor:
        os.close(KEPT.pop())
    if work is thread:
        KEPT.pop().set()


def wrong(trial: Trial) -> str:
    assert 1 + 1 == 3


def late(trial: Trial) -> str:
    return trial.run(*SLEEP, seconds=0.1).said


def other_code(trial: Trial) -> str:
    return trial.run("-c", "import sys; sys.exit('no luck')").said


def hurried(trial: Trial) -> str:
    trial.start("-c", "print('early')")
    trial.until(lambda: False, 100)
    return ""


def not_permitted(trial: Trial) -> str:
    raise Skipped("not here")


@pytest.mark.parametrize(
    ("work", "state", "told"),
    [
        (wrong, "FAILED", "AssertionError"),
        (late, "FAILED", "still running after 0 s"),
        (other_code, "FAILED", "exit code 1, not 0: no luck"),
        (hurried, "FAILED", "early"),
        (not_permitted, "skipped", "not here"),
    ],
)
def test_what_went_wrong_is_told(attempt, work, state, told):
    verdict = attempt(work)
    assert verdict.state == state
    assert told in verdict.happened
    assert verdict.seconds < 30


def test_one_failure_is_exit_code_1(monkeypatch, capsys):
    def fine(trial: Trial) -> str:
        """Do `this`."""
        return "it did"

    items = {work.__name__: Item("whole", "it holds", work is fine, work) for work in (fine, wrong)}
    wrong.__doc__ = "Count."
    monkeypatch.setattr(program, "ITEMS", items)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    assert program.main(program.Drill(seed=5)) == 1
    first, line, failed, last = capsys.readouterr().out.splitlines()
    assert first == "drill with seed 5: 2 items"
    assert line.startswith("ok ")
    assert line.endswith(" s  fine: Do `this` | expected: it holds | it did")
    assert failed.startswith("FAILED ")
    assert last.startswith("1 ok, 1 FAILED, 0 skipped; seed 5, ")
    assert program.main(program.Drill(short=True)) == 0
    assert program.main(program.Drill(only="nothing")) == 1


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_drill_that_is_stopped_leaves_nothing(tmp_path, sent):
    command = [sys.executable, "-m", "tests.drill", "--only", "training_listens"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    drill = subprocess.Popen(command, cwd=harness.ROOT, env=environment, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: list(tmp_path.glob("drill-*/0/log/*")), 60)
    drill.send_signal(sent)
    assert drill.wait(60) == 130
    assert list(tmp_path.glob("drill-*")) == []
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in command]


def test_every_item_is_on_the_page_with_what_it_does_and_promises():
    shown = [item for rows in pages.promises().values() for item in rows]
    assert sorted(item.name for item in shown) == sorted(ITEMS)
    assert {item.kind for item in ITEMS.values()} == set(KINDS)
    assert all(item.done and item.promise.endswith((".", ".)")) for item in ITEMS.values())
    prose = [part for item in ITEMS.values() for text in (item.done, item.promise) for part in text.split("`")[::2]]
    assert not [part for part in prose if "--" in part]  # the page would make one dash of it
    page = (harness.ROOT / "report/site/promises.md").read_text()
    assert all(f'"{title}"' in page for title in KINDS.values())
