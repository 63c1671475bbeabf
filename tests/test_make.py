"""What `make` installs, and what `make clean` leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).resolve().parents[1]
# A build backend that needs nothing installed: it hands out a wheel that is already there.
BACKEND = """\
import pathlib, shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    return pathlib.Path(shutil.copy("fwdlib-0.1.0-py3-none-any.whl", folder)).name
"""


def make(folder: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_wheel(folder: Path | str, name: str, version: str, *requires: str) -> Path:
    """Write a wheel that holds nothing but its metadata."""
    path = Path(folder) / f"{name}-{version}-py3-none-any.whl"
    metadata = "".join(f"Requires-Dist: {text}\n" for text in requires)
    content = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in content.items():
            archive.writestr(f"{name}-{version}.dist-info/{file}", text)
    return path


def write_index(folder: Path, *wheels: tuple[str, ...]) -> str:
    """Write a package index of made-up wheels, (name, version, requirement, ...) each; return its address."""
    for name, version, *requires in wheels:
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = write_wheel(folder / name, name, version, *requires)
        with (folder / name / "index.html").open("a") as page:
            page.write(f'<a href="{path.name}">{path.name}</a>\n')
    return folder.as_uri()


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with this Makefile, three requirements and a package index that has all of them."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    lines = "torch>=2.11  # tensors\ntorchvision>=0.26  # images\nleaf>=1  # another\n"
    (folder / "requirements.txt").write_text(lines)
    (folder / "backend.py").write_text(BACKEND)
    write_wheel(folder, "fwdlib", "0.1.0")
    settings = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (folder / "pyproject.toml").write_text(settings + '[project]\nname = "fwdlib"\nversion = "0.1.0"\n')
    wheels = ("torch", "9.0", "nvidia"), ("torchvision", "9.0", "torch==9.0"), ("nvidia", "1.0"), ("leaf", "1.0")
    write_index(tmp_path / "usual", *wheels)
    return folder


def installed(project: Path) -> set[str]:
    found = subprocess.run(
        [project / ".venv/bin/python", "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    )
    return {line for line in found.stdout.split() if "==" in line}


def install(project: Path, *words: str) -> subprocess.CompletedProcess:
    """Make .venv with a pip that looks into the usual index, in both ways that a user may have set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    usual = (project.parent / "usual").as_uri()
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": usual, "PIP_EXTRA_INDEX_URL": usual}
    return make(project, ".venv/.installed", f"PYTHON={sys.executable}", *words, environment=environment)


@pytest.mark.slow  # makes a .venv: 10 s
def test_torch_index_names_another_index_for_torch_and_torchvision_alone(project):
    """Its older builds are kept, its newer `leaf` is not seen, and what they require comes from the usual index."""
    wheels = ("torch", "8.0+cpu", "leaf"), ("torchvision", "7.0+cpu", "torch==8.0"), ("leaf", "2.0")
    run = install(project, f"TORCH_INDEX={write_index(project.parent / 'cpu', *wheels)}")
    assert run.returncode == 0, run.stderr
    found = installed(project)
    assert found >= {"torch==8.0+cpu", "torchvision==7.0+cpu", "leaf==1.0"}
    assert "nvidia==1.0" not in found


@pytest.mark.slow  # makes a .venv: 10 s
def test_a_torch_index_whose_builds_do_not_fit_together_is_an_error(project):
    wheels = ("torch", "8.0+cpu"), ("torchvision", "7.0+cpu", "torch==9.0")
    run = install(project, f"TORCH_INDEX={write_index(project.parent / 'cpu', *wheels)}")
    assert run.returncode != 0
    assert "torchvision==7.0+cpu" in run.stderr
    assert not (project / ".venv/.installed").exists()


def test_clean_removes_what_make_made_and_nothing_of_the_user(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [
        "results/1a.json",
        "results/sweep/checkpoint.pt",
        "notebooks/results/1a.json",
        "notebooks/mine.ipynb",
        "report/results/scratch.json",
        "report/report.html",
        "build/mine/notes.txt",
        "dist/other.whl",
        ".venv/bin/__pycache__/x.pyc",
        "mine/__pycache__/x.pyc",
    ]
    removed = [
        "build/report/report.html",
        "build/site/index.html",
        "build/evidence/verdicts.md",
        "dist/fwdlib-0.1.0-py3-none-any.whl",
        "fwdlib/stacked/__pycache__/dual.pyc",
        ".pytest_cache/x",
        ".ruff_cache/x",
        ".hypothesis/x",
    ]
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run = make(tmp_path, "clean")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {"Makefile"} == set(kept), run.stderr
