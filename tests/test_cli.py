"""The command line: forms, exit codes, what the doctor finds, and that expected errors come without a traceback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from fwdlib import archives, cli, data, runtime
from fwdlib.locks import LOCK
from tests.same import assert_same_training

pytestmark = pytest.mark.usefixtures("bare_account")


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


SHOWN = {
    "--help": ("doctor", "data", "train", "bench", "run"),
    "data": ("list", "fetch"),
    "train": (
        *("--dataset {MNIST,FashionMNIST,CIFAR10,CIFAR100,KMNIST,CIFAR10-jpeg,digits}", "--n-layers", "--conv"),
        *(
            "--norm {batch,layer,group,none}",
            *("--mixer", "--train-mode", "FG-RANK1", "LG-FG-A", "FG-GUIDED"),
        ),
        *("--num-tangents", "--num-groups", "--grid", "--b-lr", "--feedback-decay"),
        *(
            "--alpha",
            "--alpha-decay",
            "--weights {example,batch}",
            "--epochs",
            "--batch-size",
            "--optimizer",
            "--lr",
            "--gamma",
            "--weight-decay",
        ),
        *("--seed", "--device", "--log-dir", "--resume", "--dry-run", "--test-batch-size", "--log-interval"),
    ),
    "run": (
        *("--notebook NAME [NAME ...]", "--set PARAMETER=VALUE,...", "--seeds N", "--batches FILE", "--jobs N"),
        *("--to {csv,json,parquet}", "--output DIR", "--no-resume", "--timeout SECONDS", "--dry-run"),
    ),
    "bench": ("--quick", "--device", "--models", "--no-memory", "--no-sweeps", "--batch", "--out"),
}


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "doctor", "data", "data fetch", "train", "bench", "run"])
def test_help(command, capsys):
    words = [*command.split(), "--help"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m fwdlib")
    assert all(name in shown for name in SHOWN.get(words[0], ()))


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["run", "--help"]])
def test_help_does_not_wait_for_torch(words):
    slow = {"torch", "numpy", "pandas", "matplotlib", "sklearn", "papermill"}
    code = "import sys, fwdlib.cli\ntry: fwdlib.cli.main(sys.argv[1:])\nfinally: print(len(sys.modules), *sys.modules)"
    ended = run("-c", code, *words)
    loaded = ended.stdout.splitlines()[-1].split()
    assert int(loaded[0]) > 50  # it is the list of modules that we look at
    assert not slow & set(loaded)
    assert words != ["--help"] or not {"typeguard", "importlib.metadata"} & set(loaded)


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
    assert cli.main(["data", "fetch"]) == 1
    of_nothing = capsys.readouterr().err
    assert all(name in message and name in of_nothing for name in data.FETCHABLE)


def test_fetch_goes_on_after_one_that_cannot_be_had_and_names_damage(damaged, capsys):
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


# --- train -----------------------------------------------------------------------------------------------------------

TINY = ["train", "--dataset", "digits", "--n-layers", "1", "--epochs", "2", "--batch-size", "256", "--lr", "1e-3"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the default log folder of TINY is."""
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: True)  # it would last for all tests to come
    return tmp_path / "new" / "results" / "train" / "digits-FDFA-1x800-seed0"


def failing(words, capsys) -> str:
    """Run what must fail with code 1 and one line; return the line."""
    assert cli.main(words) == 1
    message = capsys.readouterr().err.split("\r")[-1].strip()
    assert "Traceback" not in message
    assert message.startswith("python -m fwdlib: ")
    assert "\n" not in message
    return message


def test_train_ends_with_the_accuracy_and_where_the_files_are(folder, capsys):
    assert cli.main(TINY) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((folder / "record.json").read_text())["epochs"][-1]["test_accuracy"]
    assert printed == f"test accuracy {100 * accuracy:.2f} % after epoch 2; files in {folder}\n"
    assert accuracy > 0.5
    names = {LOCK, "checkpoint.pt", "curves.png", "curves.svg", "log.csv", "record.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_train_passes_its_options_on(folder, monkeypatch, tmp_path):
    from fwdlib.trainer import experiment

    asked = []
    record = {"epochs": [{"epoch": 7, "test_accuracy": 0.5}]}
    monkeypatch.setattr(experiment, "run", lambda settings: asked.append(settings) or record)
    words = ["--dataset", "KMNIST", "--n-layers", "3", "--conv", "--train-mode", "FG-CV", "--num-tangents", "4"]
    words += ["--b-lr", "1e-2", "--feedback-decay", "1e-6", "--alpha", "0.5", "--alpha-decay", "0.9", "--epochs", "7"]
    words += ["--batch-size", "32", "--optimizer", "SGD", "--lr", "0.1", "--gamma", "0.8", "--weight-decay", "1e-5"]
    words += ["--norm", "group", "--mixer", "M/8/16", "--num-groups", "8", "--grid", "2", "--weights", "batch"]
    words += ["--seed", "5", "--device", "cpu", "--log-dir", str(tmp_path / "logs"), "--resume"]
    assert cli.main(["train", *words, "--test-batch-size", "500", "--log-interval", "10"]) == 0
    assert cli.main(["train"]) == 0
    given, defaults = (vars(settings) for settings in asked)
    assert given == {
        **{"dataset": "KMNIST", "n_layers": 3, "conv": True, "train_mode": "FG-CV", "num_tangents": 4, "b_lr": 1e-2},
        **{"feedback_decay": 1e-6, "alpha": 0.5, "alpha_decay": 0.9, "epochs": 7, "batch_size": 32},
        **{"optimizer": "SGD", "lr": 0.1, "gamma": 0.8, "weight_decay": 1e-5, "seed": 5, "device": "cpu"},
        **{"log_dir": tmp_path / "logs", "resume": True, "dry_run": False, "test_batch_size": 500, "log_interval": 10},
        **{"norm": "group", "mixer": "M/8/16", "num_groups": 8, "grid": 2, "weights": "batch", "processes": 1},
    }
    published = {"batch_size": 64, "test_batch_size": 1000, "epochs": 100, "lr": 1e-4, "b_lr": 1e-4, "gamma": 0.95}
    published |= {"weight_decay": 0, "feedback_decay": 0, "log_interval": 100, "train_mode": "FDFA", "n_layers": 2}
    assert published.items() <= defaults.items()


def test_a_dry_run_takes_a_step_and_writes_nothing(folder, capsys, tmp_path):
    assert cli.main([*TINY, "--dry-run", "--test-batch-size", "50"]) == 0
    assert re.fullmatch(
        r"It works: one step, test accuracy [\d.]+ % of 50 images\. Nothing was written\.\n", capsys.readouterr().out
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"])
def test_a_missing_data_set_is_named_with_what_fetches_it_and_has_no_substitute(name, folder, capsys, tmp_path):
    message = failing(["train", "--dataset", name], capsys)
    assert f"{name} is not available" in message
    assert f"Looked in {tmp_path / 'cache'}" in message
    assert f"`python -m fwdlib data fetch {name}`" in message
    assert not folder.parent.exists()


def test_an_earlier_run_is_not_overwritten(folder, capsys):
    assert cli.main([*TINY, "--epochs", "1"]) == 0
    before = (folder / "checkpoint.pt").read_bytes()
    message = failing(TINY, capsys)
    assert "is there from an earlier run" in message
    assert "add --resume" in message
    assert "--log-dir" in message
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--train-mode", "BP"], "train_mode is 'FDFA' there, 'BP' here"),
        (["--n-layers", "2"], "the shape of "),
        (["--lr", "1e-2"], "the optimizer's lr is 0.001 there, 0.01 here"),
        (["--b-lr", "1e-2"], "b_lr is 0.0001 there, 0.01 here"),
    ],
)
def test_a_checkpoint_of_a_different_run(words, difference, folder, capsys):
    assert cli.main([*TINY, "--epochs", "1", "--log-dir", str(folder)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = failing([*TINY, "--log-dir", str(folder), "--resume", *words], capsys)
    assert "belongs to a different run: " in message
    assert difference in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_learning_rate_that_diverges(folder, capsys):
    assert cli.main([*TINY, "--train-mode", "BP", "--optimizer", "SGD", "--lr", "1e38"]) == 1
    message = capsys.readouterr().err.split("\r")[-1].strip()
    folder = folder.with_name("digits-BP-1x800-seed0")
    assert re.search(r"the training diverged: its loss was (nan|inf) after \d steps, in epoch 1", message)
    assert f"Try a lower --lr than 1e+38; the checkpoint of epoch 0 in {folder} is intact" in message
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert json.loads((folder / "record.json").read_text())["status"] == "diverged"


def test_control_c_says_how_to_go_on(folder, capsys, monkeypatch):
    from fwdlib.trainer import experiment

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(experiment, "write_logs", interrupt)
        assert cli.main(TINY) == 130
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err
    assert cli.main([*TINY, "--resume"]) == 0
    assert "after epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0"], "lr must be a finite number above 0, got 0.0"),
        (["--batch-size", "1438"], "batch_size must be at most the 1437 training images, got 1438"),
        (["--device", "tpu"], "device must be one of 'cpu'"),
    ],
)
def test_values_out_of_their_range(words, message, folder, capsys):
    assert message in failing([*TINY, *words], capsys)


def test_a_killed_run_that_is_resumed_ends_with_the_same_weights(folder, tmp_path):
    words = [*TINY, "--epochs", "12"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests have; sums in another order differ in the last bits
    killed = subprocess.Popen([sys.executable, "-m", "fwdlib", *words], env=env, stderr=subprocess.DEVNULL)
    log, deadline = folder / "log.csv", time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 3 <= len(log.read_text().splitlines()) < 13
    assert cli.main([*words, "--resume"]) == 0
    assert cli.main([*words, "--log-dir", str(tmp_path / "whole")]) == 0
    assert len((folder / "log.csv").read_text().splitlines()) == 13
    assert_same_training(folder, tmp_path / "whole")
    assert [path.name for path in folder.glob(".*")] == [LOCK]


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch, tmp_path) -> list[dict]:
    """A benchmark that measures nothing, in a checkout of its own; what it was asked for."""
    from fwdlib.bench import benchmark

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
        (["--no-sweeps"], "bench-cpu-partial.json"),
        (["--models", "mnist-mlp", "--quick"], "bench-cpu-partial-quick.json"),
        (["--batch", "4096"], "bench-cpu-batch4096.json"),
        (["--device", "cuda:1"], "bench-cuda.json"),
    ],
)
def test_bench_writes_less_than_all_to_another_file(words, name, bench, tmp_path):
    assert cli.main(["bench", *words]) == 0
    assert [path.name for path in (tmp_path / "build").iterdir()] == [name]


def test_bench_passes_its_options_on(bench, tmp_path):
    words = ["--models", "mnist-mlp", "paper-cnn", "--no-memory", "--device", "cuda", "--batch", "64", "--quick"]
    words += ["--threads", "1", "--peers"]
    assert cli.main(["bench", *words, "--out", str(tmp_path / "x.json")]) == 0
    (options,) = bench
    assert options == {
        "device": "cuda",
        "models": ("mnist-mlp", "paper-cnn"),
        "batch": 64,
        "memory": False,
        "sweeps": True,
        "quick": True,
        "peers": True,
        "threads": 1,
    }
    assert (tmp_path / "x.json").is_file()


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_in_a_process_of_its_own(tmp_path):
    env = os.environ | {"FWDLIB_DATA": str(tmp_path), "FWDLIB_QUICK": "1"}
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or the kernel of ipykernel 6.29 prints a remark on its debugger
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
