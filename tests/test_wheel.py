"""Each notebook stands alone: an empty folder, only the wheel, no repository, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from report import notebooks
from tests.test_make import write_index

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
# A network namespace of its own: loopback for the kernel's sockets, and nothing else.
OFFLINE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def can_cut_the_network():
    return (
        all(map(shutil.which, ("unshare", "ip")))
        and subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """What `make wheel` builds, unpacked. An earlier build has left a module that no longer exists."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fwdlib", folder / "fwdlib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "build" / "lib" / "fwdlib").mkdir(parents=True)
    (folder / "build" / "lib" / "fwdlib" / "moved.py").touch()
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()  # newer than requirements.txt: nothing to install
    subprocess.run(["make", "wheel", f"RUN={sys.executable}"], cwd=folder, check=True)
    (wheel,) = (folder / "dist").glob("*")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def files_in(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_holds_fwdlib_alone(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"fwdlib"}


def test_the_wheel_holds_the_files_of_today_and_none_of_an_earlier_build(site):
    assert files_in(site / "fwdlib") == files_in(ROOT / "fwdlib")
    assert (site / "fwdlib" / "fwdlib.mplstyle").is_file()


@pytest.mark.skipif(not can_cut_the_network(), reason="needs unshare and ip, and the right to make a network namespace")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_alone_and_offline(notebook, site, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(notebook, folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FWDLIB_")}
    environment |= {"PYTHONPATH": str(site), "FWDLIB_QUICK": "1", "FWDLIB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "papermill", notebook.name, "out.ipynb", "-k", "python3", "--no-progress-bar"]
    run = subprocess.run([*OFFLINE, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

    outputs = [output for cell in nbformat.read(folder / "out.ipynb", 4).cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    # the penguins are the same rows offline; the digits are not KMNIST, and say so
    assert ("SUBSTITUTE: this is digits, not KMNIST" in text) == notebook.stem.startswith("3")
    assert (folder / "results" / f"{notebook.stem}.json").is_file() == (notebook.stem != "0_start")


def test_the_setup_cell_installs_from_the_repository_s_address(tmp_path):
    """In Colab, one click: a repository in a folder has the address, and an index in a folder has palmerpenguins."""
    repository, target = tmp_path / "repository", tmp_path / "target"
    repository.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, repository)
    shutil.copytree(ROOT / "fwdlib", repository / "fwdlib", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", repository]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    notebook = nbformat.read(ROOT / "notebooks" / "1a_logistic_backprop.ipynb", 4)
    notebooks.write_setup(notebook, "notebooks/1a_logistic_backprop.ipynb", repository.as_uri())
    setup = next(cell.source for cell in notebook.cells if "google.colab" in cell.source and cell.cell_type == "code")
    program = f"""
import sys, types
from IPython.core.interactiveshell import InteractiveShell
sys.modules["google.colab"] = types.ModuleType("google.colab")
InteractiveShell.instance().run_cell({setup!r}).raise_error()
"""
    index = write_index(tmp_path / "index", ("palmerpenguins", "0.1.6"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PIP_TARGET": str(target)}
    environment |= {"PIP_NO_BUILD_ISOLATION": "false", "HOME": str(tmp_path)}  # pip's word for "no isolation"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert files_in(target / "fwdlib") == files_in(ROOT / "fwdlib"), run.stdout + run.stderr
    assert (target / "palmerpenguins-0.1.6.dist-info").is_dir()
