"""The command line: forms, exit codes, what the doctor finds, and that expected errors come without a traceback."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from fwdlib import archives, cli, data


@pytest.fixture(autouse=True)
def bare_machine(bare_machine, monkeypatch, tmp_path):
    """Neither data nor cache nor network, no kernels of the user's own; results go to a folder that is not there."""
    for name in ("FWDLIB_QUICK", "JUPYTER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FWDLIB_RESULTS", str(tmp_path / "new" / "results"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


@pytest.fixture
def damaged(monkeypatch, tmp_path) -> Path:
    """FWDLIB_DATA with a penguin table that is not the published one."""
    path = tmp_path / "data" / data.PENGUIN_CSV.path
    path.parent.mkdir(parents=True)
    path.write_text("species\n")
    monkeypatch.setenv("FWDLIB_DATA", str(tmp_path / "data"))
    return path


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


def findings(check) -> list[cli.Finding]:
    return list(cli._findings(check))


def problems(check) -> list[cli.Finding]:
    return [finding for finding in findings(check) if finding.status == "problem"]


SHOWN = {
    "--help": ("doctor", "data", "bench"),
    "data": ("list", "fetch"),
    "bench": ("--quick", "--device", "--models", "--no-memory", "--no-depth", "--batch", "--out"),
}


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["doctor", "--help"], ["data", "--help"], ["data", "fetch", "--help"], ["bench", "--help"]]
)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m fwdlib")
    assert all(name in shown for name in SHOWN.get(words[0], ()))


def test_help_does_not_wait_for_torch():
    code = "import sys, fwdlib.cli\ntry: fwdlib.cli.main(['--help'])\nfinally: print(len(sys.modules), *sys.modules)"
    ended = run("-c", code)
    loaded = ended.stdout.splitlines()[-1].split()
    assert int(loaded[0]) > 50  # it is the list of modules that we look at
    assert not {"torch", "numpy", "pandas", "matplotlib", "sklearn"} & set(loaded)


@pytest.mark.parametrize(
    ("words", "named"),
    [([], "doctor"), (["docter"], "docter"), (["data", "fetsh"], "fetsh"), (["doctor", "--fast"], "--fast")],
)
def test_words_that_make_no_command(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["data"], ["data", "list"]])
def test_data_lists_all_with_licence_and_origin(words, capsys):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (licence, _) in data.CREDITS.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert licence in line
        assert data.available()[name] in line
    assert "SUBSTITUTE" in "\n".join(lines)


def test_data_list_shows_damage(damaged, capsys):
    assert cli.main(["data"]) == 0
    assert f"DAMAGED: {damaged} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["penguins", "PENGUINS"])
def test_fetch_downloads_into_the_cache(word, monkeypatch, tmp_path, capsys):
    class Response(io.BytesIO):
        length = None

    published = b"334 penguins\n"
    archive = archives.Archive("penguins/table.csv", hashlib.sha256(published).hexdigest(), ("https://a.test/t.csv",))
    monkeypatch.setattr(data, "PENGUIN_CSV", archive)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Response(published))
    assert cli.main(["data", "fetch", word]) == 0
    assert (tmp_path / "cache/penguins/table.csv").read_bytes() == published
    assert f"penguins: ready in {tmp_path / 'cache'}" in capsys.readouterr().out


def test_fetch_unknown_lists_the_known_before_any_download(monkeypatch, capsys):
    monkeypatch.setattr(data, "fetch", lambda name: pytest.fail(f"fetched {name}"))
    assert cli.main(["data", "fetch", "penguins", "CIFAR11"]) == 1
    message = capsys.readouterr().err
    assert "'CIFAR11'" in message
    assert all(name in message for name in data.FETCHABLE)


def test_fetch_of_nothing_lists_the_known(capsys):
    assert cli.main(["data", "fetch"]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in data.FETCHABLE)


def test_fetch_goes_on_after_one_that_cannot_be_had(monkeypatch, tmp_path, capsys):
    def fetch(name):
        if name == "CIFAR10":
            raise FileNotFoundError("CIFAR10 is not available: no host answers")
        return tmp_path

    monkeypatch.setattr(data, "fetch", fetch)
    assert cli.main(["data", "fetch", "CIFAR10", "KMNIST"]) == 1
    printed = capsys.readouterr()
    assert "CIFAR10 is not available" in printed.err
    assert "KMNIST: ready" in printed.out


def test_fetch_offline_and_damaged(damaged, capsys):
    assert cli.main(["data", "fetch", "CIFAR10", "penguins"]) == 1
    message = capsys.readouterr().err
    assert "CIFAR10 is not available" in message
    assert f"{damaged} is damaged" in message
    assert "Traceback" not in message


def test_a_data_folder_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setenv("FWDLIB_DATA", "/not/there")
    assert cli.main(["data"]) == 1
    assert "/not/there" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(data, "available", lambda: {}[0])
    with pytest.raises(KeyError):
        cli.main(["data"])


def test_a_missing_package_points_to_the_doctor(monkeypatch, capsys):
    monkeypatch.setattr(data, "available", lambda: __import__("no_such_package"))
    assert cli.main(["data"]) == 1
    assert "no_such_package" in (message := capsys.readouterr().err)
    assert "doctor" in message


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch, tmp_path) -> list[dict]:
    """A benchmark that measures nothing, in a checkout of its own; what it was asked for."""
    from fwdlib import benchmark

    asked = []
    monkeypatch.setattr(
        benchmark, "run", lambda **options: asked.append(options) or {"load": 0, "models": {}, "depth": {}}
    )
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fwdlib"\n')
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "bench-cpu.json"),
        (["--quick"], "bench-cpu-quick.json"),
        (["--no-depth"], "bench-cpu-partial.json"),
        (["--models", "mnist-mlp", "--quick"], "bench-cpu-partial-quick.json"),
        (["--batch", "4096"], "bench-cpu-batch4096.json"),
    ],
)
def test_bench_writes_less_than_all_to_another_file(words, name, bench, tmp_path):
    assert cli.main(["bench", *words]) == 0
    assert [path.name for path in (tmp_path / "report" / "results").iterdir()] == [name]


def test_bench_passes_its_options_on(bench, tmp_path):
    words = ["--models", "mnist-mlp", "paper-cnn", "--no-memory", "--device", "cuda", "--batch", "64", "--quick"]
    assert cli.main(["bench", *words, "--out", str(tmp_path / "x.json")]) == 0
    (options,) = bench
    assert options == {
        "device": "cuda",
        "models": ("mnist-mlp", "paper-cnn"),
        "batch": 64,
        "memory": False,
        "depth": True,
        "quick": True,
    }
    assert (tmp_path / "x.json").is_file()


def test_bench_of_an_unknown_model_lists_the_known(capsys):
    from fwdlib.contenders import MODELS

    assert cli.main(["bench", "--models", "mnist"]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in ("'mnist'", *MODELS))
    assert "Traceback" not in message


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_in_a_process_of_its_own(tmp_path):
    env = os.environ | {"FWDLIB_DATA": str(tmp_path), "FWDLIB_QUICK": "1"}
    # No network in that process either, wherever this test runs.
    env |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    ended = subprocess.run(
        [sys.executable, "-m", "fwdlib", "doctor"], capture_output=True, text=True, env=env, check=False
    )
    assert ended.stderr == ""
    for expected in ("torch ", "forward-mode AD on cpu", "SUBSTITUTE digits", "kernel python3", "FWDLIB_QUICK is set"):
        assert expected in ended.stdout
    assert ended.stdout.endswith("\nNo problem found.\n")
    assert ended.returncode == 0


def test_module_runs_and_errors_come_without_traceback():
    ended = run("-m", "fwdlib", "data", "fetch", "CIFAR11")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "CIFAR100" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_doctor_counts_problems_and_exits_1(damaged, capsys):
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"problem  penguins: DAMAGED: {damaged}" in printed
    assert printed.endswith("\n1 problem found.\n")


def test_doctor_finds_an_unwritable_results_folder(monkeypatch, tmp_path):
    in_the_way = tmp_path / "results"
    in_the_way.write_text("a file")
    monkeypatch.setenv("FWDLIB_RESULTS", str(in_the_way))
    (problem,) = problems(cli._check_results)
    assert str(in_the_way) in problem.text
    assert "FWDLIB_RESULTS" in problem.text
    assert in_the_way.read_text() == "a file"


def test_doctor_leaves_no_trace(tmp_path):
    assert [finding.status for finding in findings(cli._check_results)] == ["ok"]
    assert not (tmp_path / "new").exists()


def test_doctor_finds_missing_and_old_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    old, missing = sorted(problems(cli._check_packages), key=lambda finding: "scipy" in finding.text)
    assert "torch 2.10.1" in old.text
    assert '"torch>=' in old.advice
    assert missing.text == "scipy is not installed"
    assert "pip install" in missing.advice


def test_doctor_finds_a_package_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (problem,) = problems(cli._check_imports)
    assert "torchvision" in problem.text
    assert problem.advice


def test_doctor_finds_wrong_derivatives(monkeypatch):
    real = torch.func.jvp
    monkeypatch.setattr(torch.func, "jvp", lambda *arguments: [1.01 * value for value in real(*arguments)])
    assert "forward-mode AD on cpu" in problems(cli._check_torch)[0].text


def test_doctor_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    cli._jvp_error(torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_doctor_finds_the_kernel_of_another_python(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = ["/opt/other/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Other", "language": "python"}))
    (problem,) = problems(cli._check_jupyter)
    assert "/opt/other/bin/python" in problem.text
    assert sys.executable in problem.advice


def test_doctor_finds_that_jupyter_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "jupyter_client.kernelspec", None)
    assert "pip install" in problems(cli._check_jupyter)[0].advice


def test_doctor_survives_a_check_that_breaks(monkeypatch, capsys):
    def broken():
        raise RuntimeError("torn")
        yield

    monkeypatch.setattr(cli, "CHECKS", {"Broken": broken, "Mode": cli._check_mode})
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: torn" in printed
    assert "FWDLIB_QUICK is not set" in printed
