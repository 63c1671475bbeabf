"""Published archives: found in ``FWDLIB_DATA``, else in the cache folder, else downloaded into it.

Every file returned matches the published hash. A damaged file raises an error that names it and is left in place.
Nothing is ever written to ``FWDLIB_DATA``. A file in the cache is whole, even if several processes download it at once.
Without a network, a process waits at most ``PROBE_BUDGET`` seconds for all hosts together.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from fwdlib.atomic import message_of, naming
from fwdlib.locks import remove_leftovers, temporary_folder
from fwdlib.runtime import cache_dir, data_dir, is_offline

T = TypeVar("T")
PROBE_SECONDS = 2.0  # longest wait for the answer of one host
PROBE_BUDGET = 4.5  # longest wait for all hosts that do not answer, per process
DOWNLOAD_SECONDS = 20.0  # longest pause of a host during a download
SLOWEST = 1000.0  # bytes a second that a download must have on average, after as long
BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}  # units of a progress bar


class DamagedFileError(RuntimeError):
    """A data file is not the published one. It is not used, and it is left in place."""


class UnavailableError(Exception):
    """A data set is not available; the text says what was tried."""


class Archive(NamedTuple):
    """A published file."""

    path: str  # below FWDLIB_DATA, and below the cache folder
    digest: str  # as published: md5 (32 hex digits) by torchvision, sha256 (64) by tensorflow-datasets
    urls: tuple[str, ...]


def obtain(archives: list[Archive]) -> tuple[Path, str]:
    """Return the folder that holds all the archives, and its name in words, after downloading missing ones.

    Raises:
        UnavailableError: if an archive cannot be downloaded.
        DamagedFileError: if an archive exists but is not the published file.
    """
    folder, place = find(archives)
    if folder:
        return folder, place
    for archive in archives:
        if not (cache_dir() / archive.path).is_file():
            _download(archive, tried=place)
    return cache_dir(), find(archives)[1]


def find(archives: list[Archive]) -> tuple[Path | None, str]:
    """Return the folder that holds all the archives, and its name in words; or None, and why there is none.

    Raises:
        DamagedFileError: if an archive exists but is not the published file, even if others are missing.
    """
    tried = [] if data_dir() else ["FWDLIB_DATA is not set"]
    for label, folder in (("FWDLIB_DATA", data_dir()), ("the download cache", cache_dir())):
        if folder is None:
            continue
        missing = [archive.path for archive in archives if not (folder / archive.path).is_file()]
        for archive in archives:
            if archive.path not in missing:
                _check(folder / archive.path, archive.digest)
        if not missing:
            return folder, Path(label, archives[0].path).parent.as_posix()
        tried.append(f"{label} has no {missing[0]}")
    return None, ", ".join(tried)


def _check(path: Path, published: str) -> None:
    """Compare a file with its published hash.

    Raises:
        DamagedFileError: if it differs.
    """
    name = "md5" if len(published) == 32 else "sha256"
    with path.open("rb") as file:  # the flag allows md5 on systems that forbid it for security
        found = hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
    if found != published:
        raise DamagedFileError(
            f"{path} is damaged: its {name} is {found}, expected {published}. "
            f"It is not used. Replace it with the published file, or remove it to let fwdlib look elsewhere."
        )


def _download(archive: Archive, tried: str) -> None:
    """Download an archive into the cache folder from the first host that works.

    Raises:
        UnavailableError: if none works; the text starts with ``tried``, which says what was tried before.
    """
    path = cache_dir() / archive.path
    reasons = [tried]
    for url in archive.urls:
        host = urlsplit(url).netloc
        if not answers(url):
            reasons.append(f"{host} does not answer")
            continue
        scratch = ExitStack()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, "download")
            # The scratch folder is beside the target, so that the checked file moves there in one step.
            folder = scratch.enter_context(temporary_folder(path.parent, "download"))
        except OSError as error:
            problem = f"the cache folder {cache_dir()} cannot be written ({error.strerror})"
            reasons.append(f"{problem}: set FWDLIB_CACHE to another")
            break
        with scratch:
            part = folder / path.name
            try:
                opened = _within(DOWNLOAD_SECONDS, partial(urllib.request.urlopen, url, timeout=DOWNLOAD_SECONDS))
                with naming(path.parent), opened as response, part.open("wb") as file:
                    _copy(response, file, path.name)
                _check(part, archive.digest)
                part.replace(path)
                return
            except DamagedFileError:
                reasons.append(f"{host} sent a file that is not the published {path.name}")
            except (OSError, http.client.HTTPException) as error:
                reasons.append(f"the download from {host} failed ({message_of(error)})")
    raise UnavailableError(", ".join(reasons))


def _copy(response: http.client.HTTPResponse, file: BinaryIO, name: str) -> None:
    # A host that sends a byte now and then never pauses for DOWNLOAD_SECONDS, so its rate has a limit, too.
    begun = time.monotonic()
    with tqdm(total=response.length, desc=name, leave=False, **BYTES) as bar:
        while block := response.read1(2**16):
            file.write(block)
            bar.update(len(block))
            seconds = time.monotonic() - begun
            if seconds > DOWNLOAD_SECONDS and bar.n < SLOWEST * seconds:
                raise TimeoutError(f"{bar.n} bytes in {seconds:.0f} seconds")


def _within(seconds: float, call: Callable[[], T]) -> T:
    # In a thread: neither the look-up of a host's name nor headers that come byte by byte have a time-out.
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer in {seconds:.0f} seconds") from error


_answered: dict[str, bool] = {}  # by host, for the life of the process
_waited = 0.0  # seconds spent on hosts that did not answer


def answers(url: str) -> bool:
    """Tell whether a host serves ``url``. Each host is asked once, within one time budget for all hosts.

    With ``FWDLIB_OFFLINE`` set, no host is asked.
    """
    global _waited
    if is_offline():
        return False
    host, wait = urlsplit(url).netloc, min(PROBE_SECONDS, PROBE_BUDGET - _waited)
    if host not in _answered and wait > 0:
        request, start = urllib.request.Request(url, method="HEAD"), time.monotonic()
        try:
            _within(wait, partial(urllib.request.urlopen, request, timeout=wait)).close()
            _answered[host] = True
        except (OSError, http.client.HTTPException):
            _answered[host] = False
            _waited += time.monotonic() - start
    return _answered.get(host, False)


def stay_offline_without_network() -> None:
    """Set ``FWDLIB_OFFLINE`` if this process has asked hosts and none has answered, so that its children do not ask."""
    if _answered and not any(_answered.values()):
        os.environ["FWDLIB_OFFLINE"] = "1"
