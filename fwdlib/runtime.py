"""Seeds, devices, paths and environment variables: no other module touches them. It imports only ``checks``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import platformdirs

from fwdlib.checks import check_choice, check_count, check_inserted, check_seed

# torch takes seconds to import, and drawing figures or printing help does without it.
if TYPE_CHECKING:
    import torch

# torch builds its table of forward-mode decompositions with its own deprecated torch.jit.script. Users cannot change
# that.
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)

PACKAGES = ("fwdlib", "torch", "torchvision", "numpy", "scikit-learn", "scipy", "pandas", "matplotlib")


def is_quick() -> bool:
    """Tell whether ``FWDLIB_QUICK`` asks for a short run, which only shows that everything executes."""
    return os.environ.get("FWDLIB_QUICK", "") not in ("", "0")


def is_offline() -> bool:
    """Tell whether ``FWDLIB_OFFLINE`` says that there is no network, so that nothing waits for one."""
    return os.environ.get("FWDLIB_OFFLINE", "") not in ("", "0")


def seed_list(seed: int, num_seeds: int) -> list[int]:
    """Return the ``num_seeds`` consecutive seeds that start at ``seed``.

    Raises:
        ValueError: if ``seed`` is negative, ``num_seeds`` is below 1, or the last seed is too large.
    """
    check_seed(seed)
    check_seed(seed + check_count("num_seeds", num_seeds) - 1)
    return list(range(seed, seed + num_seeds))


def generator(seed: int, device: torch.device | str = "cpu", purpose: str = "tangents") -> torch.Generator:
    """Return a new random generator on ``device`` for one purpose of one seed.

    Streams for different purposes are independent of each other, and of ``torch.manual_seed(seed)``, which draws the
    initial parameters. If all of them used the bare seed, a tangent would repeat the numbers of the initial parameters.

    Args:
        seed: of the run.
        device: where the numbers are drawn.
        purpose: any word that names the use.
    """
    import torch

    mixed = np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(mixed[0]) >> 1)


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn a device name such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` into a usable device.

    Raises:
        ValueError: if the name is unknown or this machine has no such device; the message lists its devices.
    """
    import torch

    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    return torch.device(check_choice("device", str(device), available))


def use_determinism() -> None:
    """Ask torch for deterministic kernels, so that one seed gives one result on one machine."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic, and torch warns
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> bool:
    """Ask the C library to keep the memory of freed tensors for new ones, instead of returning it to the system.

    For each large array, glibc takes fresh pages from the system and returns them at once, and the system clears each
    page first. This takes half the time of a training step of the course's CNN, and it varies with what else the
    process has allocated. With this setting, steps take the same time in each process. The setting holds for the whole
    process, whose memory then never shrinks below its peak. It does not affect accelerators, which have their own
    allocators.

    Returns:
        True if it was set, which is possible only on Linux with glibc.
    """
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows, where None names no library
        return False
    if not hasattr(libc, "gnu_get_libc_version"):  # another library's mallopt may take other options
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))


def has_compiler() -> bool:
    """Tell whether a C++ compiler is installed (``CXX``, g++, clang++ or cl); ``torch.compile`` needs one on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name)


def project_root(start: Path | None = None) -> Path | None:
    """Return the checkout that contains ``start`` (default: the working folder), or None outside a checkout.

    papermill runs a kernel in the caller's folder, Jupyter and nbval in the notebook's, Colab in /content. Every path
    of the project starts at this root, so all of them agree.
    """
    start = Path.cwd() if start is None else start
    for folder in (start, *start.parents):
        config = folder / "pyproject.toml"
        if config.is_file() and tomllib.loads(config.read_text()).get("project", {}).get("name") == "fwdlib":
            return folder
    return None


def results_dir() -> Path:
    """Return the folder for run records.

    It is ``FWDLIB_RESULTS`` if that is set, else ``results/`` in the checkout, else ``results/`` in the working folder.
    This function does not create it; :func:`fwdlib.results.save_run` does.
    """
    if folder := os.environ.get("FWDLIB_RESULTS"):
        return Path(folder).expanduser().resolve()
    return (project_root() or Path.cwd()) / "results"


def data_dir() -> Path | None:
    """Return the folder that ``FWDLIB_DATA`` names, or None if it is not set.

    Raises:
        FileNotFoundError: if it is set and is not a folder.
    """
    folder = os.environ.get("FWDLIB_DATA")
    if not folder:
        return None
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"FWDLIB_DATA is {folder!r}, which is not a folder. It must name a folder in torchvision's layout, for "
            f"example with KMNIST/raw/train-images-idx3-ubyte.gz in it. Correct the path, or unset FWDLIB_DATA."
        )
    return path


def cache_dir() -> Path:
    """Return the folder for downloaded data: ``FWDLIB_CACHE``, else the platform's user cache. It may not exist yet."""
    folder = os.environ.get("FWDLIB_CACHE")
    return Path(folder).expanduser().resolve() if folder else Path(platformdirs.user_cache_dir("fwdlib"))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def summary(seeds: list[int], device: torch.device | str = "cpu", cells: Sequence[str] = ()) -> str:
    """Return the first output of a notebook: packages and versions, device and threads, seeds.

    Args:
        seeds: of its runs.
        device: that it trains on.
        cells: the code that has run so far, IPython's ``In``. Parameters that papermill has inserted are checked.

    Raises:
        ValueError: if this machine has no such device, or as :func:`fwdlib.checks.check_inserted`.
    """
    import torch

    check_inserted(cells)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    mode = "; quick mode: only to see that everything runs" if is_quick() else ""
    packages = textwrap.fill(packages, 88)
    return f"{packages}\n{resolve_device(device)}, {threads}; {which}{mode}"


def processor_name() -> str:
    """Return the processor's name, as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return a description of this machine and its software, for the record of a result."""
    import torch

    device = torch.device(device)
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "in_colab": "google.colab" in sys.modules,
    }
