"""Faults of the data: damaged archives, hosts that fail, substitutes, and Ctrl-C while an archive is unpacked."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drill.batches import RUN
from tests.drill.harness import ROOT, Trial, contents, differing, item
from tests.notebook_files import write_notebook
from tests.small_sets import write_kmnist

# KMNIST is the small one of the tests, in this process.
PUBLISHED = """\
import json, os
from torchvision import datasets
datasets.KMNIST.resources = [tuple(pair) for pair in json.loads(os.environ["PUBLISHED"])]
"""
COMMAND = "import sys\nfrom fwdlib import cli\nsys.exit(cli.main(sys.argv[1:]))"
SLOWLY = """\
import time
unpack = datasets.utils.extract_archive
datasets.utils.extract_archive = lambda *words, **options: (unpack(*words, **options), time.sleep(100))
"""
LOAD = """\
from fwdlib.data import load_kmnist
from fwdlib.estimators import backprop_gradient
from fwdlib.models import CNN
from fwdlib.results import save_run
from fwdlib.training import train
data = load_kmnist(num_train=20, num_test=10)
history = train(CNN, data, backprop_gradient, learning_rate=0.1, max_iterations=1, progress=None)
save_run("shapes", title="backprop", history=history, alone=history, parameters={"seed": seed}, source=data.source)"""
IMAGES, LABELS = "KMNIST/raw/train-images-idx3-ubyte.gz", "KMNIST/raw/t10k-labels-idx1-ubyte.gz"
KMNIST = ("train", "--dataset", "KMNIST", "--n-layers", "1", "--batch-size", "20", "--epochs", "1")


def published(trial: Trial) -> dict[str, str]:
    """Write the small KMNIST into ``published``, and return the variable that PUBLISHED needs."""
    return {"PUBLISHED": json.dumps(write_kmnist(trial.folder / "published"))}


# --- archives --------------------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, content: path.write_bytes(b""),
    "a byte short": lambda path, content: path.write_bytes(content[:-1]),
    "cut in half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "a byte long": lambda path, content: path.write_bytes(content + b"x"),
    "one bit flipped": lambda path, content: path.write_bytes(flip(content)),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "a page for logging in": lambda path, content: path.write_text("<html>Please log in</html>"),
    "another set's file": lambda path, content: shutil.copy(path.with_name(Path(LABELS).name), path),
    "unpacked": lambda path, content: path.write_bytes(__import__("gzip").decompress(content)),
    "packed twice": lambda path, content: path.write_bytes(__import__("gzip").compress(content)),
    "missing": lambda path, content: path.unlink(),
    "a folder": lambda path, content: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path, content: (path.unlink(), path.symlink_to("nowhere")),
}
ABSENT = ("missing", "a folder", "a link to nowhere")
LOOK = """\
import json, os, sys
from fwdlib import data
found = {}
for way in json.loads(sys.argv[1]):
    os.environ["FWDLIB_DATA"] = way
    try:
        found[way] = data.load_images("KMNIST").source.substitute_for or "used"
    except data.DamagedFileError as error:
        found[way] = str(error)
print(json.dumps(found))"""


@item(
    "trusted",
    "An archive is used only if it has the published hash. A damaged one is named, neither used nor changed, and no "
    "substitute stands in for it.",
    short=True,
)
def archives_damaged(trial: Trial) -> str:
    """Damage an archive in thirteen ways, and load its set; then name the damaged file to `train`."""
    variables, ways = published(trial), {}
    for name, damage in DAMAGE.items():
        ways[name] = Path(shutil.copytree(trial.folder / "published", trial.folder / name))
        damage(ways[name] / IMAGES, (ways[name] / IMAGES).read_bytes())
    before = {name: contents(folder) for name, folder in ways.items()}
    folders = json.dumps([str(folder) for folder in [trial.folder / "published", *ways.values()]])
    said = trial.run("-c", PUBLISHED + LOOK, folders, **variables).said
    found = json.loads(said.splitlines()[-1])
    assert found.pop(str(trial.folder / "published")) == "used"
    for name, folder in ways.items():
        text = found[str(folder)]
        assert text == "KMNIST" if name in ABSENT else f"{folder / IMAGES} is damaged" in text, f"{name}: {text}"
        assert differing(before[name], contents(folder)) == [], f"{name}: files have changed"
    words = ("-c", PUBLISHED + COMMAND, *KMNIST, "--log-dir", trial.folder / "log")
    said = trial.run(*words, code=1, **variables, FWDLIB_DATA=str(ways["cut in half"])).said
    assert f"{ways['cut in half'] / IMAGES} is damaged" in said
    assert not (trial.folder / "log").exists()
    return f"{len(ways) - len(ABSENT)} named as damaged, {len(ABSENT)} as missing; no file was used or changed"


@item("ends", "What is unpacked is removed when the command is stopped, and when the batch of a notebook is killed.")
def unpacking_stopped(trial: Trial) -> str:
    """Stop `train` by SIGINT, and `run` by SIGINT, SIGTERM and SIGKILL, while an archive is unpacked."""
    variables = published(trial) | {"FWDLIB_DATA": str(trial.folder / "published")}
    slow = PUBLISHED + SLOWLY
    notebook = write_notebook(trial.folder / "loads.ipynb", "seed = 0", slow + "from fwdlib import data", LOAD)
    ways = [(signal.SIGINT, ("-c", slow + COMMAND, *KMNIST, "--log-dir", trial.folder / "log"))]
    ways += [
        (sent, (*RUN, notebook, "--output", trial.folder / sent.name))
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    ]
    for sent, words in ways:
        process = trial.start(*words, **variables)
        trial.until(lambda: [path for path in trial.temporary.rglob("*ubyte") if path.stat().st_size])
        trial.end(process, sent)
        trial.all_end(12)
        trial.until(lambda: not list(trial.temporary.iterdir()), 1)
    return "nothing was left, four times"


# --- hosts -----------------------------------------------------------------------------------------------------------


class Host(http.server.SimpleHTTPRequestHandler):
    """Stands for all hosts, as their proxy: it answers HEAD, and GET in one of several ways."""

    way = "503"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        if self.way == "503":
            self.send_error(503)
        elif self.way == "serves":
            self.path = f"/KMNIST/raw/{Path(self.path).name}"
            super().do_GET()
        else:
            head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n"
            trickle = bytes(1000) if self.way == "trickles" else head[:17] + b"X-Slow: " + b"x" * 1000
            try:
                self.wfile.write(head + b"\r\n" if self.way == "trickles" else b"")
                for byte in trickle:
                    self.wfile.write(bytes([byte]))
                    time.sleep(1)
            except OSError:
                self.close_connection = True  # the client has given up


@contextmanager
def host(trial: Trial, way: str) -> Iterator[dict[str, str | None]]:
    """Yield the variables with which all hosts are one here that behaves in one way."""
    handler = functools.partial(type("Way", (Host,), {"way": way}), directory=str(trial.folder / "published"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield proxied(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


def proxied(address: str) -> dict[str, str | None]:
    names = ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "FWDLIB_OFFLINE")
    return {"http_proxy": address, "https_proxy": address} | dict.fromkeys(names)


@item(
    "said",
    "A substitute is said on stderr at the start and at the end, and in the record; results on it are not reused once "
    "the data are there.",
    short=True,
)
def substitute(trial: Trial) -> str:
    """Run a notebook on KMNIST while the host answers HEAD with 200 and GET with 503; again; and with the data."""
    variables, output = published(trial), trial.folder / "out"
    notebook = write_notebook(trial.folder / "shapes.ipynb", "seed = 0", PUBLISHED + "import fwdlib", LOAD)
    words = ("-c", PUBLISHED + COMMAND, "run", "--notebook", notebook, "--output", output)
    record = output / "results" / "shapes.json"
    with host(trial, "503") as net:
        first = trial.run(*words, **variables, **net).said
    assert "KMNIST is not available" in first.splitlines()[0], first
    assert "used digits in place of KMNIST" in first.splitlines()[-1], first
    assert json.loads(record.read_text())["source"]["substitute_for"] == "KMNIST"
    if not trial.short:
        again = trial.run(*words, **variables).said  # offline
        assert "reused   shapes" in again, again
        assert "used digits in place of KMNIST" in again.splitlines()[-1], again
    last = trial.run(*words, **variables, FWDLIB_DATA=str(trial.folder / "published")).said
    assert "done     shapes" in last, last
    assert "SUBSTITUTE" not in last, last
    assert json.loads(record.read_text())["source"]["substitute_for"] is None
    return "said at both ends and recorded; not reused once the data were there"


@item("said", "Without data and network, a notebook of the course says which substitute it uses.")
def notebook_offline(trial: Trial) -> str:
    """Run notebook 3a in quick mode with no data and a network that refuses every connection."""
    said = trial.run(*RUN, ROOT / "notebooks/3a_cnn_backprop.ipynb", "--output", trial.folder / "out", **dead()).said
    assert "KMNIST is not available" in said.splitlines()[0], said
    assert "3a_cnn_backprop used digits in place of KMNIST" in said.splitlines()[-1], said
    return "said at the start and at the end"


def dead() -> dict[str, str | None]:
    return proxied("http://127.0.0.1:9")


@item("trusted", "A download moves into the cache when it is whole and has the published hash; half a one never does.")
def downloads(trial: Trial) -> str:
    """Fetch KMNIST from a host that serves it after SIGKILL in a download that trickles."""
    variables, words = published(trial), ("-c", PUBLISHED + COMMAND, "data", "fetch", "KMNIST")
    with host(trial, "trickles") as net:
        process = trial.start(*words, **variables, **net)
        trial.until(lambda: list((trial.folder / "cache").rglob("*.gz")))
        trial.end(process, signal.SIGKILL)
    whole = [path for path in (trial.folder / "cache").rglob("*.gz") if ".download" not in path.parent.name]
    assert whole == []
    with host(trial, "serves") as net:
        assert "ready in" in trial.run(*words, **variables, **net).said
    files = {name: content for name, (_, content) in contents(trial.folder / "cache").items() if name.endswith(".gz")}
    assert files == {
        name: content for name, (_, content) in contents(trial.folder / "published").items() if name.endswith(".gz")
    }
    return "the killed one left nothing that passes for whole; the other is byte for byte the published one"


@item("ends", "No host is waited for without limit, also if it sends a byte now and then.")
def host_trickles(trial: Trial) -> str:
    """Fetch KMNIST from a host that sends a byte a second: of the file, and of the headers."""
    variables, words = published(trial), ("-c", PUBLISHED + COMMAND, "data", "fetch", "KMNIST")
    begun = time.monotonic()
    with host(trial, "trickles") as net, host(trial, "trickles headers") as other:
        for process in [trial.start(*words, **variables, **each) for each in (net, other)]:
            ended = trial.end(process, seconds=60)
            assert ended.code == 1, ended.said
            assert "KMNIST is not available" in ended.said, ended.said
    return f"both given up within {time.monotonic() - begun:.0f} s"
