"""Archives: damage named, user folders left alone, downloads whole or absent, dead hosts within one budget."""

from __future__ import annotations

import errno
import functools
import hashlib
import http.server
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import pytest

from fwdlib import archives, locks, runtime
from fwdlib.archives import Archive, DamagedFileError, UnavailableError

REPOSITORY = Path(__file__).resolve().parents[1]
URLOPEN = urllib.request.urlopen
CONTENT = {"set/raw/images.gz": bytes(range(256)) * 40, "set/raw/labels.gz": b"0123456789"}


def digest_of(path: str, algorithm: str = "md5") -> str:
    return hashlib.new(algorithm, CONTENT[path]).hexdigest()


pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder with the published files."""
    folder = tmp_path / "published"
    (folder / "set/raw").mkdir(parents=True)
    for path, content in CONTENT.items():
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def unserved() -> list[Archive]:
    """The archives, on a host that does not answer."""
    return [Archive(path, digest_of(path), (f"https://host.example/{path}",)) for path in CONTENT]


@pytest.fixture
def served(published, monkeypatch):
    """The archives, on a host that does not answer and on 127.0.0.1."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=published)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
        monkeypatch.setattr(archives, "_answered", {"dead.example": False})
        hosts = ("http://dead.example/", f"http://127.0.0.1:{running.server_port}/")
        yield [Archive(path, digest_of(path), tuple(host + path for host in hosts)) for path in CONTENT]
        running.shutdown()


def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes() if path.is_file() else None)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- the user's folders and damage -----------------------------------------------------------------------------------


def test_the_data_folder_comes_first_and_is_only_read(served, published, monkeypatch, tmp_path):
    monkeypatch.setenv("FWDLIB_DATA", str(published))
    folders = [path for path in [published, *published.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    before = snapshot(published)
    try:
        assert archives.find(served) == archives.obtain(served) == (published, "FWDLIB_DATA/set/raw")
        assert snapshot(published) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert not (tmp_path / "cache").exists()  # nor is anything left elsewhere


def test_what_was_tried_is_told(unserved, published, monkeypatch, tmp_path):
    tried = "the download cache has no set/raw/images.gz"
    assert archives.find(unserved) == (None, f"FWDLIB_DATA is not set, {tried}")
    (published / "set/raw/labels.gz").unlink()
    monkeypatch.setenv("FWDLIB_DATA", str(published))
    with pytest.raises(UnavailableError) as caught:
        archives.obtain(unserved)
    assert str(caught.value) == f"FWDLIB_DATA has no set/raw/labels.gz, {tried}, host.example does not answer"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_both_published_hashes_are_checked(algorithm, published, monkeypatch):
    monkeypatch.setenv("FWDLIB_DATA", str(published))
    path = "set/raw/labels.gz"
    assert archives.find([Archive(path, digest_of(path, algorithm), ())])[0] == published
    (published / path).write_bytes(b"0123456780")
    with pytest.raises(DamagedFileError, match=f"its {algorithm} is .* expected {digest_of(path, algorithm)}"):
        archives.find([Archive(path, digest_of(path, algorithm), ())])


@pytest.mark.parametrize("place", ["FWDLIB_DATA", "FWDLIB_CACHE"])
@pytest.mark.parametrize("alone", [True, False], ids=["the others missing", "the others there"])
def test_a_truncated_archive_is_named_and_never_downloaded_around(
    place, alone, served, published, monkeypatch, tmp_path
):
    shutil.copytree(published, tmp_path / "mine")
    archive = tmp_path / "mine/set/raw/labels.gz"
    archive.write_bytes(archive.read_bytes()[:-2])
    if alone:
        (tmp_path / "mine/set/raw/images.gz").unlink()
    before = snapshot(tmp_path / "mine")
    monkeypatch.setenv(place, str(tmp_path / "mine"))
    with pytest.raises(DamagedFileError) as caught:
        archives.obtain(served)
    for part in (str(archive), hashlib.md5(archive.read_bytes()).hexdigest(), digest_of("set/raw/labels.gz")):
        assert part in str(caught.value)
    assert snapshot(tmp_path / "mine") == before


# --- the network -----------------------------------------------------------------------------------------------------


def test_a_download_fills_the_cache_once(served, monkeypatch, tmp_path):
    first = archives.obtain(served)
    assert first == (tmp_path / "cache", "the download cache/set/raw")
    assert files_in(tmp_path / "cache") == ["set", "set/raw", *CONTENT]
    assert all((tmp_path / "cache" / path).read_bytes() == content for path, content in CONTENT.items())
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert archives.obtain(served) == first


def test_only_what_is_missing_is_downloaded(served, published, tmp_path):
    (tmp_path / "cache/set/raw").mkdir(parents=True)
    shutil.copy(published / "set/raw/images.gz", tmp_path / "cache/set/raw")
    (published / "set/raw/images.gz").unlink()  # so that the host has no more of it
    assert archives.obtain(served)[0] == tmp_path / "cache"


def test_a_download_shows_a_bar_of_bytes_that_goes_away(served, capsys):
    archives.obtain(served)
    shown = capsys.readouterr().err
    assert re.search(r"\rimages.gz: +0%.* 0.00/10.0k \[.*B/s\]", shown)
    assert re.search(r"\rlabels.gz: +0%.* 0.00/10.0 \[.*B/s\]", shown)
    assert shown.split("\r")[-1] == ""  # the last thing written is a return to the start of a cleared line
    assert shown.split("\r")[-2].strip() == ""
    assert "\n" not in shown


def test_a_host_that_sends_something_else_is_not_believed(served, published, tmp_path):
    (published / "set/raw/images.gz").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UnavailableError) as caught:
        archives.obtain(served)
    for part in ("dead.example does not answer", "sent a file that is not the published images.gz"):
        assert part in str(caught.value)
    assert files_in(tmp_path / "cache") == ["set", "set/raw"]


@pytest.mark.parametrize(
    ("interruption", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("line cut"), UnavailableError)]
)
def test_an_interrupted_download_leaves_nothing_that_passes_for_whole(
    interruption, raised, served, monkeypatch, tmp_path
):
    class Half(io.BytesIO):
        length = 1000

        def read1(self, *args):
            if self.tell():
                raise interruption
            return super().read(100)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Half(bytes(1000)))
    with pytest.raises(raised):
        archives.obtain(served)
    assert files_in(tmp_path / "cache") == ["set", "set/raw"]
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    assert archives.obtain(served)[0] == tmp_path / "cache"


def test_a_host_that_sends_a_byte_now_and_then_is_not_waited_for(served, monkeypatch, tmp_path):
    clock = itertools.count()

    class Slow(io.BytesIO):
        length = 1000

        def read1(self, *args):
            return b"x"

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Slow())
    monkeypatch.setattr(archives.time, "monotonic", lambda: next(clock))
    with pytest.raises(UnavailableError, match=r"failed \(\d+ bytes in 21 seconds\)"):
        archives.obtain(served)
    assert files_in(tmp_path / "cache") == ["set", "set/raw"]


def test_a_host_that_sends_its_headers_byte_by_byte_is_not_waited_for(served, monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "DOWNLOAD_SECONDS", 0.2)
    monkeypatch.setattr(archives, "answers", lambda url: True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: time.sleep(10))
    with pytest.raises(UnavailableError, match=r"failed \(no answer in 0 seconds\)"):
        archives.obtain(served)
    assert files_in(tmp_path / "cache") == ["set", "set/raw"]


def test_what_a_killed_download_left_goes_at_the_next_one_and_a_living_one_stays(served, tmp_path):
    raw = tmp_path / "cache/set/raw"
    raw.mkdir(parents=True)
    with locks.temporary_folder(raw, "download") as living:
        dead = living.with_name(living.name + "dead")
        dead.mkdir()
        (dead / "images.gz").write_bytes(b"half")
        archives.obtain(served)
        assert living.is_dir()
        assert not dead.exists()
    assert files_in(tmp_path / "cache") == ["set", "set/raw", *CONTENT]


def test_parallel_downloads_do_not_meet(served, tmp_path):
    with ThreadPoolExecutor(6) as pool:
        obtained = list(pool.map(lambda _: archives.obtain(served), range(6)))
    assert {folder for folder, _ in obtained} == {tmp_path / "cache"}
    assert files_in(tmp_path / "cache") == ["set", "set/raw", *CONTENT]


def test_an_unwritable_cache_names_the_variable(served, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FWDLIB_CACHE", str(tmp_path / "file/below"))  # not even root can write there
    with pytest.raises(UnavailableError, match=r"cannot be written .* set FWDLIB_CACHE"):
        archives.obtain(served)


def test_hosts_that_never_answer_share_one_budget(monkeypatch):
    assert archives.PROBE_BUDGET < 5
    monkeypatch.setattr(archives, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(archives, "PROBE_BUDGET", 0.25)
    release = threading.Event()

    def silent(*args, **kwargs):
        release.wait(10)
        raise URLError("too late")

    monkeypatch.setattr(urllib.request, "urlopen", silent)
    start = time.perf_counter()
    assert not any(archives.answers(f"https://host{i}.example/file") for i in range(20))
    elapsed = time.perf_counter() - start
    release.set()
    assert 0.2 < elapsed < 1


def test_without_a_network_everything_loads_within_five_seconds(tmp_path):
    cut_off = ["unshare", "-rn"]
    if not shutil.which("unshare") or subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process cut itself off from the network (unshare -rn)")
    script = (
        "import time, palmerpenguins, sklearn.model_selection, sklearn.datasets, torchvision\n"
        "from fwdlib import data\n"
        "start = time.perf_counter()\n"
        "assert data.load_kmnist().source.substitute_for == 'KMNIST'\n"
        "assert data.load_penguins().source.origin.startswith('palmerpenguins')\n"
        "assert len(data.available()) == 8\n"
        "print(time.perf_counter() - start)\n"
    )
    ran = subprocess.run(
        [*cut_off, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"FWDLIB_CACHE": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert float(ran.stdout) < 5


def test_offline_asks_nobody(monkeypatch):
    monkeypatch.setenv("FWDLIB_OFFLINE", "1")
    monkeypatch.setattr(archives.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    assert not archives.answers("http://example.invalid/file")


def test_a_full_disk_is_named(bare_machine, monkeypatch, tmp_path):
    class Full(io.BytesIO):
        length = None

        def read1(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Full())
    archive = Archive("a/b.gz", "0" * 32, ("https://one.test/b.gz",))
    with pytest.raises(UnavailableError, match=rf"could not write {tmp_path / 'cache' / 'a'}: No space left on device"):
        archives.obtain([archive])


@pytest.mark.parametrize(
    ("answered", "set_"), [({}, False), ({"one": False}, True), ({"one": False, "two": True}, False)]
)
def test_children_stay_offline_only_if_nobody_has_answered(monkeypatch, answered, set_):
    monkeypatch.setenv("FWDLIB_OFFLINE", "")
    monkeypatch.setattr(archives, "_answered", answered)
    archives.stay_offline_without_network()
    assert runtime.is_offline() == set_
