"""Data sets: the same rows by every route, draws from their own set, substitutes loud, damage passed on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fwdlib import archives, data
from tests.small_sets import NUM_TEST, NUM_TRAIN, write_kmnist

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("FWDLIB_DATA") or REPOSITORY.parent / "shared" / "data")

needs_penguins = pytest.mark.skipif(
    not (REAL / "penguins/penguins_processed.csv").is_file(), reason=f"no CSV in {REAL}"
)
needs_kmnist = pytest.mark.skipif(not (REAL / "KMNIST/raw").is_dir(), reason=f"no KMNIST in {REAL}")


pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.fixture
def small_kmnist(monkeypatch, tmp_path) -> Path:
    """A folder with a small KMNIST in torchvision's layout."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.KMNIST, "resources", write_kmnist(tmp_path / "published"))
    return tmp_path / "published"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def assert_equal(first: data.Dataset, second: data.Dataset) -> None:
    for one, other in zip(first[:4], second[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert first.source.fingerprint == second.source.fingerprint


# --- penguins --------------------------------------------------------------------------------------------------------


def test_penguins_without_anything_come_from_the_package():
    penguins = data.load_penguins()
    assert penguins.train_inputs.shape == (250, 4)
    assert penguins.test_inputs.shape == (84, 4)
    assert penguins.train_inputs.dtype == torch.float32
    assert penguins.train_targets.dtype == torch.int64
    inputs = torch.cat([penguins.train_inputs, penguins.test_inputs])
    assert inputs.amin(dim=0).tolist() == [0] * 4
    assert inputs.amax(dim=0).tolist() == [1] * 4
    assert torch.cat([penguins.train_targets, penguins.test_targets]).bincount().tolist() == [146, 68, 120]
    assert penguins.class_names == ("Adelie", "Chinstrap", "Gentoo")
    assert penguins.source.origin.startswith("palmerpenguins")
    assert "storage.googleapis.com does not answer" in penguins.source.origin
    assert penguins.source.substitute_for is None


@needs_penguins
def test_penguins_are_the_same_bits_by_every_route(monkeypatch, capfd, tmp_path):
    package = data.load_penguins(seed=3)
    monkeypatch.setenv("FWDLIB_DATA", str(REAL))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    capfd.readouterr()
    tfds = data.load_penguins(seed=3)
    assert capfd.readouterr() == ("", "")
    assert files_in(tmp_path) == ["temporary"]
    if sys.platform == "linux":
        assert tfds.source.origin.startswith("tensorflow-datasets")
        assert tfds.source.origin.endswith("FWDLIB_DATA/penguins")
    assert_equal(package, tfds)


@needs_penguins
def test_penguins_equal_the_published_rows():
    published = np.loadtxt(REAL / "penguins/penguins_processed.csv", delimiter=",", skiprows=1)
    rows = data._penguins_from_package()
    order = np.lexsort(published.round(5).T[::-1])
    np.testing.assert_allclose(rows, published[order], rtol=0, atol=5.1e-6)


@needs_penguins
def test_penguins_survive_a_broken_tensorflow_datasets(monkeypatch):
    monkeypatch.setenv("FWDLIB_DATA", str(REAL))
    intact = data.load_penguins()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    broken = data.load_penguins()
    assert "palmerpenguins" in broken.source.origin
    assert "tensorflow-datasets failed: ModuleNotFoundError" in broken.source.origin
    assert_equal(intact, broken)


def test_other_penguins_are_refused(monkeypatch):
    import palmerpenguins

    fewer = palmerpenguins.load_penguins().iloc[1:]
    monkeypatch.setattr(palmerpenguins, "load_penguins", lambda: fewer)
    with pytest.raises(RuntimeError, match="333 penguins"):
        data.load_penguins()


def test_penguin_split_is_stratified_deterministic_and_seeded():
    one, again, other = data.load_penguins(seed=1), data.load_penguins(seed=1), data.load_penguins(seed=2)
    assert_equal(one, again)
    assert one.source.fingerprint != other.source.fingerprint
    expected = torch.tensor([146, 68, 120]) * 84 / 334
    assert (one.test_targets.bincount() - expected).abs().max() < 1
    everything = torch.cat([one.train_inputs, one.test_inputs])
    assert len(everything.unique(dim=0)) == 334  # no row twice, none in both halves
    assert len(data.load_penguins(test_fraction=0.5).test_targets) == 167


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_fraction": 0}, "test_fraction must be between 0 and 1, got 0"),
        ({"test_fraction": 1.0}, "test_fraction must be between"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        ({"device": "tpu"}, "device must be one of"),
    ],
)
def test_penguins_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load_penguins(**arguments)


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_drawn_without_replacement_from_their_own_set(small_kmnist, monkeypatch):
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    part = data.load_kmnist(num_train=30, num_test=15, seed=5)
    assert part.train_inputs.shape == (30, 1, 28, 28)
    assert part.class_names == ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    assert part.source.origin.endswith("FWDLIB_DATA/KMNIST/raw")
    train, test = ((inputs[:, 0, 0, 0] * 255).round().long() for inputs in (part.train_inputs, part.test_inputs))
    assert len(train.unique()) == 30
    assert len(test.unique()) == 15
    assert train.max() < NUM_TRAIN
    assert test.min() >= 200
    assert part.train_targets.equal(train % 10)  # labels stay with their images
    assert part.test_targets.equal((test - 200) % 10)
    assert_equal(part, data.load_kmnist(num_train=30, num_test=15, seed=5))
    assert part.source.fingerprint != data.load_kmnist(num_train=30, num_test=15, seed=6).source.fingerprint


def test_all_images_keep_the_published_order(small_kmnist, monkeypatch):
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    whole = data.load_images("KMNIST")
    torch.testing.assert_close(whole.train_inputs[:, 0, 0, 0] * 255, torch.arange(NUM_TRAIN).float())
    assert len(whole.test_targets) == NUM_TEST


@needs_kmnist
def test_real_kmnist_has_the_known_mean_and_is_quick_to_load(monkeypatch):
    import torchvision  # noqa: F401  (its import is not what is timed)

    monkeypatch.setenv("FWDLIB_DATA", str(REAL))
    start = time.perf_counter()
    part = data.load_kmnist()
    assert time.perf_counter() - start < 3  # 0.4 s alone on two cores
    assert part.train_inputs.shape == (500, 1, 28, 28)
    assert part.source.substitute_for is None
    whole = data.load_images("KMNIST").train_inputs
    assert whole.mean().item() == pytest.approx(0.1918, abs=1e-4)
    assert whole.std().item() == pytest.approx(0.3483, abs=1e-4)


@pytest.mark.filterwarnings(
    "ignore:Python 3.14 will:DeprecationWarning"
)  # torchvision's use of tarfile on 3.12 and 3.13
def test_cifar_is_read_from_its_archive(monkeypatch, tmp_path):
    from torchvision import datasets

    rng = np.random.default_rng(0)
    content = {
        name: pickle.dumps({"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": list(range(count))})
        for name, count in (("data_batch_1", 6), ("test_batch", 4))
    }
    content["batches.meta"] = pickle.dumps({"label_names": ["a", "b"]})
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, blob in content.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(blob)
            archive.addfile(entry, io.BytesIO(blob))
    md5 = {name: hashlib.md5(blob).hexdigest() for name, blob in content.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5["batches.meta"]})
    digest = hashlib.md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
    monkeypatch.setenv("FWDLIB_DATA", str(tmp_path))
    cifar = data.load_images("CIFAR10", num_test=2)
    assert cifar.train_inputs.shape == (6, 3, 32, 32)
    assert cifar.test_inputs.shape == (2, 3, 32, 32)
    first = torch.from_numpy(pickle.loads(content["data_batch_1"])["data"][0]).reshape(3, 32, 32) / 255
    torch.testing.assert_close(cifar.train_inputs[0], first)
    assert cifar.class_names == ("a", "b")


def test_jpeg_copies_of_cifar_are_read_and_called_a_substitute(monkeypatch, tmp_path):
    from PIL import Image

    colours = {"train": [(255, 0, 0), (0, 0, 255), (0, 255, 0)], "test": [(0, 0, 0)]}
    content = {"class_names": np.array(["red", "blue", "green"])}
    for half, values in colours.items():
        files = []
        for colour in values:
            file = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(file, "jpeg")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        content[f"{half}_jpeg"] = np.concatenate(files)
        content[f"{half}_offsets"] = np.cumsum([0, *map(len, files)])
        content[f"{half}_labels"] = np.arange(len(values), dtype=np.uint8)
    path = tmp_path / data.CIFAR10_JPEG.path
    path.parent.mkdir()
    np.savez(path, **content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_JPEG", data.CIFAR10_JPEG._replace(digest=digest))
    monkeypatch.setenv("FWDLIB_DATA", str(tmp_path))
    found = data.load_images("CIFAR10-jpeg")
    expected = torch.tensor(colours["train"], dtype=torch.float32).div(255)[:, :, None, None].expand(3, 3, 32, 32)
    torch.testing.assert_close(found.train_inputs, expected, rtol=0, atol=0.02)  # compression loses a little
    assert found.train_targets.tolist() == [0, 1, 2]
    assert found.class_names == ("red", "blue", "green")
    assert found.source.substitute_for == "CIFAR10"
    assert data.describe(found).startswith("SUBSTITUTE: this is CIFAR10-jpeg, not CIFAR10.")


def test_missing_cifar_says_where_it_looked_and_what_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        data.load_images("CIFAR10")
    for part in ("CIFAR10", str(tmp_path / "cache"), "python -m fwdlib data fetch CIFAR10", "does not answer"):
        assert part in str(caught.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=", ".join(map(repr, data.IMAGE_SETS))):
        data.load_images("kmnist")
    with pytest.raises(ValueError, match="'penguins', 'KMNIST'"):
        data.fetch("digits")


def test_a_substitute_gives_all_that_it_has_where_more_is_asked_for():
    found = data.load_images("MNIST", num_train=6000, num_test=100)
    assert (len(found.train_targets), len(found.test_targets)) == (1437, 100)
    assert found.source.substitute_for == "MNIST"


def test_too_many_images_are_refused(small_kmnist, monkeypatch):
    with pytest.raises(ValueError, match="num_train must be at most the 1437 of digits, got 60000"):
        data.load_images("digits", num_train=60000)
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    with pytest.raises(ValueError, match="num_test must be at most the 20 of KMNIST, got 21"):
        data.load_kmnist(num_train=1, num_test=21)
    with pytest.raises(ValueError, match="num_train must be a whole number of at least 1"):
        data.load_kmnist(num_train=0)


# --- substitutes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.GREY_SETS)
def test_a_substitute_is_loud(name):
    stand_in = data.load_images(name, num_train=500, num_test=100)
    assert stand_in.source.name == "digits"
    assert stand_in.source.substitute_for == name
    assert "FWDLIB_DATA is not set" in stand_in.source.origin
    first_line = data.describe(stand_in).splitlines()[0]
    assert first_line.startswith(f"SUBSTITUTE: this is digits, not {name}.")
    assert "set FWDLIB_DATA" in first_line
    assert f"python -m fwdlib data fetch {name}" in first_line
    assert stand_in.train_inputs.shape == (500, 1, 28, 28)
    assert stand_in.train_inputs.min() >= 0
    assert 0.9 < stand_in.train_inputs.max() <= 1


def test_digits_asked_for_by_name_are_no_substitute():
    digits = data.load_images("digits")
    assert digits.source.substitute_for is None
    assert "SUBSTITUTE" not in data.describe(digits)
    assert len(digits.train_targets) + len(digits.test_targets) == 1797


def test_torchvision_that_does_not_import_is_the_stated_reason(small_kmnist, monkeypatch):
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    stand_in = data.load_kmnist()
    assert stand_in.source.substitute_for == "KMNIST"
    assert "torchvision cannot be imported" in stand_in.source.origin
    assert "torchvision cannot be imported" in data.available()["KMNIST"]


def test_description_and_record_are_complete():
    penguins = data.load_penguins(seed=4)
    text = data.describe(penguins)
    for part in ("penguins/processed", "(250, 4) (row, feature)", "Gentoo", "split seed 4", "CC0", "doi:"):
        assert part in text
    assert penguins.source.fingerprint in text
    assert json.loads(json.dumps(penguins.source._asdict()))["split_seed"] == 4


# --- the files: see also test_archives.py ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["FWDLIB_DATA", "FWDLIB_CACHE"])
def test_an_altered_csv_is_named_and_not_used(place, monkeypatch, tmp_path):
    csv = tmp_path / "mine/penguins/penguins_processed.csv"
    csv.parent.mkdir(parents=True)
    csv.write_text("species,culmen_length_mm\n0,0.5\n")
    monkeypatch.setenv(place, str(tmp_path / "mine"))
    for call in (data.load_penguins, lambda: data.fetch("penguins")):
        with pytest.raises(archives.DamagedFileError) as caught:
            call()
        for part in (str(csv), hashlib.sha256(csv.read_bytes()).hexdigest(), data.PENGUIN_CSV.digest):
            assert part in str(caught.value)
    assert data.available()["penguins"].startswith(f"DAMAGED: {csv}")


def test_no_substitute_stands_in_for_a_damaged_archive(small_kmnist, monkeypatch):
    archive = small_kmnist / "KMNIST/raw/t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    with pytest.raises(archives.DamagedFileError, match=re.escape(str(archive))):
        data.load_kmnist()


def test_loading_writes_nothing_that_stays(small_kmnist, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "temporary"}
    data.load_kmnist(num_train=3, num_test=3)
    data.load_penguins()
    data.available()
    assert data.fetch("KMNIST") == small_kmnist
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "temporary"} == before


def test_unpacked_files_are_not_trusted(small_kmnist, monkeypatch):
    (small_kmnist / "KMNIST/raw/train-images-idx3-ubyte").write_bytes(b"damaged")
    monkeypatch.setenv("FWDLIB_DATA", str(small_kmnist))
    assert len(data.load_images("KMNIST").train_targets) == NUM_TRAIN


def test_images_are_downloaded_from_the_mirrors_that_torchvision_names(small_kmnist, monkeypatch, tmp_path):
    from torchvision import datasets

    mirror = datasets.KMNIST.mirrors[0]

    class Response(io.BytesIO):
        length = None  # as where the host does not tell it

    def urlopen(request, **kwargs):
        url = getattr(request, "full_url", request)
        if not url.startswith(mirror):
            raise URLError(f"{url} is not served in this test")
        return Response((small_kmnist / "KMNIST/raw" / url.removeprefix(mirror)).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert data.available()["KMNIST"].startswith("a download, because FWDLIB_DATA is not set")
    first = data.load_images("KMNIST")
    assert first.source.origin.endswith("the download cache/KMNIST/raw")
    assert data.fetch("KMNIST") == tmp_path / "cache"
    monkeypatch.setattr(urllib.request, "urlopen", None)
    again = data.load_images("KMNIST")
    assert again.source == first.source
    assert_equal(first, again)


def test_fingerprint_tells_values_shapes_and_types_apart():
    base = torch.arange(6.0)
    different = [base, base + 1, base.reshape(2, 3), base.double(), base.flip(0)]
    assert len({data.fingerprint(tensor) for tensor in different}) == len(different)
    assert data.fingerprint(base.reshape(2, 3).t()) == data.fingerprint(base.reshape(2, 3).t().contiguous())
