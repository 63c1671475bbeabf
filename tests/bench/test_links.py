"""Namespaces and their links: made, as slow as asked for, and gone afterwards. As root on Linux; skipped elsewhere."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from fwdlib.bench import links

SKIP = pytest.mark.skipif(bool(links.obstacle()), reason=links.obstacle() or "there is no obstacle")

PING = """
import os, socket, time
size = 2_000_000
if os.environ["RANK"] == "0":
    with socket.create_server((os.environ["MASTER_ADDR"], 29500)) as server:
        peer, _ = server.accept()
        start, left = time.perf_counter(), size
        while left:
            left -= len(peer.recv(65536))
        open({path!r}, "w").write(str(8 * size / (time.perf_counter() - start)))
else:
    for _ in range(100):
        try:
            client = socket.create_connection((os.environ["MASTER_ADDR"], 29500))
            break
        except OSError:
            time.sleep(0.1)
    client.sendall(bytes(size))
    client.recv(1)
"""


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


@SKIP
def test_namespaces_are_there_for_the_block_and_gone_after_it_even_if_it_fails():
    seen = []

    def fail() -> None:
        with links.slowed(2, 100) as names:
            assert set(names) <= set(namespaces())
            seen.extend(names)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(seen) == 2
    assert not set(seen) & set(namespaces())


@SKIP
@pytest.mark.parametrize("megabits", [20, 100])
def test_a_link_carries_what_it_was_asked_to(megabits, tmp_path):
    path = tmp_path / "rate"
    links.run([sys.executable, "-c", PING.format(path=str(path))], 2, megabits, timeout=60)
    # within the bucket's first fill above, and headers and a busy machine below
    assert 0.6 * megabits <= float(path.read_text()) / 1e6 <= 1.3 * megabits


@SKIP
def test_a_process_that_fails_is_named_with_its_last_words():
    code = "import os, sys; sys.exit('no luck' if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(RuntimeError, match="process 1 ended with code 1: no luck"):
        links.run([sys.executable, "-c", code], 2, None, timeout=60)


def test_what_is_in_the_way_is_said(monkeypatch):
    monkeypatch.setattr(links.sys, "platform", "darwin")
    assert "Linux" in links.obstacle()
    monkeypatch.setattr(links.sys, "platform", "linux")
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    assert "root" in links.obstacle()
    monkeypatch.setattr(links.os, "geteuid", lambda: 0)
    monkeypatch.setattr(links.shutil, "which", lambda name: None)
    assert "iproute2" in links.obstacle()


@pytest.mark.parametrize(("count", "megabits"), [(0, 10), (2, 0)])
def test_numbers_out_of_range_are_refused(count, megabits):
    with pytest.raises(ValueError, match="got 0"), links.slowed(count, megabits):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are read on Linux only")
def test_traffic_counts_what_goes_through_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        start = links.traffic()
        peer, _ = server.accept()
        with peer:
            client.sendall(bytes(12345))
            while len(peer.recv(65536, socket.MSG_PEEK)) < 12345:
                pass
            counted = links.traffic().since(start)
    assert counted.num_bytes == 12345
    assert counted.num_segments >= 1
