"""What the doctor finds, one fault at a time, and that it changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch

from fwdlib import cli, doctor

pytestmark = pytest.mark.usefixtures("bare_account")


def findings(check) -> list[doctor.Finding]:
    return list(doctor._findings(check))


def problems(check) -> list[doctor.Finding]:
    return [finding for finding in findings(check) if finding.status == "problem"]


def test_doctor_counts_problems_and_exits_1(damaged, capsys):
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"problem  penguins: DAMAGED: {damaged}" in printed
    assert printed.endswith("\n1 problem found.\n")


def test_doctor_finds_an_unwritable_results_folder(monkeypatch, tmp_path):
    in_the_way = tmp_path / "results"
    in_the_way.write_text("a file")
    monkeypatch.setenv("FWDLIB_RESULTS", str(in_the_way))
    (problem,) = problems(doctor._check_results)
    assert str(in_the_way) in problem.text
    assert "FWDLIB_RESULTS" in problem.text
    assert in_the_way.read_text() == "a file"


def test_doctor_leaves_no_trace(tmp_path):
    assert [finding.status for finding in findings(doctor._check_results)] == ["ok"]
    assert not (tmp_path / "new").exists()


def test_doctor_finds_missing_and_old_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    old, missing = sorted(problems(doctor._check_packages), key=lambda finding: "scipy" in finding.text)
    assert "torch 2.10.1" in old.text
    assert '"torch>=' in old.advice
    assert missing.text == "scipy is not installed"
    assert "pip install" in missing.advice


def test_doctor_finds_a_package_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (problem,) = problems(doctor._check_imports)
    assert "torchvision" in problem.text
    assert problem.advice


def test_doctor_finds_wrong_derivatives(monkeypatch):
    real = torch.func.jvp
    monkeypatch.setattr(torch.func, "jvp", lambda *arguments: [1.01 * value for value in real(*arguments)])
    assert "forward-mode AD on cpu" in problems(doctor._check_torch)[0].text


def test_doctor_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    doctor._jvp_error(torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_doctor_finds_the_kernel_of_another_python(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = ["/opt/other/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Other", "language": "python"}))
    (problem,) = problems(doctor._check_jupyter)
    assert "/opt/other/bin/python" in problem.text
    assert sys.executable in problem.advice


def test_doctor_finds_that_jupyter_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "jupyter_client.kernelspec", None)
    assert "pip install" in problems(doctor._check_jupyter)[0].advice


@pytest.mark.parametrize(
    ("package", "command"), [("papermill", "run"), ("psutil", "run"), ("distributed", "run --scheduler")]
)
def test_doctor_notes_what_run_lacks(package, command, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    (note,) = [finding for finding in findings(doctor._check_jupyter) if finding.status == "note"]
    assert f"`python -m fwdlib {command}` needs {package}" in note.text
    assert note.advice == f"{sys.executable} -m pip install {package}"


def test_doctor_survives_a_check_that_breaks(monkeypatch, capsys):
    def broken():
        raise RuntimeError("torn")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"Broken": broken, "Mode": doctor._check_mode})
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: torn" in printed
    assert "FWDLIB_QUICK is not set" in printed
