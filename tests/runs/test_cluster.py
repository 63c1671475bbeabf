"""Batches on a real Dask cluster on this machine: what is killed in the middle, and what is the same as without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from dask import config

from fwdlib import data
from fwdlib.runs import cluster, stamps
from fwdlib.runs.batch import finished, run_batch
from fwdlib.runs.jobs import Job, failures
from fwdlib.runs.places import PlaceError
from tests import notebook_files
from tests.clusters import dask, listens_at, runs_in
from tests.notebook_files import content_of, stamp_times
from tests.processes import wait_until

pytestmark = pytest.mark.slow  # starts processes

NUM_JOBS = 24
TELL = """\
import json, os, time
from pathlib import Path
folder = Path(os.environ["FWDLIB_RESULTS"])
seen = {"seed": seed, "threads": os.environ["OMP_NUM_THREADS"], "quick": os.environ.get("FWDLIB_QUICK")}
(folder / "deep").mkdir()
(folder / "deep" / "seen.json").write_text(json.dumps(seen))
(folder / "bytes.bin").write_bytes(bytes([seed, 0, 255]))
print("saved", folder / "bytes.bin")"""
WAIT = "while gate and not Path(gate).exists():\n    time.sleep(0.05)"
KILL = (
    "import os, psutil\nif seed == 1:\n    psutil.Process().parents()[1].kill()  # the Dask worker\n    os.read(0, 1)"
)


@pytest.fixture(scope="module", autouse=True)
def light(tmp_path_factory):
    """Spare each process the 1.7 s in which jsonschema builds a grammar for URLs, where that package is installed."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "rfc3987_syntax.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


def write_notebook(path: Path, *sources: str) -> Path:
    return notebook_files.write_notebook(path, "seed = 0\ngate = ''", *sources)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cluster of two workers without nannies: one that dies stays dead."""
    with dask(tmp_path_factory.mktemp("dask")) as there:
        there.workers = [there.worker(name, "--no-nanny") for name in ("one", "two")]
        yield there


def run_command(notebook: Path, output: Path, *words: str) -> subprocess.Popen:
    seeds = ",".join(map(str, range(NUM_JOBS)))
    command = [sys.executable, "-m", "fwdlib", "run", "--notebook", str(notebook), "--set", f"seed={seeds}"]
    env = os.environ | {"FWDLIB_QUICK": "1", "FWDLIB_OFFLINE": "1"}
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  # background jobs ignore it
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "preexec_fn": reset}
    return subprocess.Popen([*command, "--output", str(output), *words], env=env, **options)


@pytest.fixture(scope="module")
def story(shared, tmp_path_factory):
    """24 jobs: the client is killed, then interrupted, then a worker is killed; and the same without a cluster."""
    folder = tmp_path_factory.mktemp("story")
    notebook, far, near = write_notebook(folder / "tiny.ipynb", TELL, WAIT), folder / "far", folder / "near"
    told = {"folder": folder, "far": far, "near": near}

    def send(number: int, sent: signal.Signals) -> tuple[str, int, dict[str, int]]:
        client = run_command(notebook, far, "--scheduler", shared.address)
        assert wait_until(lambda: len(stamp_times(far)) >= number and runs_in(shared.folder), 120)
        told["listens"] = listens_at([psutil.Process(p.pid) for p in (client, shared.scheduler, *shared.workers)])
        client.send_signal(sent)
        _, said = client.communicate(timeout=60)
        assert wait_until(lambda: not runs_in(shared.folder), 60), "the workers run on for nobody"
        return said, client.returncode, stamp_times(far)

    told["killed"] = send(3, signal.SIGKILL)
    told["stopped"] = send(6, signal.SIGINT)
    client = run_command(notebook, far, "--scheduler", shared.address, "--resume")
    assert wait_until(lambda: len(stamp_times(far)) >= 10, 120)
    first = shared.workers.pop(0)
    assert wait_until(lambda: psutil.Process(first.pid).children(), 60)  # it has a job
    first.kill()
    told["end"] = (*client.communicate(timeout=300), client.returncode)
    shared.workers.append(shared.worker("three", "--no-nanny"))
    local = run_command(notebook, near, "--jobs", "2")
    told["local"] = (*local.communicate(timeout=300), local.returncode)
    return told


def test_a_batch_on_a_cluster_is_that_of_this_machine(story):
    assert story["local"][2] == 0, story["local"][1]
    far, near = content_of(story["far"]), content_of(story["near"])
    assert far.keys() == near.keys()
    assert [name for name in far if far[name] != near[name]] == []
    assert len([name for name in far if name.endswith("bytes.bin")]) == NUM_JOBS
    seen = json.loads((story["far"] / "results" / "tiny-seed=7" / "deep" / "seen.json").read_text())
    assert seen == {"seed": 7, "threads": "1", "quick": "1"}


def test_a_killed_worker_costs_no_job_and_none_is_there_twice(story):
    printed, said, code = story["end"]
    assert code == 0, said
    assert len([line for line in said.splitlines() if line.startswith("again ")]) >= 1
    ends = sorted(line.split()[1] for line in said.splitlines() if line.startswith(("done ", "reused ")))
    assert ends == sorted(f"tiny-seed={seed}" for seed in range(NUM_JOBS))
    assert f"of {NUM_JOBS} jobs" in printed
    assert len(list((story["far"] / "results").iterdir())) == NUM_JOBS  # no folder of a run is left


def test_after_a_killed_client_only_what_is_missing_runs(story):
    before, _, after = story["killed"][2], story["stopped"][0], story["stopped"][2]
    assert 3 <= len(before) < len(after) < NUM_JOBS
    assert {name: after[name] for name in before} == before  # untouched
    reused = [line for line in story["stopped"][0].splitlines() if line.startswith("reused ")]
    assert len(reused) == len(before)
    reused = [line for line in story["end"][1].splitlines() if line.startswith("reused ")]
    assert len(reused) == len(after)
    assert {name: stamp_times(story["far"])[name] for name in after} == after


def test_an_interrupt_says_how_to_go_on(story):
    said, code, _ = story["stopped"]
    assert code == 130
    assert said.rstrip().endswith("stopped. What was finished is kept; the same command goes on")
    assert "Traceback" not in said


def test_lines_tell_where_a_job_runs(story):
    said = story["killed"][0]
    assert said.splitlines()[0].startswith("cluster  tcp://127.0.0.1:")
    assert "started  tiny-seed=0 (4 cells) on " in said
    assert " on one\n" in said
    assert " on two\n" in said


def test_nothing_listens_beyond_this_machine(story):
    assert story["listens"] == {"127.0.0.1"}


@pytest.fixture
def folders(tmp_path):
    return {"results": tmp_path / "results", "executed": tmp_path / "executed"}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=lambda sent: sent.name)
def test_without_its_scheduler_a_batch_ends_soon_and_keeps_what_is_finished(
    tmp_path, folders, monkeypatch, capfd, sent
):
    (tmp_path / "dask").mkdir()
    notebook = write_notebook(tmp_path / "tiny.ipynb", TELL, WAIT)
    jobs = [Job(notebook, {"seed": 0}, "quick"), Job(notebook, {"gate": str(tmp_path / "never")}, "slow")]
    assert cluster.SILENCE_SECONDS + cluster.PING_SECONDS < 25
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", 5)
    real, lost = cluster.Cluster.check, []
    with dask(tmp_path / "dask") as there:
        there.worker("one", "--no-nanny")

        def check(self):
            if not lost and (folders["executed"] / "quick.json").exists() and self.sent["slow"].where:
                there.scheduler.send_signal(sent)
                lost.append(time.monotonic())
            real(self)

        monkeypatch.setattr(cluster.Cluster, "check", check)
        with (
            pytest.raises(
                PlaceError, match=r"scheduler at tcp://127.0.0.1:\d+ is gone. Everything finished so far is kept"
            ),
            cluster.Cluster(there.address) as place,
        ):
            run_batch(jobs, **folders, place=place)
        assert time.monotonic() - lost[0] < 15
        assert [path.name for path in folders["executed"].glob("*.json")] == ["quick.json"]
        assert not list(folders["results"].glob(".running-*"))
        if sent == signal.SIGKILL:
            assert wait_until(lambda: not runs_in(there.folder), 60)
    assert "Traceback" not in capfd.readouterr().err
    (again,) = finished(jobs, **folders)
    assert again.job.name == "quick"


@pytest.mark.parametrize("lost", ["worker", "scheduler"])
def test_a_batch_whose_workers_do_not_come_back_ends_with_words(tmp_path, folders, monkeypatch, lost):
    (tmp_path / "dask").mkdir()
    notebook = write_notebook(tmp_path / "tiny.ipynb", TELL, WAIT)
    monkeypatch.setattr(cluster, "DESERTED_SECONDS", 4)
    real, gone = cluster.Cluster.check, []
    with dask(tmp_path / "dask", DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="9") as there:
        worker = there.worker("one", "--no-nanny")

        def check(self):
            if not gone and self.sent and self.sent["slow"].where:
                worker.kill()
                if lost == "scheduler":
                    there.restart_scheduler()
                gone.append(time.monotonic())
            real(self)

        monkeypatch.setattr(cluster.Cluster, "check", check)
        slow = Job(notebook, {"gate": str(tmp_path / "never")}, "slow")
        with (
            pytest.raises(
                PlaceError, match=r"(has had no worker for \d+ s|is gone)\. Everything finished so far is kept"
            ),
            cluster.Cluster(there.address) as place,
        ):
            run_batch([slow], **folders, place=place)
        assert time.monotonic() - gone[0] < 30


def test_the_time_out_holds_for_a_worker_that_hangs(tmp_path, folders, monkeypatch):
    (tmp_path / "dask").mkdir()
    notebook = write_notebook(tmp_path / "tiny.ipynb", TELL, WAIT)
    monkeypatch.setattr(cluster.notebook, "OVERDUE", 2)
    real = cluster.Cluster.check
    with dask(tmp_path / "dask") as there:
        worker = there.worker("one", "--no-nanny")

        def check(self):
            if self.sent and self.sent["slow"].where:
                worker.send_signal(signal.SIGSTOP)
            real(self)

        monkeypatch.setattr(cluster.Cluster, "check", check)
        slow, begun = Job(notebook, {"gate": str(tmp_path / "never")}, "slow"), time.monotonic()
        with cluster.Cluster(there.address) as place:
            (outcome,) = run_batch([slow], **folders, place=place, timeout=3)
        assert time.monotonic() - begun < 60
    assert outcome.status == "failed"
    assert outcome.error == "the notebook took longer than 3 s, and then did not end: its process hangs, or was stopped"
    assert not list(folders["results"].iterdir())


def test_a_scheduler_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    before = {thread.ident for thread in threading.enumerate()}
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(PlaceError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 "):
        cluster.Cluster("tcp://127.0.0.1:9")
    with pytest.raises(PlaceError, match="answers at nonsense"):
        cluster.Cluster("nonsense://x")
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never says anything
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(PlaceError, match=rf"answers at {address} \(TimeoutError\)"):
            cluster.Cluster(address)
    assert {thread.ident for thread in threading.enumerate()} <= before  # none left behind


def refused(shared, tmp_path, folders) -> str:
    notebook = write_notebook(tmp_path / "tiny.ipynb", "raise ValueError('it ran')")
    with pytest.raises(PlaceError) as caught, cluster.Cluster(shared.address) as place:
        run_batch([Job(notebook)], **folders, place=place)
    assert not list(folders["results"].iterdir())
    assert "the same command goes on" in str(caught.value)
    return str(caught.value)


def test_a_worker_with_other_code_is_refused(shared, tmp_path, folders, monkeypatch):
    real = stamps.sources()
    monkeypatch.setattr(stamps, "sources", lambda *_: real | {"training.py": "another"})
    assert "is not like this machine: its fwdlib is another (training.py)" in refused(shared, tmp_path, folders)


def test_a_worker_with_other_data_is_refused(shared, tmp_path, folders, monkeypatch):
    monkeypatch.setenv("FWDLIB_OFFLINE", "1")
    here = data.lacking()
    monkeypatch.setattr(data, "lacking", lambda: [*here, "digits"])
    assert "it has digits, which this machine has not" in refused(shared, tmp_path, folders)


def test_differences_are_named(monkeypatch):
    wanted = cluster._code_state() | {"data": ["KMNIST"]}
    monkeypatch.setattr(data, "lacking", None)
    cluster._lacking_data.cache_clear()
    asked = []

    def run(command, environment):
        asked.append(environment["FWDLIB_OFFLINE"])
        return subprocess.CompletedProcess(command, 0, stdout='a warning\n["KMNIST", "MNIST"]\n')

    monkeypatch.setattr(cluster.children, "run", run)
    assert cluster._difference(wanted, {"FWDLIB_OFFLINE": "1"}) == cluster.NO_DATA.format("MNIST")
    assert cluster._difference(wanted | {"data": ["KMNIST", "MNIST"]}, {"FWDLIB_OFFLINE": "1"}) == ""
    assert cluster._difference(wanted | {"data": ["KMNIST", "MNIST"]}, {"FWDLIB_OFFLINE": "1"}) == ""
    assert asked == ["1", "1"]  # anew after a refusal, then never again
    versions = wanted["versions"] | {"torch": "1.0"}
    told = cluster._difference(wanted | {"versions": versions, "code": {}}, {"FWDLIB_OFFLINE": "1"})
    assert told.startswith(
        f"torch is {wanted['versions']['torch']} there and 1.0 here; its fwdlib is another (__init__.py"
    )


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl, to make a certificate")
def test_over_tls_and_a_job_whose_workers_die_is_lost_and_not_failed(tmp_path, folders, monkeypatch, capsys):
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fwdlib -keyout key.pem -out cert.pem"
    subprocess.run(request.split(), cwd=tmp_path, check=True, capture_output=True)
    tls = {
        f"{role}__{part.upper()}": f"{part}.pem"
        for role in ("SCHEDULER", "WORKER", "CLIENT")
        for part in ("cert", "key")
    }
    tls = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(tmp_path / file) for name, file in tls.items()}
    tls["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] = str(tmp_path / "cert.pem")
    ours = {name[5:].lower().replace("__", ".").replace("ca_file", "ca-file"): file for name, file in tls.items()}
    (tmp_path / "dask").mkdir()
    notebook = write_notebook(tmp_path / "tiny.ipynb", TELL, KILL)
    jobs = [Job(notebook, {"seed": seed}, f"seed{seed}") for seed in (1, 2)]
    with dask(tmp_path / "dask", "tls", **tls, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1") as there:
        there.worker("one")  # with a nanny, which starts it again
        monkeypatch.setattr(cluster, "CONNECT_SECONDS", 3)
        for address in (there.address, there.address.replace("tls", "tcp")):  # we have no certificates yet
            with pytest.raises(PlaceError, match=r"speak TLS, with certificates|speak plain TCP"):
                cluster.Cluster(address)
        monkeypatch.setattr(cluster, "CONNECT_SECONDS", 20)
        with config.set(ours), cluster.Cluster(there.address) as place:
            lost, done = run_batch(jobs, **folders, place=place, num_jobs=1)
    assert (done.status, done.error) == ("done", "")
    assert lost.status == lost.cause == "lost"
    assert lost.error == "lost: each of 2 workers that had it died"
    assert "LOST     seed1 on one: lost: each of 2 workers" in capsys.readouterr().err
    assert failures([lost, done]).splitlines()[-1] == "  executed copy: none"


def test_without_a_scheduler_nothing_of_dask_is_imported(tmp_path):
    notebook = write_notebook(tmp_path / "tiny.ipynb", TELL)
    code = (
        "import sys; from fwdlib import cli\n"
        f"code = cli.main(['run', '--notebook', {str(notebook)!r}, '--output', {str(tmp_path / 'out')!r}])\n"
        "print(code, sorted({'dask', 'distributed'} & sys.modules.keys()))"
    )
    env = os.environ | {"FWDLIB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"
