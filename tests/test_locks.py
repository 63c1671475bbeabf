"""One writer per folder."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from fwdlib.locks import LOCK, InUseError, held

HOLD = """
import sys, time
from pathlib import Path
from fwdlib.locks import held
with held(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_the_second_is_told_who_holds_the_folder_and_since_when(tmp_path, holder):
    words = rf"^{re.escape(str(tmp_path))} is in use by process {holder.pid} on .+ since ....-..-.. ..:..:..; wait"
    with pytest.raises(InUseError, match=words), held(tmp_path):
        raise AssertionError


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(tmp_path, holder, end):
    holder.send_signal(end)
    holder.wait()
    with held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_it_waits_as_long_as_it_is_told(tmp_path, holder):
    threading.Timer(0.3, holder.kill).start()
    begun = time.monotonic()
    with held(tmp_path, patience=30):
        assert 0.2 < time.monotonic() - begun < 20


def test_another_folder_is_free(tmp_path, holder):
    (tmp_path / "other").mkdir()
    with held(tmp_path / "other"):
        pass
