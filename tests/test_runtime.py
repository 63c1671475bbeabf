"""Paths from every folder a notebook may run in, streams of random numbers that never meet, flags read back."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest
import torch

from fwdlib import runtime

REPOSITORY = Path(__file__).resolve().parents[1]
NUM = 4000


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("FWDLIB_RESULTS", "FWDLIB_DATA", "FWDLIB_CACHE", "FWDLIB_QUICK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {torch.device(device).index}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# paths


@pytest.mark.parametrize("folder", [REPOSITORY, REPOSITORY / "notebooks", REPOSITORY / "tests"], ids=lambda f: f.name)
def test_project_root_is_found_from_inside_the_checkout(monkeypatch, folder):
    monkeypatch.chdir(folder)
    assert runtime.project_root() == REPOSITORY
    assert runtime.results_dir() == REPOSITORY / "results"
    monkeypatch.chdir("/")
    assert runtime.project_root(folder) == REPOSITORY


def test_outside_a_checkout_there_is_no_project_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert runtime.project_root() is None
    assert runtime.results_dir() == tmp_path / "results"


def test_project_root_is_the_copy_one_stands_in_not_where_fwdlib_is_installed(monkeypatch, tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert runtime.project_root() == tmp_path
    assert runtime.results_dir() == tmp_path / "results"


@pytest.mark.parametrize("config", ["[project]\nname = 'other'\n", "[tool.ruff]\n"])
def test_other_projects_are_passed_over(tmp_path, config):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pyproject.toml").write_text(config)
    assert runtime.project_root(tmp_path / "other") == tmp_path


def test_fwdlib_results_comes_first_and_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FWDLIB_RESULTS", "here")
    assert runtime.results_dir() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FWDLIB_RESULTS", "~/there")
    assert runtime.results_dir() == tmp_path / "home/there"
    assert list(tmp_path.iterdir()) == []  # asking makes no folder


@pytest.mark.parametrize("value", [None, ""])
def test_data_dir_is_none_when_it_is_not_set(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("FWDLIB_DATA", value)
    assert runtime.data_dir() is None


def test_data_dir_is_the_folder_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("FWDLIB_DATA", "data")
    assert runtime.data_dir() == tmp_path / "data"


def test_data_dir_says_what_is_wrong_and_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        monkeypatch.setenv("FWDLIB_DATA", str(wrong))
        with pytest.raises(FileNotFoundError, match="is not a folder") as error:
            runtime.data_dir()
        assert all(part in str(error.value) for part in (str(wrong), "KMNIST/raw", "unset FWDLIB_DATA"))


def test_cache_dir_is_the_platform_s_unless_named(monkeypatch, tmp_path):
    assert runtime.cache_dir() == Path(platformdirs.user_cache_dir("fwdlib"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FWDLIB_CACHE", "cache")
    assert runtime.cache_dir() == tmp_path / "cache"
    assert not (tmp_path / "cache").exists()


# seeds and streams


def test_seed_list_counts_up_from_the_seed():
    assert runtime.seed_list(3, 4) == [3, 4, 5, 6]
    assert runtime.seed_list(0, 1) == [0]


@pytest.mark.parametrize(
    ("seed", "num_seeds", "message"),
    [
        (-1, 3, "seed must be a whole number of at least 0, got -1"),
        (0.5, 3, "seed must be a whole number of at least 0, got 0.5"),
        (2**32, 3, "seed must be at most 4294967295, got 4294967296"),
        (2**32 - 1, 2, "seed must be at most 4294967295, got 4294967296"),
        (0, 0, "num_seeds must be a whole number of at least 1, got 0"),
        (0, "3", "num_seeds must be a whole number of at least 1, got '3'"),
    ],
)
def test_seed_list_refuses(seed, num_seeds, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        runtime.seed_list(seed, num_seeds)


def draws(source):
    return torch.rand(NUM, generator=source, dtype=torch.float64)


def are_independent(first, second):
    # No number occurs in both, at whatever position; and at equal positions they are uncorrelated, within 5 sigma.
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    return not set(first.tolist()) & set(second.tolist()) and abs(correlation) < 5 / NUM**0.5


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_streams_are_reproducible_and_independent(seed):
    tangents = draws(runtime.generator(seed))
    assert torch.equal(tangents, draws(runtime.generator(seed, purpose="tangents")))
    assert are_independent(tangents, draws(torch.Generator().manual_seed(seed)))  # the initial parameters
    assert are_independent(tangents, draws(runtime.generator(seed, purpose="data")))
    assert are_independent(tangents, draws(runtime.generator(seed + 1)))


def test_the_check_of_independence_sees_a_shifted_copy():
    stream = draws(torch.Generator().manual_seed(0))
    assert not are_independent(stream, stream.roll(1))


def test_a_generator_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    draws(runtime.generator(7))
    assert torch.equal(torch.random.get_rng_state(), before)


# devices and determinism


def test_resolve_device_accepts_names_and_devices(two_gpus):
    for name in ("cpu", "cuda", "cuda:1"):
        assert runtime.resolve_device(name) == runtime.resolve_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "mps", ""])
def test_resolve_device_lists_what_there_is(two_gpus, name):
    with pytest.raises(ValueError, match="device must be one of 'cpu', 'cuda', 'cuda:0', 'cuda:1', got ") as error:
        runtime.resolve_device(name)
    assert repr(name) in str(error.value)


def test_resolve_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device must be one of 'cpu', got 'cuda'$"):
        runtime.resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.resolve_device("mps").type == "mps"


def test_the_flags_of_use_determinism_are_read_back():
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = False, True
        runtime.use_determinism()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert cudnn.deterministic is True
        assert cudnn.benchmark is False
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags


FAULTS = """
import resource, sys, torch
from fwdlib import runtime
if sys.argv[1] == "keep":
    assert runtime.keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): return [torch.ones(2**24) for _ in range(3)]
for _ in range(12):  # until the freed pieces of the heap lie side by side: up to five, by its random place
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_kept_memory_is_used_again_without_a_page_fault():
    def page_faults(how):
        ran = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    pages = 4 * 3 * 2**24 * 4 // 4096
    assert page_faults("return") > pages / 1024  # the largest pages that a system gives out by itself have 2 MiB
    assert page_faults("keep") < pages / 1024


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_another_system_is_left_alone(monkeypatch, error):
    def no_library(name):
        raise error

    monkeypatch.setattr(runtime.ctypes, "CDLL", no_library)
    assert runtime.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())
    assert runtime.keep_freed_memory() is False


# what is printed and recorded


@pytest.mark.parametrize(("value", "quick"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_is_quick(monkeypatch, value, quick):
    if value is not None:
        monkeypatch.setenv("FWDLIB_QUICK", value)
    assert runtime.is_quick() is quick


def test_versions_names_every_package_and_those_that_are_missing(monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGES", ("torch", "no-such-package-as-this"))
    found = runtime.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["no-such-package-as-this"] == "not installed"
    assert list(found) == ["python", "torch", "no-such-package-as-this"]


def test_summary_shows_versions_device_threads_and_seeds(monkeypatch):
    packages = runtime.summary([4, 5, 6]).rpartition("\n")[0]
    assert packages.replace("\n", " ") == ", ".join(f"{name} {version}" for name, version in runtime.versions().items())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert runtime.summary([4, 5, 6]).endswith("\ncpu, 2 threads; seeds 4 to 6")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert runtime.summary([4, 5, 6]).endswith("\ncpu, 1 thread; seeds 4 to 6")
    assert runtime.summary([4]).endswith("; seed 4")
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    assert "quick mode" in runtime.summary([4])
    with pytest.raises(ValueError, match="device must be one of"):
        runtime.summary([4], "tpu")


def test_environment_can_be_saved_and_names_the_machine(two_gpus):
    found = runtime.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"] == runtime.versions()
    assert (found["device"], found["threads"], found["in_colab"]) == ("cpu", torch.get_num_threads(), False)
    assert found["processor"]
    assert runtime.environment("cuda:1")["device"] == "GPU 1"
