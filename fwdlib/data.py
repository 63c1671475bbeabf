"""The data sets: the same tensors by every route, together with a record of their source.

The files come from :mod:`fwdlib.archives`. Image archives are unpacked into a temporary folder at each call (0.4 s for
KMNIST). So no unpacked file can be out of date or incomplete, processes do not interfere, and ``FWDLIB_DATA`` is only
read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fwdlib.archives import Archive, DamagedFileError, UnavailableError, answers, find, obtain
from fwdlib.checks import check_choice, check_count, check_seed
from fwdlib.runtime import cache_dir, data_dir, generator, resolve_device

CREDITS = {  # name: (licence, citation)
    "penguins": ("CC0 1.0", "Horst, Hill & Gorman (2020), palmerpenguins, doi:10.5281/zenodo.3960218"),
    "KMNIST": ("CC BY-SA 4.0", "Clanuwat et al. (2018), arXiv:1812.01718; KMNIST by CODH, doi:10.20676/00000341"),
    "MNIST": ("CC BY-SA 3.0", "LeCun, Bottou, Bengio & Haffner (1998), Proceedings of the IEEE 86(11)"),
    "FashionMNIST": ("MIT", "Xiao, Rasul & Vollgraf (2017), arXiv:1708.07747"),
    "CIFAR10": ("none stated", "Krizhevsky (2009), Learning multiple layers of features from tiny images"),
    "CIFAR100": ("none stated", "Krizhevsky (2009), Learning multiple layers of features from tiny images"),
    "CIFAR10-jpeg": ("none stated", "JPEG copies, not the published pixels, of CIFAR-10 by Krizhevsky (2009)"),
    "digits": ("CC BY 4.0", "Alpaydin & Kaynak (1998), UCI Machine Learning Repository, doi:10.24432/C50P49"),
}
IMAGE_SETS = tuple(name for name in CREDITS if name != "penguins")
FETCHABLE = tuple(name for name in CREDITS if name != "digits")  # digits come with scikit-learn
GREY_SETS = ("KMNIST", "MNIST", "FashionMNIST")  # digits can replace these
COPIES = {"CIFAR10-jpeg": "CIFAR10"}  # copies with a loss, and what they are copies of

PENGUIN_SPECIES = ("Adelie", "Chinstrap", "Gentoo")
PENGUIN_FEATURES = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")
PENGUIN_ROWS = "a2bd5ff902561d30"  # fingerprint of the 334 rows in canonical order

PENGUIN_CSV = Archive(
    "penguins/penguins_processed.csv",
    "d9e034c8d8905e19b5528a9c195091ceba4b14df6c095c050d89c5f106dd50ba",
    ("https://storage.googleapis.com/download.tensorflow.org/data/palmer_penguins/penguins_processed.csv",),
)


CIFAR10_JPEG = Archive(
    "CIFAR10-jpeg/cifar10_jpeg.npz", "13b51e199b8a14d433e04e9bc5f7a5e1de260b4397dc7721e8a56a35a9404183", ()
)


class Source(NamedTuple):
    """Where a data set came from; ``source._asdict()`` goes into the run record."""

    name: str
    origin: str  # in words that do not depend on the folders of this machine
    substitute_for: str | None  # the data set that this one replaces
    fingerprint: str  # of the four tensors
    licence: str
    citation: str
    split_seed: int


class Dataset(NamedTuple):
    """Inputs (N, ...) float32 in 0..1 and targets (N,) int64, split into train and test, with their source."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    class_names: tuple[str, ...]
    source: Source


def load_penguins(*, seed: int = 0, test_fraction: float = 0.25, device: str | torch.device = "cpu") -> Dataset:
    """Load the 334 penguins: four measurements scaled to 0..1 and the species, in a stratified split.

    The rows, their order and therefore the split are the same bit for bit from every source.

    Args:
        seed: seed of the split.
        test_fraction: part of the rows in the test set, between 0 and 1.
        device: where the tensors go.

    Returns:
        Inputs (N, 4) in the order of ``PENGUIN_FEATURES`` and targets (N,) that index ``PENGUIN_SPECIES``.

    Raises:
        ValueError: if ``seed``, ``test_fraction`` or ``device`` cannot be used.
        DamagedFileError: if ``penguins_processed.csv`` exists but is not the published file.
    """
    from sklearn.model_selection import train_test_split

    device = resolve_device(device)
    check_seed(seed)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction!r}")
    try:
        rows, origin = _penguins_from_tfds()
    except UnavailableError as reason:
        rows = _penguins_from_package()
        origin = f"palmerpenguins {version('palmerpenguins')} (offline; the same 334 rows), because {reason}"
    halves = []
    for half in train_test_split(rows, test_size=test_fraction, random_state=seed, stratify=rows[:, 0]):
        halves += [torch.from_numpy(half[:, 1:]).float(), torch.from_numpy(half[:, 0]).long()]
    source = Source("penguins/processed", origin, None, fingerprint(*halves), *CREDITS["penguins"], seed)
    return Dataset(*(tensor.to(device) for tensor in halves), PENGUIN_SPECIES, source)


def load_kmnist(
    *, num_train: int | None = 500, num_test: int | None = 100, seed: int = 0, device: str | torch.device = "cpu"
) -> Dataset:
    """Load a random part of KMNIST, by default 500 training and 100 test images; see :func:`load_images`."""
    return load_images("KMNIST", num_train=num_train, num_test=num_test, seed=seed, device=device)


def load_images(
    name: str,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Dataset:
    """Load an image set, or a random part of it drawn without replacement.

    If a grey set (KMNIST, MNIST, FashionMNIST) is not available, scikit-learn's digits replace it, resized to 28 x 28;
    ``source.substitute_for`` and :func:`describe` say so. There are fewer of them: where more are asked for, all are
    returned. ``"CIFAR10-jpeg"``, compressed copies of CIFAR10, is called a substitute, too, although it was asked for.

    Args:
        name: one of ``IMAGE_SETS``.
        num_train: number of images drawn from the training set; if None, all of them in the published order.
        num_test: the same for the test set.
        seed: seed of both draws.
        device: where the tensors go.

    Returns:
        Inputs (N, channels, height, width) and targets (N,).

    Raises:
        ValueError: if ``name`` is unknown or a number is larger than the set.
        FileNotFoundError: if a colour set is not available.
        DamagedFileError: if an archive exists but is not the published file.
    """
    check_choice("name", name, IMAGE_SETS)
    check_seed(seed)
    device = resolve_device(device)
    used, because = name, ""
    if name != "digits":
        try:
            pools, class_names, origin = _read_archives(name)
        except UnavailableError as reason:
            if name not in GREY_SETS:
                raise FileNotFoundError(_explain(name, reason)) from reason
            used, because = "digits", f", because {reason}"
    if used == "digits":
        pools, class_names, origin = _read_digits()
    substitute_for = COPIES.get(name) if used == name else name
    halves = []
    for (images, targets), argument, count in zip(pools, ("num_train", "num_test"), (num_train, num_test), strict=True):
        if count is not None:
            if check_count(argument, count) > len(targets) and not substitute_for:
                raise ValueError(f"{argument} must be at most the {len(targets)} of {used}, got {count}")
            drawn = torch.randperm(len(targets), generator=generator(seed, purpose="data"))[:count]
            images, targets = images[drawn], targets[drawn]
        halves += [images / 255 if images.dtype == torch.uint8 else images, targets]
    source = Source(used, origin + because, substitute_for, fingerprint(*halves), *CREDITS[used], seed)
    return Dataset(*(tensor.to(device) for tensor in halves), class_names, source)


def describe(dataset: Dataset) -> str:
    """Return a description for notebooks: the source, shapes with axis names, split and fingerprint of a data set."""
    source = dataset.source
    axes = "(row, feature)" if dataset.train_inputs.ndim == 2 else "(image, channel, height, width)"
    lines = [
        f"{source.name}, from {source.origin}",
        f"train: inputs {tuple(dataset.train_inputs.shape)} {axes}, targets {tuple(dataset.train_targets.shape)}",
        f"test:  inputs {tuple(dataset.test_inputs.shape)} {axes}, targets {tuple(dataset.test_targets.shape)}",
        f"{len(dataset.class_names)} classes: {', '.join(dataset.class_names)}",
        f"split seed {source.split_seed}, fingerprint {source.fingerprint}",
        f"licence {source.licence}; {source.citation}",
    ]
    if real := source.substitute_for:
        lines.insert(0, f"SUBSTITUTE: this is {source.name}, not {real}. {_advice(real)}")
    return "\n".join(lines)


def available() -> dict[str, str]:
    """Return where each data set would come from now. This asks hosts whether they answer, but downloads nothing."""
    table = {"digits": "scikit-learn"}
    substitutes = {"penguins": "palmerpenguins (the same rows)"} | dict.fromkeys(GREY_SETS, "SUBSTITUTE digits")
    for name in FETCHABLE:
        otherwise = substitutes.get(name, "nowhere")
        try:
            archives = _archives(name)
            folder, place = find(archives)
            if folder:
                table[name] = place
            elif any(answers(url) for url in archives[0].urls):
                table[name] = f"a download, because {place}"
            else:
                table[name] = f"{otherwise}, because {place}, no host answers"
        except DamagedFileError as error:
            table[name] = f"DAMAGED: {error}"
        except UnavailableError as reason:
            table[name] = f"{otherwise}, because {reason}"
    return table


def lacking() -> list[str]:
    """Return the data sets that are not available here, with or without a substitute. This asks hosts, too."""
    return [name for name, place in available().items() if place.startswith(("SUBSTITUTE", "nowhere"))]


def fetch(name: str) -> Path:
    """Return the folder that holds a data set's archives, after downloading missing ones into the cache folder.

    Raises:
        ValueError: if ``name`` is unknown, or needs no download.
        FileNotFoundError: if it cannot be downloaded; the message says what was tried.
        DamagedFileError: if an archive exists but is not the published file.
    """
    check_choice("name", name, FETCHABLE)
    try:
        return obtain(_archives(name))[0]
    except UnavailableError as reason:
        raise FileNotFoundError(_explain(name, reason)) from reason


def _advice(name: str) -> str:
    folder = f"For {name}, set FWDLIB_DATA to a folder that has it in torchvision's layout"
    return f"{folder}, or run `python -m fwdlib data fetch {name}` where there is a network."


def _explain(name: str, reason: Exception) -> str:
    looked = " and ".join(str(folder) for folder in (data_dir(), cache_dir()) if folder)
    return f"{name} is not available: {reason}. Looked in {looked}. {_advice(name)}"


def fingerprint(*tensors: Tensor) -> str:
    """Return the first 16 hex digits of the sha256 of the tensors' types, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()[:16]


# --- reading: each function returns tensors and their origin in words ------------------------------------------------


def _archives(name: str) -> list[Archive]:
    """Return the archives of a data set, with torchvision's own hashes and addresses.

    Raises:
        UnavailableError: if torchvision cannot be imported.
    """
    if name == "penguins":
        return [PENGUIN_CSV]
    if name == "CIFAR10-jpeg":
        return [CIFAR10_JPEG]
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, AttributeError) as error:  # RuntimeError: it was built for another torch
        raise UnavailableError(f"torchvision cannot be imported ({type(error).__name__}: {error})") from error
    known = getattr(datasets, name)
    if name.startswith("CIFAR"):
        return [Archive(known.filename, known.tgz_md5, (known.url,))]
    return [
        Archive(f"{name}/raw/{filename}", md5, tuple(mirror + filename for mirror in known.mirrors))
        for filename, md5 in known.resources
    ]


def _penguins_from_tfds() -> tuple[np.ndarray, str]:
    folder, place = obtain([PENGUIN_CSV])
    try:
        with _contained() as scratch:
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            Path(scratch, "penguins_processed.csv").write_bytes((folder / PENGUIN_CSV.path).read_bytes())
            config = tfds.download.DownloadConfig(manual_dir=scratch)
            table = tfds.data_source(
                "penguins/processed",
                split="train",
                data_dir=scratch,
                builder_kwargs={"file_format": "array_record"},  # parquet silently loses rows
                download_and_prepare_kwargs={"download_config": config},
            )
            rows = _canonical_rows([[row["species"], *row["features"]] for row in table])
    except Exception as error:  # whatever fails in tensorflow-datasets, another package has the same rows
        message = " ".join(f"tensorflow-datasets failed: {type(error).__name__}: {error}".split())
        raise UnavailableError(message[:300]) from error
    return rows, f"tensorflow-datasets {version('tensorflow-datasets')}, {place}"


def _penguins_from_package() -> np.ndarray:
    import palmerpenguins

    table = palmerpenguins.load_penguins()
    raw = table[list(PENGUIN_FEATURES)].to_numpy(float)
    # penguins/processed keeps the one penguin whose sex is '.' in the raw table; in the package it is missing.
    dotted = (table.species == "Gentoo").to_numpy() & (raw == (44.5, 15.7, 217, 4875)).all(axis=1)
    kept = ~np.isnan(raw).any(axis=1) & (table.sex.notna().to_numpy() | dotted)
    raw, species = raw[kept], [PENGUIN_SPECIES.index(name) for name in table.species[kept]]
    low, high = raw.min(axis=0), raw.max(axis=0)
    return _canonical_rows(np.column_stack([species, (raw - low) / (high - low)]))


def _canonical_rows(rows: object) -> np.ndarray:
    """Return the (334, 5) rows, species first, sorted and rounded so that all routes agree bit for bit.

    Raises:
        RuntimeError: if the rows are not those of the course.
    """
    rows = np.round(np.asarray(rows, dtype=np.float64), 5)  # with 6 decimals, float32 would round 23 / 59 differently
    rows = rows[np.lexsort(rows.T[::-1])]
    if (found := fingerprint(torch.from_numpy(rows))) != PENGUIN_ROWS:
        raise RuntimeError(f"got {len(rows)} penguins with fingerprint {found}, expected 334 with {PENGUIN_ROWS}")
    return rows


def _read_archives(name: str) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...], str]:
    archives = _archives(name)
    folder, place = obtain(archives)
    if name == "CIFAR10-jpeg":
        return *_read_jpegs(folder / CIFAR10_JPEG.path), f"JPEG copies, {place}"
    from torchvision import datasets

    with tempfile.TemporaryDirectory() as root:
        for archive in archives:
            target = Path(root, archive.path).parent
            target.mkdir(parents=True, exist_ok=True)
            datasets.utils.extract_archive(folder / archive.path, target)
        sets = [getattr(datasets, name)(root, train=train) for train in (True, False)]
    pools = []
    for images in sets:
        pixels = torch.as_tensor(images.data)  # uint8, (N, H, W) or (N, H, W, 3)
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        pools.append((pixels, torch.as_tensor(images.targets)))
    return pools, tuple(sets[0].classes), f"torchvision {version('torchvision')}, {place}"


def _read_jpegs(path: Path) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...]]:
    from PIL import Image

    pools = []
    with np.load(path) as found:
        for half in ("train", "test"):
            files = np.split(found[f"{half}_jpeg"], found[f"{half}_offsets"][1:-1])
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
            targets = torch.from_numpy(found[f"{half}_labels"]).long()
            pools.append((torch.from_numpy(pixels).permute(0, 3, 1, 2), targets))
        return pools, tuple(str(name) for name in found["class_names"])


def _read_digits() -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...], str]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    large = large.round(decimals=6).float()  # so that the fingerprint is the same on every processor
    labels = torch.from_numpy(targets).long()
    # The set has no published split: a fixed fifth is the test set, whatever the seed of the draw.
    parts = train_test_split(np.arange(len(targets)), test_size=0.2, random_state=0, stratify=targets)
    origin = f"scikit-learn {version('scikit-learn')} load_digits, resized to 28 x 28"
    return [(large[part], labels[part]) for part in parts], tuple("0123456789"), origin


@contextmanager
def _contained() -> Iterator[str]:
    """Yield a temporary folder; keep the output of tensorflow-datasets out of notebooks and its litter out of /tmp."""
    before = logging.root.manager.disable, tempfile.tempdir
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        tempfile.tempdir = scratch  # each call of tensorflow-datasets leaves an empty folder there
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield scratch
        finally:
            logging.root.manager.disable, tempfile.tempdir = before
