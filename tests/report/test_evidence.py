"""The rebuild of all studies in short form: how commands are run, and what is said of the verdicts."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys

import psutil
import pytest

from report import evidence
from report.output import MANIFEST
from report.page.context import build_context, load_results
from report.studies import common
from tests.processes import wait_until

pytestmark = pytest.mark.slow  # starts processes


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def folders(tmp_path):
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path / "results", tmp_path / "logs"


def test_commands_run_so_many_at_once(folders):
    results, logs = folders
    code = (
        "import os, pathlib, time; start = time.time(); time.sleep(0.5);"
        f"folder = pathlib.Path({str(results)!r});"
        "threads = os.environ.get('OMP_NUM_THREADS');"
        "(folder / str(os.getpid())).write_text(f'{start} {time.time()} {threads}')"
    )
    evidence.run([python(code)] * 4, logs, at_once=2)
    spans = [path.read_text().split() for path in results.iterdir()]
    assert len(spans) == 4
    assert {threads for *_, threads in spans} == {"1"}
    beside = [sum(float(a) <= float(start) < float(b) for a, b, _ in spans) for start, *_ in spans]
    assert max(beside) == 2


def test_the_first_that_fails_ends_the_others_and_its_last_words_are_told(folders):
    lasting = f"import os, pathlib, time; pathlib.Path({str(folders[0] / 'pid')!r}).write_text(str(os.getpid()));"
    lasting = python(lasting + "time.sleep(60)")
    failing = python("import time; time.sleep(1); raise ValueError('no such data')")
    with pytest.raises(evidence.StudyError, match=r"(?s)ended with code 1.*ValueError: no such data"):
        evidence.run([lasting, failing], folders[1], at_once=2)
    assert not psutil.pid_exists(int((folders[0] / "pid").read_text()))


def test_compares_verdicts():
    committed = {"a": "holds", "b": "fails", "c": "holds", "d": "partly"}
    lines = list(evidence.compare(committed, {"a": "holds", "b": "holds", "c": "inconclusive"}))
    assert [line[0] for line in lines] == [" ", "!", " ", " ", "1"]
    assert "not judged" in lines[3]
    assert lines[-1] == "1 of 4 verdicts are the same in short form; 1 reversed."


def test_the_committed_results_have_verdicts():
    outcomes = evidence.verdicts_of(evidence.RESULTS)
    assert len(outcomes) == len(build_context(load_results(evidence.RESULTS))["claims"]) >= 25
    assert set(outcomes.values()) <= {"holds", "partly", "fails", "inconclusive", "not measured"}


@pytest.mark.parametrize("words", evidence.TOGETHER + evidence.ALONE, ids=" ".join)
def test_every_study_knows_its_words_and_has_a_short_form(words, tmp_path, monkeypatch):
    name, *parts = words
    study, given = importlib.import_module(f"report.studies.{name}"), []
    assert type(study.SHORT) is type(study.FULL)
    assert study.SHORT != study.FULL

    def measure(*arguments):
        given.append(arguments)

    measure.__module__ = study.__name__
    command = evidence.study(words, tmp_path)
    assert command[2] == study.__name__
    monkeypatch.setattr(sys, "argv", command[2:])
    common.main(measure, study.FULL, study.SHORT, getattr(study, "PARTS", ()))
    settings, folder, *rest = given[0]
    assert (settings, folder) == (study.SHORT, tmp_path)
    if parts:
        assert rest == [tuple(parts)]


def test_a_word_that_is_no_part_measures_nothing(monkeypatch, capsys):
    from report.studies import protocols

    monkeypatch.setattr(sys, "argv", ["protocols", "SGD"])
    with pytest.raises(SystemExit) as caught:
        common.main(protocols.measure, protocols.FULL, protocols.SHORT, protocols.PARTS)
    assert caught.value.code == 2
    assert "'SGD'" in "".join(capsys.readouterr())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_study_outlives_the_command(tmp_path, sent):
    pid, folder = tmp_path / "pid", tmp_path / "evidence"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from report import evidence; run = evidence.run;"
        f"evidence.run = lambda commands, *rest, at_once: run([{python(child)!r}], *rest, at_once=at_once);"
        f"sys.exit(evidence.main([{str(folder)!r}]))"
    )
    # In a session of its own, so that the signal reaches it alone; a shell's background jobs would ignore it.
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": reset, "start_new_session": True}
    process = subprocess.Popen(python(code), **options)
    assert wait_until(lambda: pid.is_file() and pid.read_text(), 60)
    process.send_signal(sent)
    said = process.communicate(timeout=30)[1]
    if sent != signal.SIGKILL:
        assert process.returncode == 130
        assert "the same command continues from there" in said
    assert wait_until(lambda: not psutil.pid_exists(int(pid.read_text())), 10)


def test_results_of_other_code_are_not_continued(tmp_path, capsys):
    (tmp_path / MANIFEST).write_text("[]")
    (tmp_path / "code.txt").write_text("of another day")
    assert evidence.main([str(tmp_path)]) == 1
    assert "was begun with other code" in capsys.readouterr().err


def test_a_word_that_is_no_folder_starts_nothing(capsys):
    for words, code in ((["--quick"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            evidence.main(words)
        assert caught.value.code == code
    assert "python -m report.evidence" in capsys.readouterr().out


def test_a_cluster_that_is_not_there_is_told_before_the_studies_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "run", None)
    assert evidence.main([str(tmp_path), "--scheduler", "nonsense://x"]) == 1
    assert "no Dask scheduler answers at nonsense://x" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_notebooks_go_to_the_cluster(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("fwdlib.runs.cluster.Cluster", lambda scheduler: contextlib.nullcontext())
    monkeypatch.setattr(evidence, "run", lambda given, *_, **__: commands.extend(given))
    monkeypatch.setattr(evidence, "compare", lambda *_: [])
    monkeypatch.setattr(evidence, "verdicts_of", lambda *_: {})
    assert evidence.main(["--scheduler", "tcp://there:8786", str(tmp_path)]) == 0
    page = ["--output", str(tmp_path / "report"), "--studies", str(tmp_path / "results")]
    assert commands[-1][2:] == ["report", *page, "--scheduler", "tcp://there:8786"]
    assert not [command for command in commands[:-1] if "--scheduler" in command]


def test_reopen_names_a_setting_that_was_not_there(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"settings": {"a": 1}}))
    with pytest.raises(ValueError, match="b was 'not there' and is None now"):
        common.reopen(tmp_path / "study.json", {"a": 1, "b": None})
    assert common.reopen(tmp_path / "study.json", {"a": 1})["settings"] == {"a": 1}
    assert common.reopen(tmp_path / "new.json", {"a": 1}, runs=[])["runs"] == []
