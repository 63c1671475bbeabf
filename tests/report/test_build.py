"""The build: where it writes, what it keeps and refuses, and that it leaves the checkout alone."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from report import __main__ as program
from report.output import HIDDEN, MANIFEST
from report.page import render
from report.page.context import METHODS, RECORDS, TASKS, TIMINGS, load_results
from tests.notebook_files import write_notebook
from tests.processes import wait_until
from tests.report.records import change, contents, draw

pytestmark = pytest.mark.slow  # starts processes, or trains large networks

ROOT = Path(__file__).parents[2]
STUDIES = ["tangents.json", "bench-cpu.json", "feedback/steps.json", "protocols/cnn.json", "scaling.json"]
NAMES = [getattr(task, method) for task in TASKS.values() for method in METHODS]


def options(folder: Path) -> list[str]:
    """Return the options to build in a folder whose results/ hold everything."""
    return ["--output", str(folder), "--studies", str(folder / "results")]


@pytest.fixture
def built(results) -> Path:
    """A folder with the results and the pages of an earlier build, which read "old"."""
    folder = results.parent
    for name in render.PAGES:
        (folder / name).write_text("old")
    (folder / MANIFEST).write_text(json.dumps([*render.PAGES, *(f"results/{name}" for name in RECORDS)]))
    return folder


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)])
def test_a_render_that_is_cut_short_changes_nothing(built, monkeypatch, capsys, error, code):
    before = contents(built)

    def stop(text, folder):
        raise error

    monkeypatch.setattr(render.figures, "draw", lambda results, folder: (folder / "new.svg").write_text("new"))
    monkeypatch.setattr(render, "to_pdf", stop)
    assert program.main(["--only-render", *options(built)]) == code
    assert contents(built) == before
    said = capsys.readouterr().err
    assert ("stopped" in said) if code == 130 else ("No space left" in said and "from an earlier build" in said)


def test_what_a_killed_render_leaves_is_removed(results, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from report.output import hold; from report.page import render\n"
        "from report.page.context import load_results\n"
        "render.figures.draw = lambda *a: (print('here', flush=True), time.sleep(60))\n"
        "with hold(Path(sys.argv[2])) as output: render.render(load_results(Path(sys.argv[1])), output)"
    )
    folder = tmp_path / "page"
    command = [sys.executable, "-c", script, str(results), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert (folder / HIDDEN / "files" / "figures").is_dir()
    assert not (folder / "report.html").exists()
    draw(results, folder)  # the lock of a dead process blocks nobody
    assert not (folder / HIDDEN / "files").exists()
    assert (folder / "report.html").is_file()


def test_drawing_ends_with_the_process_that_asked_for_it(tmp_path):
    script = (
        "import os, sys, time; from concurrent.futures import ProcessPoolExecutor; import multiprocessing\n"
        "from report.page import figures\n"
        "if __name__ == '__main__':\n"
        "    method = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, method, initializer=figures._end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not psutil.pid_exists(child), 10)


def test_a_killed_drawing_process_is_said(built, monkeypatch, capsys):
    monkeypatch.setattr(render.figures, "_draw_group", kill_itself)
    assert program.main(["--only-render", *options(built)]) == 1
    assert "a process that draws figures was killed" in capsys.readouterr().err
    assert (built / "report.html").read_text() == "old"


def kill_itself(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", STUDIES)
def test_a_truncated_study_is_named(built, capsys, name):
    path = built / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text((program.RESULTS / name).read_text()[:1000])
    assert program.main(["--only-render", *options(built)]) == 1
    assert f"{path} is damaged: it is not JSON" in capsys.readouterr().err
    assert (built / "report.html").read_text() == "old"


def test_a_full_disk_is_named(built, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(render, "to_pdf", full)
    assert program.main(["--only-render", *options(built)]) == 1
    assert f"could not write {built}: No space left on device. To go on, free some space" in capsys.readouterr().err


def test_a_failing_notebook_stops_the_report(built, monkeypatch, capsys):
    write_notebook(built.parent / "broken.ipynb", "steps = 1", "raise ValueError('no such luck')")
    (built.parent / "plan.toml").write_text("[notebooks.broken]\n[timings]\nlogistic = 1\n")
    monkeypatch.setattr(program, "NOTEBOOKS", built.parent)
    monkeypatch.setattr(program, "PLAN", built.parent / "plan.toml")
    monkeypatch.setattr(program.Build, "_load_data", lambda self: "data")
    assert program.main([*options(built), "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert "broken.ipynb, cell 2: ValueError: no such luck" in said
    copy = Path(re.search(r"executed copy: (.*)", said)[1])
    assert "no such luck" in copy.read_text()
    assert "No report was made" in said
    assert (built / "report.html").read_text() == "old"
    assert not (built / "figures").exists()


@pytest.mark.parametrize("damage", ["missing", "not json", "no timings", "another seed", "another split"])
def test_unusable_results_are_named(built, capsys, damage):
    results = built / "results"
    if damage == "missing":
        (results / "2a_mlp_backprop.json").unlink()
    elif damage == "not json":
        (results / "2a_mlp_backprop.json").write_text("{")
    elif damage == "no timings":
        (results / "timings.json").unlink()
    elif damage == "another seed":
        change(results, "2a_mlp_backprop", lambda record: record.runs.pop())
    else:
        change(results, "2a_mlp_backprop", lambda record: record.source.update(fingerprint="other"))
    assert program.main(["--only-render", *options(built)]) == 1
    said = capsys.readouterr().err
    assert ("timings.json" if damage == "no timings" else "2a_mlp_backprop") in said
    assert (built / "report.html").read_text() == "old"


# --- the timing pass -------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(results, monkeypatch):
    """Return the calls of a stand-in for the measurement, which takes its numbers from the saved ones."""
    from report.studies import timings

    saved, calls = json.loads((results / "timings.json").read_text()), []
    (results / "timings.json").unlink()

    def measure(tasks, **options):
        calls.append(list(tasks))
        return {"environment": saved["environment"], "tasks": {key: saved["tasks"][key] for key in tasks}}

    monkeypatch.setattr(timings, "measure", measure)
    return calls


PAIRS = dict.fromkeys(TASKS, 2)


def test_times_are_taken_once(results, measured):
    build = program.Build()
    build._take_times(results.parent, PAIRS, "data")
    assert measured == [["logistic"], ["mlp"], ["cnn"]]
    load_results(results)  # complete
    build._take_times(results.parent, PAIRS, "data")
    assert len(measured) == 3
    program.Build(resume=False)._take_times(results.parent, PAIRS, "data")
    assert len(measured) == 6


@pytest.mark.parametrize("what", ["data", "pairs", "result", "stamp", "settings"])
def test_times_are_taken_again_when_something_changed(results, measured, what):
    build = program.Build()
    build._take_times(results.parent, PAIRS, "data")
    if what == "result":
        (results / "timings.json").write_text("{}")
    elif what == "stamp":
        (results.parent / "executed" / "timings.json").write_text("{")
    elif what == "settings":
        change(results, "1b_logistic_forward", lambda record: record.parameters.update(learning_rate=0.1))
    pairs, data = PAIRS | {"cnn": 3 if what == "pairs" else 2}, "other" if what == "data" else "data"
    build._take_times(results.parent, pairs, data)
    assert len(measured) == 6


def test_an_interrupted_timing_pass_leaves_no_stamp(results, measured, monkeypatch):
    from report.studies import timings

    build = program.Build()

    def stop(tasks, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(timings, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        build._take_times(results.parent, PAIRS, "data")
    assert not (results / "timings.json").exists()
    assert not (results.parent / "executed" / "timings.json").exists()


# --- a whole build ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(saved, measured, tmp_path, monkeypatch) -> list:
    """Notebooks that "train" by copying the saved records, and the timing pass's stand-in, whose calls are returned."""
    for name in NAMES:
        copy_it = f"import os, shutil\nshutil.copy({str(saved / name)!r} + '.json', os.environ['FWDLIB_RESULTS'])"
        write_notebook(tmp_path / f"{name}.ipynb", "steps = 1", copy_it)
    monkeypatch.setattr(program, "NOTEBOOKS", tmp_path)
    return measured


def test_a_build_and_another_that_reuses_it(fake, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.Build, "_load_data", lambda self: "data")
    built = tmp_path / "built"
    command = ["--output", str(built), "--studies", str(results)]
    assert program.main(command) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(built / "report.pdf"), str(built / "report.html")]
    assert re.search(r"report +\d+ s in all", said.err)
    made = {"executed", "figures", "results", *render.PAGES, MANIFEST, HIDDEN}
    assert {path.name for path in built.iterdir()} == made
    assert set(json.loads((built / MANIFEST).read_text())) >= set(contents(built)) - {MANIFEST}
    assert len(fake) == 3
    before = contents(built)
    assert program.main(command) == 0
    assert contents(built) == before
    assert len(fake) == 3
    assert capsys.readouterr().err.count("reused") == 7


@pytest.fixture
def committed(saved, tmp_path, monkeypatch) -> Path:
    """A stand-in for the committed report."""
    folder = tmp_path / "checkout" / "report"
    shutil.copytree(saved, folder / "results")
    (folder / "results" / "study.json").write_text("{}")
    listed = [*render.PAGES, "figures/old.svg", *(f"results/{name}" for name in RECORDS)]
    (folder / MANIFEST).write_text(json.dumps(listed))
    (folder / "code.py").write_text("")
    (folder / "figures").mkdir()
    (folder / "figures" / "old.svg").write_text("")
    for name, value in {"HERE": folder, "RESULTS": folder / "results", "ROOT": folder.parent}.items():
        monkeypatch.setattr(program, name, value)
    return folder


def publish(*words: str) -> int:
    return program.main(["--publish", "--studies", str(program.RESULTS), *words])


def test_publishing_replaces_records_figures_and_pages_and_no_other_file(committed, measured, saved, monkeypatch):
    monkeypatch.setattr(program.Build, "_load_data", lambda self: "data")
    run = lambda self, folder, *_: shutil.copytree(saved, folder / "results", dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(program.Build, "_run_notebooks", run)
    before = contents(committed / "results")
    change(committed / "results", "3b_cnn_forward", lambda record: record.parameters.update(learning_rate=0.1))
    assert publish() == 0
    assert contents(committed / "results") == before
    assert {path.name for path in committed.iterdir()} - {HIDDEN} == {
        *("results", "figures", "code.py", MANIFEST),
        *render.PAGES,
    }
    assert not (committed / "figures" / "old.svg").exists()
    after = contents(committed)
    assert publish("--only-render") == 0
    assert contents(committed) == after  # the same results, the same bytes


def test_a_substitute_is_not_published(committed, bare_machine, capsys):
    before = contents(committed)
    assert publish() == 1  # without data nor network
    assert "real data only, and this is digits in place of KMNIST" in capsys.readouterr().err
    assert not (committed.parent / "build" / "publish" / "results").exists()  # it was said at once
    assert contents(committed) == before


@pytest.mark.parametrize("what", ["digits in place of KMNIST", "quick mode"])
def test_records_that_are_no_results_are_not_published(committed, capsys, what):
    def edit(record):
        if what == "quick mode":
            record.quick = True
        else:
            record.source.update(name="digits", substitute_for="KMNIST")

    for name in ("3a_cnn_backprop", "3b_cnn_forward"):
        change(committed / "results", name, edit)
    before = contents(committed)
    assert publish("--only-render") == 1
    said = capsys.readouterr().err
    assert what in said
    assert "3a_cnn_backprop" in said
    assert contents(committed) == before


def test_publishing_takes_no_other_folder(committed, tmp_path, capsys):
    assert publish("--output", str(tmp_path / "other")) == 1
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_without_an_earlier_build_the_committed_records_are_drawn(committed, tmp_path, capsys):
    folder = tmp_path / "page"
    assert program.main(["--only-render", "--output", str(folder), "--studies", str(committed / "results")]) == 0
    assert {path.name for path in folder.iterdir()} - {HIDDEN, MANIFEST} == {"figures", *render.PAGES}
    assert str(committed / "results") in capsys.readouterr().err


@pytest.mark.slow
def test_a_build_leaves_the_checkout_alone(tmp_path):
    copy = tmp_path / "copy"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept = ("report/results/", "report/figures/", "report/site/", "notebooks/", "tests/")  # but for the records, below
    for name in listed.rstrip("\0").split("\0"):
        if not name.startswith(kept) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    for folder in ("notebooks", "report/results"):
        (copy / folder).mkdir()
    for record in RECORDS:
        shutil.copyfile(ROOT / "report" / "results" / record, copy / "report" / "results" / record)
    for name in NAMES:
        source = str(ROOT / "report" / "results" / f"{name}.json")
        copy_it = f"import os, shutil\nshutil.copy({source!r}, os.environ['FWDLIB_RESULTS'])"
        write_notebook(copy / "notebooks" / f"{name}.ipynb", "steps = 1", copy_it)
    taken = str(copy / "report" / "results" / TIMINGS)
    code = f"import json\ndef measure(*_, **__):\n    return json.load(open({taken!r}))\n"
    (copy / "report" / "studies" / "timings.py").write_text(code)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=copy, check=True)
    environment = os.environ | {"PYTHONPATH": str(copy), "FWDLIB_QUICK": "1", "FWDLIB_OFFLINE": "1"}
    for words in ([], ["--only-render"]):
        command = [sys.executable, "-m", "report", *words]
        ended = subprocess.run(command, cwd=copy, env=environment, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == str(copy / "build" / "report" / "report.html")
    assert subprocess.run([*git, "status", "--porcelain"], cwd=copy, check=True, capture_output=True).stdout == b""


def test_the_plan_names_the_six_notebooks():
    plan = program.tomllib.loads(program.PLAN.read_text())
    assert set(plan["notebooks"]) == set(NAMES)
    assert set(plan["timings"]) == set(TASKS)


def test_data_are_said_and_a_substitute_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FWDLIB_DATA", raising=False)
    monkeypatch.setenv("FWDLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("fwdlib.archives.answers", lambda url: False)
    start = time.monotonic()
    data = program.Build()._load_data()
    assert time.monotonic() - start < 10
    said = capsys.readouterr().err
    assert "!!! SUBSTITUTE: this is digits, not KMNIST" in said
    assert re.fullmatch(r"penguins/processed \w{16}, digits \w{16}", data)


@pytest.mark.parametrize("modules", ["report.__main__", "report.page, report.page.render, report.page.context"])
def test_neither_help_nor_drawing_waits_for_torch(modules):
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_figures_need_no_torch_except_for_the_maps_of_functions():
    script = (
        "import sys; from pathlib import Path; from report.page import context, figures\n"
        "results = context.load_results(Path('report/results'))\n"
        "names = {'summary', *context.TASKS, *context.PARTS} - {'functions'}\n"
        "made = [name for name in names if results.parts.get(name, True)]  # of which a study was made\n"
        "assert len(made) > 10 and all(figures._figures_of(results, name) for name in made)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    made = load_results(ROOT / "report" / "results").records["cnn"]["forward"].environment["versions"]
    if made["matplotlib"] != version("matplotlib"):
        pytest.skip(f"the committed figures were drawn by matplotlib {made['matplotlib']}")
    folder = tmp_path / "page"
    assert program.main(["--only-render", "--output", str(folder)]) == 0
    assert contents(folder / "figures") == contents(ROOT / "report" / "figures")
    ours, committed = ((each / "report.html").read_text() for each in (folder, ROOT / "report"))
    link = os.path.relpath(ROOT / "notebooks", folder)
    assert ours.replace(f'href="{link}/', 'href="../notebooks/') == committed, "run `make publish ARGS=--only-render`"
