"""Slow links on one machine: each process in a network namespace of its own, joined by a switch.

Each namespace has one interface. A token bucket limits its bits per second in either direction. The kernel does all of
it, so the programs need no change. It needs Linux, and root.

The kernel also counts what a process has sent, over these links or any others.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from fwdlib import children
from fwdlib.checks import check_count, check_positive

PORT = 29500
DEVICE = "eth0"
DELAY = "200ms"  # longest wait of a packet before it is dropped


def obstacle() -> str:
    """Return why links cannot be slowed here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "only Linux has network namespaces"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    lacking = [name for name in ("ip", "tc") if not shutil.which(name)]
    if lacking:
        return f"{' and '.join(lacking)} not found: install Debian's package iproute2, which has ip and tc"
    try:
        with slowed(1, 100):
            return ""
    except OSError as error:
        return str(error)


@contextmanager
def slowed(count: int, megabits: float | None) -> Iterator[list[str]]:
    """Make namespaces for the duration of a ``with`` block, and yield their names.

    Args:
        count: number of namespaces.
        megabits: rate of each link, per second and direction; None for no limit.

    Raises:
        OSError: if the system refuses; the message quotes it.
        ValueError: if a number is out of its range.
    """
    check_count("count", count)
    if megabits is not None:
        check_positive("megabits", megabits)
    hub = f"fwdlib-{os.getpid()}-hub"
    names = [f"fwdlib-{os.getpid()}-{rank}" for rank in range(count)]
    with ExitStack() as undo:
        for name in (hub, *names):
            _run("ip", "netns", "add", name)
            undo.callback(children.run, ["ip", "netns", "del", name])
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "switch", "up")
        for rank, name in enumerate(names):
            plug = f"port{rank}"
            _run("ip", "-n", hub, "link", "add", plug, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _run("ip", "-n", hub, "link", "set", plug, "master", "switch", "up")
            _run("ip", "-n", name, "address", "add", f"{address(rank)}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            for where, device in ((hub, plug), (name, DEVICE)):
                if megabits is not None:
                    bucket = f"{max(64, megabits * 1.25):.0f}kb"  # a hundredth of a second, or one large packet
                    shape = ("rate", f"{megabits}mbit", "burst", bucket, "latency", DELAY)
                    _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *shape)
        yield names


def address(rank: int) -> str:
    """Return the address of the process of this rank."""
    return f"10.77.0.{rank + 1}"


def run(command: Sequence[str], count: int, megabits: float | None, timeout: float = 600) -> None:
    """Run a command in each of several namespaces, with the environment variables that torchrun sets.

    Args:
        command: the program and its arguments.
        count: number of processes.
        megabits: as in :func:`slowed`.
        timeout: seconds.

    Raises:
        OSError: if the system refuses.
        RuntimeError: if a process fails; the message ends with the last of its output.
        TimeoutExpired: if they take longer.
    """
    started: list[children.Child] = []
    with slowed(count, megabits) as names, ExitStack() as ending:
        for rank, name in enumerate(names):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            place |= {"MASTER_ADDR": address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE}
            environment = {"OMP_NUM_THREADS": "1", **os.environ, **place}
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            child = children.start(["ip", "netns", "exec", name, *command], environment=environment, **streams)
            started.append(ending.enter_context(child))
        outputs = [child.communicate(timeout=timeout)[0] for child in started]
    for rank, (child, output) in enumerate(zip(started, outputs, strict=True)):
        if child.returncode:
            raise RuntimeError(f"process {rank} ended with code {child.returncode}: {output[-2000:]}")


def _run(*command: str) -> None:
    done = children.run(command)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}`: {done.stderr.strip()}")


class Traffic(NamedTuple):
    """What this process has sent over TCP, as the kernel counts it."""

    num_bytes: int
    """Bytes of data, with the headers of the exchange library, once each: also those that wait to be sent."""
    num_segments: int
    """Packets, acknowledgements included. Each also has 52 bytes of headers with IPv4, and those of the link."""

    def since(self, start: Traffic) -> Traffic:
        """Return the traffic after ``start``."""
        return Traffic(self.num_bytes - start.num_bytes, self.num_segments - start.num_segments)


def traffic() -> Traffic:
    """Return what the open TCP connections of this process have sent.

    Raises:
        OSError: on any system but Linux, which alone counts it.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("the TCP traffic of a process can be counted on Linux only")
    num_bytes = num_segments = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except FileNotFoundError:  # closed after it was listed
            continue
        # tcpi_segs_out, tcpi_notsent_bytes, tcpi_bytes_sent and tcpi_bytes_retrans of <linux/tcp.h>
        segments, waiting = struct.unpack_from("=I4xI", info, 136)
        sent, again = struct.unpack_from("=QQ", info, 200)
        num_segments += segments
        num_bytes += sent - again + waiting
    return Traffic(num_bytes, num_segments)
