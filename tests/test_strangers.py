"""A folder with files of somebody else: a command that writes to a folder may refuse it, and touches none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwdlib.atomic import check_own
from tests.notebook_files import write_notebook

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("notes.txt", "index.html", "data.json", "figures/a.b/c.svg", "figures/plot.v2.svg", "v1.2/readme.md")
HIDDEN = (".notes.part", ".report", "figures/.keep")
OURS = (  # names that our commands use, too
    *("report.html", "report.pdf", "figures/cost.svg", "report-manifest.txt", "code.txt", "logs/tangents.txt"),
    *("table.csv", "results/tiny.json", "executed/tiny.json", "executed/tiny.ipynb", "executed/failed/tiny.ipynb"),
    *("record.json", "log.csv", "curves.png", "curves.svg", "bench.json", "tangents.json", "feedback/steps.json"),
)
FOLDERS = {
    "plain": (*PLAIN, *HIDDEN),
    "with names of ours": (*PLAIN, *HIDDEN, *OURS),
    "with a checkpoint": ("checkpoint.pt",),
}
TRAIN = ["-m", "fwdlib", "train", "--dataset", "digits", "--n-layers", "1", "--epochs", "1"]
RUN = ["-m", "fwdlib", "run", "--notebook", "{notebook}"]
# Evidence and study start, but measure nothing.
EVIDENCE = """import sys
from report import evidence
def stop(*_, **__): raise KeyboardInterrupt
evidence.run = stop
sys.exit(evidence.main())"""
BENCH = """import sys
from fwdlib import cli
from fwdlib.bench import benchmark
benchmark.run = lambda **_: {"load": 0, "models": {}, "depth": {}}
sys.exit(cli.main())"""
STUDY = """from report.studies import common, tangents
tangents.tune = lambda *_: []
common.main(tangents.measure, tangents.FULL, tangents.SHORT, tangents.SHORT.problems)"""
COMMANDS = {
    "bench": ["-c", BENCH, "bench", "--out", "{}/bench.json"],
    "train": [*TRAIN, "--log-dir", "{}"],
    "train --resume": [*TRAIN, "--resume", "--log-dir", "{}"],
    "train --dry-run": [*TRAIN, "--dry-run", "--log-dir", "{}"],
    "run": [*RUN, "--output", "{}"],
    "run --dry-run": [*RUN, "--dry-run", "--output", "{}"],
    "report": ["-m", "report", "--only-render", "--output", "{}"],
    "evidence": ["-c", EVIDENCE, "{}"],
    "study": ["-c", STUDY, "--short", "--folder", "{}"],
}


def fill(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f'{{"mine": "{name}"}}'.encode())
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_strangers_files_survive(command, kind, tmp_path):
    before = fill(tmp_path / "mine", FOLDERS[kind])
    code = "import os\nfrom pathlib import Path\nPath(os.environ['FWDLIB_RESULTS'], 'tiny.json').write_text('{}')"
    notebook = write_notebook(tmp_path / "tiny.ipynb", "seed = 0", code)
    first, program, *rest = COMMANDS[command]
    words = [first, program, *(word.format(tmp_path / "mine", notebook=notebook) for word in rest)]
    environment = os.environ | {"FWDLIB_OFFLINE": "1", "FWDLIB_QUICK": "1"}
    how = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, **how)
    after = contents(tmp_path / "mine")
    assert {name: after.get(name) for name in before} == before
    assert ended.returncode in {0, 1, 130}, ended.stderr
    assert "Traceback" not in ended.stderr
    if ended.returncode == 1:
        assert str(tmp_path / "mine") in ended.stderr
        assert set(after) <= {*before, *((".fwdlib-lock",) if "checkpoint.pt" in before else ())}


def test_own_files_are_known_by_their_mark(tmp_path):
    check_own(tmp_path / "new", ["a.json"], "mark")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(FileExistsError, match=rf"{tmp_path} has files that no such command has written.*: a\.json"):
        check_own(tmp_path, ["a.json", "b.json"], "mark")
    (tmp_path / "mark").write_text("3")
    check_own(tmp_path, ["a.json"], "mark")
    for text, is_own in {"3": False, "{": False, '{"a": 1}': False, '{"a": 1, "b": 2, "c": 3}': True}.items():
        (tmp_path / "a.json").write_text(text)
        if is_own:
            check_own(tmp_path, ["a.json"], "a.json", ("a", "b"))
        else:
            with pytest.raises(FileExistsError):
                check_own(tmp_path, ["a.json"], "a.json", ("a", "b"))
