"""The rebuild of all studies in short form: how commands are run, and what is said of the verdicts."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from report import evidence, studies


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def folders(tmp_path):
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path / "results", tmp_path / "logs"


def test_commands_run_so_many_at_once_and_know_where_results_go(folders):
    results, logs = folders
    code = (
        "import os, pathlib, time; start = time.time(); time.sleep(0.5);"
        f"folder = pathlib.Path(os.environ[{studies.VARIABLE!r}]);"
        "threads = os.environ.get('OMP_NUM_THREADS');"
        "(folder / str(os.getpid())).write_text(f'{start} {time.time()} {threads}')"
    )
    evidence.run([python(code)] * 4, results, logs, at_once=2)
    spans = [path.read_text().split() for path in results.iterdir()]
    assert len(spans) == 4
    assert {threads for *_, threads in spans} == {"1"}
    for start, *_ in spans:
        assert sum(float(a) <= float(start) < float(b) for a, b, _ in spans) <= 2


def test_the_first_that_fails_ends_the_others_and_its_last_words_are_told(folders):
    begun = time.monotonic()
    with pytest.raises(evidence.StudyError, match=r"(?s)ended with code 1.*ValueError: no such data"):
        evidence.run(
            [python("import time; time.sleep(60)"), python("raise ValueError('no such data')")], *folders, at_once=2
        )
    assert time.monotonic() - begun < 30


def test_compares_verdicts():
    committed = {"a": "holds", "b": "fails", "c": "holds", "d": "partly"}
    lines = list(evidence.compare(committed, {"a": "holds", "b": "holds", "c": "unclear"}))
    assert [line[0] for line in lines] == [" ", "!", " ", " ", "1"]
    assert "not judged" in lines[3]
    assert lines[-1] == "1 of 4 verdicts come out the same in short form; 1 the other way round."


def test_the_committed_results_have_verdicts():
    outcomes = evidence.verdicts_of(evidence.HERE / "results")
    assert len(outcomes) >= 25
    assert set(outcomes.values()) <= {"holds", "partly", "fails", "unclear"}


def test_the_short_form_is_shorter_and_writes_elsewhere(tmp_path):
    code = (
        "import json; from report import alignment, descent, frank_wolfe, functions, protocols, scratch, tangents;"
        "print(json.dumps([alignment.STUDIES['MNIST-cnn'].epochs, descent.MAX_ITERATIONS, frank_wolfe.NUM_STEPS,"
        "len(functions.SEEDS_OF_DIVERGENCE), protocols.MODELS['mlp'].num_seeds, len(scratch.SEEDS),"
        "len(tangents.SIZES),"
        "*map(str, [alignment.FOLDER, descent.FILE, frank_wolfe.FILE, functions.FILE, protocols.FOLDER, scratch.FILE,"
        "tangents.FILE])]))"
    )
    found = {}
    for name, environment in {"short": {studies.VARIABLE: str(tmp_path)}, "whole": {}}.items():
        others = {key: value for key, value in os.environ.items() if key != studies.VARIABLE}
        ended = subprocess.run(python(code), env=others | environment, check=True, capture_output=True, text=True)
        found[name] = json.loads(ended.stdout)
    assert all(short < whole for short, whole in zip(found["short"][:7], found["whole"][:7], strict=True))
    assert all(path.startswith(str(tmp_path)) for path in found["short"][7:])
    assert all(path.startswith(str(evidence.HERE / "results")) for path in found["whole"][7:])


@pytest.mark.parametrize("words", evidence.TOGETHER + evidence.ALONE, ids=" ".join)
def test_every_study_knows_its_words(words):
    module, *names = words
    module = importlib.import_module(f"report.{module}")
    known = {
        name
        for value in vars(module).values()
        if isinstance(value, (dict, tuple))
        for name in value
        if isinstance(name, str)
    }
    assert callable(module.measure)
    assert set(names) <= known | {"steps"}


def test_an_interrupt_ends_what_runs(tmp_path):
    code = (
        "import sys; from pathlib import Path; from report import evidence;"
        "evidence.TOGETHER[:] = []; evidence.ALONE[:] = [['evidence', 'sleep']];"
        "run = evidence.run;"
        "evidence.run = lambda commands, *rest, at_once: run("
        f"[[{sys.executable!r}, '-c', 'import time; time.sleep(60)']], *rest, at_once=at_once);"
        f"sys.exit(evidence.main([{str(tmp_path)!r}]))"
    )
    # a child of a shell that runs things in the background would ignore the signal
    process = subprocess.Popen(
        python(code),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert "started" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "the same command goes on from there" in rest
