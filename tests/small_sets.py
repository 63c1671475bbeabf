"""A small KMNIST in torchvision's layout."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

NUM_TRAIN, NUM_TEST = 40, 20


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def write_kmnist(folder: Path) -> list[tuple[str, str]]:
    """Write the four archives below a folder; return the names and hashes that torchvision must be told.

    Image i has the pixels i, or 200 + i in the test set.
    """
    for part, count, first in (("train", NUM_TRAIN, 0), ("t10k", NUM_TEST, 200)):
        pixels = np.repeat(np.arange(first, first + count), 28 * 28).reshape(count, 28, 28)
        write_idx(folder / f"KMNIST/raw/{part}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"KMNIST/raw/{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return [(name, hashlib.md5((folder / "KMNIST/raw" / name).read_bytes()).hexdigest()) for name in names]
