"""What the README promises: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from fwdlib.estimators import backprop_gradient
from fwdlib.training import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block_with(text):
    (block,) = [block for block in blocks("python") if text in block]
    return compile(block, "README.md", "exec")


def test_the_training_loop_runs_and_learns():
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(block_with("forward_grad_"), names)
        exec(block_with("assign_gradients"), names)
    before = torch.log(torch.tensor(3.0))  # the loss of guessing
    assert names["loss"] < before + 0.1
    assert names["estimate"].jvps.shape == (4,)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_the_fast_step_goes_on_from_there(capsys):
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(block_with("forward_grad_"), names)
        exec(block_with("SGDStep"), names)
    assert names["loss"].isfinite()
    assert "torch.nn.functional.linear" in capsys.readouterr().out


def test_the_data_set_of_the_readme_trains():
    names = {"torch": torch}
    exec(block_with("Dataset"), names)
    history = train(
        lambda: torch.nn.Linear(4, 2), names["data"], backprop_gradient, learning_rate=0.1, max_iterations=3
    )
    assert history.runs[0].status == "completed"
    assert history.num_test == 20


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"report", "test", "lab", "lint", "clean", "wheel"} <= named <= targets


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert set(phony) == set(re.findall(r"^  make ([a-z-]+)", listed, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_papermill_example_names_parameters_that_exist():
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if "papermill" in line]
    notebook = (ROOT / command.split()[1]).read_text()
    for name in re.findall(r"-p (\w+)", command):
        assert f"{name} = " in notebook
