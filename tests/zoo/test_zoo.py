"""The zoo: every engine is right on every model and loss, or refuses it in words that help.

`make test-zoo` runs it, and writes the page of the site. It needs the extra ``zoo``; other commands leave it out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fwdlib.estimators import forward_grad_
from tests.zoo import language, losses, mechanisms, science, sequence, timm_models, vision
from tests.zoo.case import Builder, seed_all
from tests.zoo.checks import Reference, ratio_of_times, verdicts

pytestmark = pytest.mark.filterwarnings("ignore")  # what other packages warn of is not ours to mend

FAMILIES: dict[str, dict[str, Builder]] = {
    "torchvision": vision.MODELS,
    "timm": timm_models.MODELS,
    "transformers and peft": language.MODELS,
    "sequences": sequence.MODELS,
    "mechanisms": mechanisms.MODELS,
    "science": science.MODELS,
}
CASES = [(family, name) for family, models in FAMILIES.items() for name in models]
TRAINED = {
    "GPT-2": language.MODELS["GPT-2"],
    "Llama": language.MODELS["Llama"],
    "BERT": language.MODELS["BERT"],
    "ViT": vision.MODELS["ViT"],
}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def write_row(kind: str, row: dict) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", f"{row['family']} {row['name']}".lower())
    path = Path(os.environ["FWDLIB_ZOO"], kind, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row), encoding="utf-8")


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_model_is_right_or_refused(family, name):
    build = FAMILIES[family][name]
    row: dict = {"family": family, "name": name, "training": verdicts(build, training=True)}
    reference = Reference(build, training=True)
    row["evaluation"] = verdicts(build, training=False) if reference.case.has_eval else None
    row["num_params"] = sum(g.numel() for g in reference.grads.values())
    row["ratio"] = ratio_of_times(reference) if row["training"]["auto"] == "right" else None
    write_row("models", row)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_is_right_or_refused(name):
    found = verdicts(lambda: losses.case_of(losses.LOSSES[name]), training=True)
    write_row("losses", {"family": "losses", "name": name, "training": found})


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_of_training_as_the_readme_has_it(name):
    torch.set_default_dtype(torch.float32)
    seed_all(0)
    case = TRAINED[name]()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-4)
    draw = torch.Generator().manual_seed(0)
    case.model.train()
    found = []
    for _ in range(20):
        found.append(forward_grad_(case.model, lambda: case.loss(case.model), num_tangents=4, generator=draw).item())
        optimizer.step()
    case.model.eval()
    with torch.no_grad():
        after = case.loss(case.model).item()
    seed_all(0)
    fresh = TRAINED[name]()
    fresh.model.eval()
    with torch.no_grad():
        before = fresh.loss(fresh.model).item()
    assert after < before, f"{before} before, {after} after; {found}"
