"""Writes what a run of the zoo has found into the page of the site: `python -m tests.zoo.table build/zoo`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from fwdlib.estimators import ENGINES

PAGE = Path(__file__).parents[2] / "report" / "site" / "zoo.md"
PACKAGES = "torch", "torchvision", "timm", "transformers", "peft", "torchdiffeq"
MOST_REFUSED = 0.05
INTRODUCTION = """\
# The zoo: which models work

`make test-zoo` holds {num_models} models and {num_losses} losses against backprop, with random weights and in float64.
For each, in training and in evaluation mode, it checks:

- the derivatives along one and along three given tangents, and the gradient made from them, against `loss.backward()`
  to nine digits, for `engine="torch"`, `engine="stacked"` and the default, `engine="auto"`;
- that rank-one tangents are the ones they claim to be, and that per-example and activity tangents are unbiased (the
  latter in training mode, for models below half a million parameters);
- that the model is left as it was, and its buffers as one ordinary forward pass leaves them.

An engine is *right*, or it *refuses* with a reason. A wrong number fails the run, and so do more than {most:.0%} of
refusals by the default engine. The default takes PyTorch's engine where the stacked one refuses, so a model that only
the latter refuses works without a setting. The time is that of one estimate with the defaults over that of
`loss.backward()` with its forward pass, in training mode, on one thread of a CPU; in models as small as these, overhead
counts more than arithmetic.

Packages: {packages}."""


def read(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def modes_of(row: dict) -> list[dict[str, str]]:
    return [mode for mode in (row["training"], row.get("evaluation")) if mode]


def word_of(row: dict, engine: str) -> str:
    words = {mode[engine].partition(":")[0] for mode in modes_of(row)}
    return words.pop() if len(words) == 1 else "refused in one mode"


def is_refused(row: dict) -> bool:
    return any(mode["auto"] != "right" for mode in modes_of(row))


def table_of(rows: list[dict]) -> str:
    lines = ["| model | parameters | auto | stacked | torch | time |", "|---|---:|---|---|---|---:|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}"
        words = " | ".join(word_of(row, engine) for engine in ENGINES)
        lines.append(f"| {row['name']} | {row['num_params']:,} | {words} | {ratio} |")
    return "\n".join(lines)


def refusals_of(rows: list[dict]) -> str:
    # Each message once, with the engines and the models that it stands for.
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for engine in ENGINES:
            for mode in modes_of(row):
                if mode[engine] != "right":
                    names = found.setdefault((engine, mode[engine].removeprefix("refused: ")), [])
                    if row["name"] not in names:
                        names.append(row["name"])
    lines = [f"- `{engine}`, {', '.join(names)}:\n\n  > {words}" for (engine, words), names in found.items()]
    return "\n".join(lines).replace("{", "(").replace("}", ")") or "Nothing."


def page_of(models: list[dict], losses: list[dict]) -> str:
    refused = sum(map(is_refused, models))
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        INTRODUCTION.format(num_models=len(models), num_losses=len(losses), most=MOST_REFUSED, packages=packages),
        f"The default is right on {len(models) - refused} of {len(models)} models, and refuses {refused}.",
    ]
    for family in dict.fromkeys(row["family"] for row in models):
        parts.append(f"## {family.capitalize()}\n\n{table_of([row for row in models if row['family'] == family])}")
    right = [row["name"] for row in losses if all(row["training"][engine] == "right" for engine in ENGINES)]
    parts.append(f"## Losses\n\nRight with every engine, {len(right)} of {len(losses)}: {'; '.join(right)}.")
    parts.append(f"## What is refused, and with which words\n\n{refusals_of(models + losses)}")
    return "\n\n".join(parts) + "\n"


def main(folder: Path) -> None:
    models, losses = read(folder / "models"), read(folder / "losses")
    PAGE.write_text(page_of(models, losses), encoding="utf-8")
    refused = [row["name"] for row in models if is_refused(row)]
    if len(refused) > MOST_REFUSED * len(models):
        raise SystemExit(f"refused more than {MOST_REFUSED:.0%} of {len(models)} models: {', '.join(refused)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
