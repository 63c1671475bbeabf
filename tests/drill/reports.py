"""Faults of the report: killed while it draws, built twice, built by two, and records with hostile text."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fwdlib.locks import LOCK
from report.output import HIDDEN, MANIFEST
from tests.drill.harness import Trial, differing, item
from tests.report import records
from tests.report.pages import Page, squeezed

REPORT = ("-m", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def drawing(trial: Trial, output: Path) -> tuple[object, ...]:
    """Return the command that draws made-up records into a folder."""
    saved = trial.folder / "saved"
    if not saved.exists():
        records.make_results(saved / "results")
    if not output.exists():
        (output / "results").mkdir(parents=True)
        for path in (saved / "results").iterdir():
            (output / "results" / path.name).write_bytes(path.read_bytes())
        (output / MANIFEST).write_text("[]")
    return (*REPORT, "--only-render", "--output", output, "--studies", saved / "results")


def draws(trial: Trial, output: Path) -> None:
    """Wait until the processes that draw have made a first figure, and then for a random time."""
    figures = output / HIDDEN / "files" / "figures"
    trial.until(lambda: figures.is_dir() and any(figures.iterdir()))
    trial.pause(0, 1.5)


@item(
    "ends",
    "A report that is ended while it draws leaves no process, and the pages of the build before. The next build ends "
    "as if nothing had been.",
    short=True,
)
def drawing_killed(trial: Trial) -> str:
    """End a build by SIGKILL, SIGTERM and SIGINT at random moments while it draws, and build again."""
    output = trial.folder / "page"
    command = drawing(trial, output)
    trial.run(*command)
    before, seconds = records.contents(output), []
    for sent in SIGNALS[:1] if trial.short else SIGNALS:
        process = trial.start(*command)
        draws(trial, output)
        ended = trial.end(process, sent)
        seconds.append(trial.all_end())
        assert "Traceback" not in ended.said, ended.said[-500:]
        assert differing(before, records.contents(output)) == []
    trial.run(*command)
    assert differing(before, records.contents(output)) == []
    assert [path.name for path in (output / HIDDEN).iterdir()] == [LOCK]
    return f"no process after {max(seconds):.1f} s; the pages before were whole, and the next ones are the same bytes"


def is_study(command: list[str]) -> bool:
    return command[:1] == [sys.executable] and "report.studies" in command[2]


@item("ends", "No study outlives the command that has started it.", short=True)
def evidence_killed(trial: Trial) -> str:
    """End report.evidence by SIGKILL, SIGTERM or SIGINT at a random moment while two studies run."""
    told = []
    for sent in [trial.moments.choice(SIGNALS)] if trial.short else SIGNALS:
        process = trial.start("-m", "report.evidence", trial.folder / "evidence")
        trial.until(lambda: len([each for each in trial.processes() if is_study(each.cmdline())]) >= 2)
        trial.pause(0, 4)
        trial.end(process, sent)
        told.append(f"{sent.name}: {trial.all_end():.1f} s")
    trial.give_up(trial.folder / "evidence")
    return f"all ended, {', '.join(told)}"


@item("ends", "No measurement outlives the benchmark.")
def bench_killed(trial: Trial) -> str:
    """SIGKILL `bench` at a random moment."""
    process = trial.start("-m", "fwdlib", "bench", "--quick", "--no-sweeps", "--out", trial.folder / "bench.json")
    trial.until(lambda: len(trial.processes()) >= 2)
    trial.pause(0, 6)
    trial.end(process, signal.SIGKILL)
    return f"all ended after {trial.all_end(30):.1f} s"  # a C++ compiler first finishes the file that it is making


@item("locked", "One build writes to a folder. A second one is told who has it and since when.", short=True)
def two_reports(trial: Trial) -> str:
    """Start a second build on the same folder while the first one draws."""
    output = trial.folder / "page"
    command = drawing(trial, output)
    first = trial.start(*command)
    trial.until((output / HIDDEN / "files").is_dir)
    assert f"in use by process {first.pid} on" in (said := trial.run(*command, code=1).said), said
    assert trial.end(first).code == 0, trial.said(first)
    return "the second was refused with the first's number; the first ended with exit code 0"


@item("whole", "The same results give the same bytes: figures, HTML and PDF.")
def built_twice(trial: Trial) -> str:
    """Build the report twice from the committed results, and compare all files."""
    folders = [trial.folder / name for name in ("one", "two")]
    for folder in folders:
        trial.run(*REPORT, "--only-render", "--output", folder)
    one, two = map(records.contents, folders)
    assert differing(one, two) == []
    return f"{len(one)} files, all the same"


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[press](javascript:alert(1))",
    "![picture](nowhere.png)",
    "<urlopen error timed out>",
    "**loud** $x$ `code` #set @clanuwat2018 {{ 7 * 6 }} \\textbf{x}",
    '" onmouseover="alert(1)',
)


@item("trusted", "Text in a record is text on the page: it becomes no tag, link, picture or formula.", short=True)
def hostile_record(trial: Trial) -> str:
    """Put tags, scripts, links, Markdown and formulas into the sources and parameters of records, and build."""
    output = trial.folder / "page"
    command = drawing(trial, output)
    trial.run(*command)
    clean = Page(output / "report.html")

    def edit(record: records.Record) -> None:
        record.source.update(origin=" ".join(HOSTILE), citation=HOSTILE[0], licence=HOSTILE[1])
        record.parameters.update(optimizer=" ".join(HOSTILE), **{"<b>": HOSTILE[2]})
        record.environment["processor"] = " ".join(HOSTILE)

    for path in (output / "results").glob("[0-9]*.json"):
        records.change(output / "results", path.stem, edit)
    trial.run(*command)
    page = Page(output / "report.html")
    for tag in ("script", "img", "a", "b", "strong", "iframe"):
        assert len(page.all(tag)) <= len(clean.all(tag)), f"a new <{tag}>"
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")], names
    links = [attributes.get("href") or "" for attributes in page.all("a")]
    assert not [link for link in links if link.strip().lower().startswith("javascript")]
    lost = [text for text in HOSTILE if squeezed(text) not in page.text]
    assert lost == [], f"not on the page: {lost}"
    return f"{len(HOSTILE)} texts stand on the page as they are"
