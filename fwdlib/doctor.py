"""``python -m fwdlib doctor``: why a notebook does not run, and what to do about it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fwdlib.atomic import message_of

if TYPE_CHECKING:
    import torch

# Imports go inside the checks: help must be quick, and an import that fails is a finding.
PROG = "python -m fwdlib"


class Finding(NamedTuple):
    """One line of the doctor's report."""

    status: str  # "ok", "note" (works, but perhaps not as expected) or "problem"
    text: str
    advice: str = ""


@dataclass
class Doctor:
    """Find out why a notebook does not run: check packages, torch, data, folders and Jupyter, and say what to do.

    This needs no network and changes nothing. The exit code is 1 if there is a problem.
    """

    def run(self) -> int:
        """Print the findings as they come, then the number of problems."""
        problems = 0
        for title, check in CHECKS.items():
            print(title)
            for status, text, advice in _findings(check):
                problems += status == "problem"
                print(f"  {status:<9}{text}", *([f"{'':<9}-> {advice}"] if advice else []), sep="\n  ", flush=True)
        print(f"\n{problems} problem{'s'[: problems != 1]} found." if problems else "\nNo problem found.")
        return int(problems > 0)


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. A check that raises an error becomes a finding, and the others still run."""
    try:
        yield from check()
    except OSError as error:
        yield Finding("problem", message_of(error))
    except Exception as error:  # a damaged installation can raise anything
        yield Finding("problem", f"{type(error).__name__}: {message_of(error)}")


def _check_packages() -> Iterator[Finding]:
    import platform
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    about = metadata.metadata("fwdlib")  # raises PackageNotFoundError, which names fwdlib
    python, needed = platform.python_version(), about["Requires-Python"] or ""
    status = "ok" if SpecifierSet(needed).contains(python, prereleases=True) else "problem"
    yield Finding(status, f"Python {python} (needed {needed}) at {sys.executable}")
    yield Finding("ok", f"fwdlib {about['Version']} at {Path(__file__).parent}")
    for requirement in map(Requirement, metadata.requires("fwdlib") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f'{sys.executable} -m pip install --upgrade "{requirement.name}{requirement.specifier}"'
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", f"{requirement.name} is not installed", install)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        text = f"{requirement.name} {found} (needed {requirement.specifier})"
        yield Finding("ok", text) if fits else Finding("problem", text, install)


def _check_imports() -> Iterator[Finding]:
    imported = []
    for name in IMPORTS:
        try:
            importlib.import_module(name)
            imported.append(name)
        except Exception as error:  # a torchvision built for another torch raises RuntimeError, a lost library OSError
            advice = "install torch and torchvision together, from the same index" if name.startswith("torch") else ""
            yield Finding("problem", f"import {name}: {type(error).__name__}: {error}", advice)
    yield Finding("ok", f"imported {', '.join(imported) or 'nothing'}")


def _check_torch() -> Iterator[Finding]:
    import torch

    yield Finding("ok", f"torch {torch.__version__}: {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    devices = [torch.device("cpu")]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append(torch.device("cuda", number))
        yield Finding("ok", f'device "cuda:{number}": {torch.cuda.get_device_name(number)}')
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    if len(devices) == 1:
        yield Finding("ok", 'the only device is "cpu", which the course is made for')
    for device in devices:
        error = _jvp_error(device)
        text = f"forward-mode AD on {device}: the jvp of a small net differs from backprop's by {error:.0e}"
        if error < 1e-4:
            yield Finding("ok", text)
        else:
            yield Finding("problem", text, 'set device = "cpu" in the notebook, or install another version of torch')


def _jvp_error(device: torch.device) -> float:
    """Return the relative difference between a directional derivative by forward mode and by backprop."""
    import torch

    from fwdlib.estimators import backprop_gradient
    from fwdlib.objectives import BatchLoss, params_of

    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(device)
    inputs, targets = torch.randn(16, 4, generator=draw).to(device), (torch.arange(16) % 3).to(device)
    objective, params = BatchLoss(net, inputs, targets), params_of(net)
    v = {name: torch.randn(p.shape, generator=draw).to(device) for name, p in params.items()}
    forward = torch.func.jvp(objective, (params,), (v,))[1].item()
    terms = [(grad, v[name]) for name, grad in backprop_gradient(objective, params).grads.items()]
    backward = sum((grad * tangent).sum().item() for grad, tangent in terms)
    return abs(forward - backward) / sum((grad * tangent).abs().sum().item() for grad, tangent in terms)


def _check_data() -> Iterator[Finding]:
    from fwdlib import data, runtime

    folder, cache = runtime.data_dir(), runtime.cache_dir()
    yield Finding("ok", f"FWDLIB_DATA is {folder}" if folder else "FWDLIB_DATA is not set")
    yield Finding("ok", f"cache folder {cache}{'' if cache.is_dir() else ' (made when first needed)'}")
    lacking = []
    for name, place in data.available().items():
        short = place.partition(", because ")[0]
        if place.startswith("DAMAGED"):
            yield Finding("problem", f"{name}: {place}")
        elif short.startswith(("SUBSTITUTE", "nowhere")):
            lacking.append((name, short))
        else:
            yield Finding("ok", f"{name}: {short}")
    for name, short in lacking:
        last = name == lacking[-1][0]
        yield Finding("note", f"{name}: {short}", f"`{PROG} data` says why and how to get them" if last else "")


def _check_results() -> Iterator[Finding]:
    from fwdlib import results, runtime

    folder = runtime.results_dir()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".doctor-{os.getpid()}"
    try:
        results.write_text(probe, "written by the doctor, which removes it again\n")
        probe.unlink()
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    yield Finding("ok", f"run records can be written to {folder}")


def _check_jupyter() -> Iterator[Finding]:
    from importlib.util import find_spec

    install = f"{sys.executable} -m pip install jupyter"
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError as error:
        yield Finding("problem", f"Jupyter is not installed here: {error}", install)
        return
    try:
        kernel = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        yield Finding("problem", "Jupyter has no kernel python3, which all notebooks ask for", install)
        return
    program, python = Path(kernel.argv[0]), Path(sys.executable)
    if program.is_absolute() and program.parent != python.parent:  # a bare name means Jupyter's own Python
        # Jupyter looks first in the environment's folder, or in the user's outside an environment.
        place = "--user" if sys.prefix == sys.base_prefix else "--sys-prefix"
        advice = f"{python} -m ipykernel install {place}"
        yield Finding("problem", f"the kernel python3 runs {program}, not this Python ({python})", advice)
    else:
        yield Finding("ok", f"Jupyter's kernel python3 at {kernel.resource_dir}")
    for name, use in {"papermill": "run", "psutil": "run", "distributed": "run --scheduler"}.items():
        if find_spec(name) is None:
            yield Finding("note", f"`{PROG} {use}` needs {name}", f"{sys.executable} -m pip install {name}")


def _check_mode() -> Iterator[Finding]:
    from fwdlib import runtime

    if runtime.is_quick():
        yield Finding("note", "FWDLIB_QUICK is set: runs are too short for results", "unset FWDLIB_QUICK for real ones")
    else:
        yield Finding("ok", "FWDLIB_QUICK is not set: full runs")


NEEDED = ("data", "estimators", "plotting", "results", "training")
IMPORTS = ("torch", "torchvision", *(f"fwdlib.{module}" for module in NEEDED))
CHECKS = {
    "Packages": _check_packages,
    "Imports": _check_imports,
    "Torch": _check_torch,
    "Data": _check_data,
    "Results": _check_results,
    "Jupyter": _check_jupyter,
    "Mode": _check_mode,
}
