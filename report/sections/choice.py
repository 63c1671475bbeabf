"""The table "Should I use it?": for each situation what to take, the number that says so, and where it comes from.

The report, the front page of the site and the start notebook print the same rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from report.names import PLAIN
from report.sections.verdicts import NotMeasuredError, made
from report.wording import count, interval, megabytes, number


class Row(NamedTuple):
    """A situation and the advice for it, in plain Markdown without links."""

    situation: str
    take: str
    measured: str
    section: str
    """The name of the report's section that the numbers are from."""


def rows(context: dict[str, Any]) -> list[Row]:
    """Return the rows whose studies were made.

    Args:
        context: of the page, with every section; None for a section whose study was not made.
    """
    found = []
    for row in (_backprop, _few_inputs, _online, _not_recorded, _memory, _links, _no_way_back, _forward_only):
        try:
            found.append(row(context))
        except NotMeasuredError:
            continue
    return found


def markdown(found: list[Row], page: str) -> str:
    """Return the rows as a table in Markdown.

    Args:
        found: the rows.
        page: where the report is, from the page that shows the table.

    Example:
        >>> print(markdown([Row("one process", "backprop", "5 times", "cost")], "report.html"))
        | your situation | take | measured in the report |
        |:---|:---|:---|
        | one process | backprop | 5 times ([cost](report.html#cost)) |
    """
    lines = [
        f"| {row.situation} | {row.take} | {row.measured} ([{row.section}]({page}#{row.section})) |" for row in found
    ]
    return "\n".join(["| your situation | take | measured in the report |", "|:---|:---|:---|", *lines])


def _backprop(context: dict[str, Any]) -> Row:
    # the strictest comparison of whole trainings: every method at its own best learning rate
    models = [model for model in made(context, "protocols")["models"].values() if model["threshold"] is not None]
    if not models:
        raise NotMeasuredError("protocols")
    ratios = [model["fair"][model["best"]]["against"]["total"] for model in models]
    pairs = zip(ratios, models, strict=True)
    times = " and ".join(f"{interval(ratio)} times as long ({model['title'].lower()})" for ratio, model in pairs)
    return Row(
        "backprop runs, and fits into memory",
        "backprop",
        f"with the best forward gradient and tuned learning rates, a training takes {times}",
        "protocols",
    )


def _few_inputs(context: dict[str, Any]) -> Row:
    found = made(context, "sensitivity")
    ratios = [row["headline"].estimate for row in found["rows"]]
    border, at = found["map"]["borders"]["compiled reverse mode"], found["map"]["border_at"]
    most = f"; up to about {number(border, 2)} parameters at {count(at)} steps" if border else ""
    slowest = max((ratio.estimate for ratio in found["torch"].values()), default=None)
    eager = f"; torch's own forward mode takes {number(1 / slowest, 2)} times as long or more" if slowest else ""
    return Row(
        "few parameters, many steps: a simulator of small state, a recurrent layer whose units do not mix",
        "forward mode, compiled: exact (fwdlib.sensitivity_gradient)",
        f"{number(min(ratios), 2)} to {number(max(ratios), 2)} of the time of the fastest backprop on {len(ratios)} "
        f"cases, faster on {len(found['faster'])}{most}{eager}",
        "sensitivity",
    )


def _online(context: dict[str, Any]) -> Row:
    row = min(made(context, "sensitivity")["memory"].values(), key=lambda row: row["share"])
    return Row(
        "the gradient is wanted while the data come in",
        "forward mode beside the state",
        f"it keeps no past: {number(100 * row['share'], 2)} % of eager reverse mode's memory at "
        f"{count(row['at'])} steps",
        "sensitivity",
    )


def _not_recorded(context: dict[str, Any]) -> Row:
    rows = made(context, "sensitivity")["memory"].values()
    stopped = [
        (m, row["methods"])
        for row in rows
        for name, m in row["methods"].items()
        if m["expected"] and name.startswith("reverse")
    ]
    if not stopped:
        raise NotMeasuredError("stopped")
    worst, methods = max(stopped, key=lambda found: found[0]["expected"])
    at = worst["stopped"]
    used = {name: m["bytes"][m["steps"].index(at)] for name, m in methods.items() if at in m["steps"]}
    rivals = {name: of for name, of in used.items() if name.startswith("reverse")}
    best = min(rivals, key=rivals.get, default=None)
    rest = f", {megabytes(rivals[best])} ({best})" if best else ""
    own = f", {megabytes(used['forward, compiled'])} (forward mode)" if "forward, compiled" in used else ""
    return Row(
        "a program too long to record for a way back",
        "forward mode",
        f"memory at {count(at)} steps: {megabytes(worst['expected'])} (eager reverse mode, extrapolated){rest}{own}",
        "sensitivity",
    )


def _memory(context: dict[str, Any]) -> Row:
    depth = made(context, "cost", "depth")
    ours, theirs = made(depth, "rank_one", "memory"), made(depth, "backprop", "memory")
    rival = made(depth, "rivals", "exact")
    transformer = made(context, "cost", "rivals").get("GPT-style transformer")
    there = (
        f"; of the rival's on a transformer {number(100 * transformer['exact']['share'], 2)} %" if transformer else ""
    )
    return Row(
        "a network whose activations or gradients do not fit into memory",
        "backprop with checkpoints, updated in the backward pass; if that does not fit, a difference of two losses or, "
        "in deep networks of plain layers, rank-one tangents, both noisy",
        f"rank-one: {number(100 * ours / theirs, 2)} % of plain backprop's memory at {depth['last']} layers, "
        f"{number(100 * rival['share'], 2)} % of that rival's ({rival['name']}){there}",
        "cost",
    )


def _links(context: dict[str, Any]) -> Row:
    found = made(context, "scaling")
    slowest = made(found, "slowest")
    fewest = min(found["most"], key=found["most"].get)
    descent = found["descent"]
    compressed = f", {interval(slowest['rival'])} times as fast as with {found['rival']}" if slowest["rival"] else ""
    but = (
        f", but {number(descent['ratio'], 2)} times as many steps to a training loss of {number(descent['level'])}"
        if descent
        else ""
    )
    return Row(
        "several machines on a slow link",
        "backprop that sends less, such as PowerSGD, or no exchange where each machine has enough data; derivatives "
        "along tangents where neither will do",
        f"{count(found['most'][fewest])} bytes a step in place of {megabytes(found['gradient'])}: at "
        f"{slowest['megabits']} Mbit/s a step is {interval(slowest['ratios'][fewest])} times as fast{compressed}{but}",
        "scaling",
    )


def _no_way_back(context: dict[str, Any]) -> Row:
    rows = _large(context)
    fdfa, backprop = made(rows, "FDFA")["accuracy"], made(rows, "BP")["accuracy"]
    random = f", DFA {interval(rows['DFA']['accuracy'])} %" if "DFA" in rows else ""
    steps = context["feedback"]["steps"]
    time = steps and steps["against"].get("MNIST-2x800", {}).get("FDFA")
    cost = f"; a step of FDFA takes {interval(time[PLAIN])} times as long" if time else ""
    return Row(
        "hardware that cannot carry errors back through the layers",
        "feedback: random (DFA), or learned by forward mode (FDFA)",
        f"FDFA {interval(fdfa)} % right on MNIST{random}, backprop {interval(backprop)} %{cost}",
        "feedback",
    )


def _forward_only(context: dict[str, Any]) -> Row:
    rows = _large(context)
    modes = ("FG", "FG-RANK1", "FG-A", "LG-FG-A")
    best = max((m for m in modes if m in rows), key=lambda m: rows[m]["accuracy"].estimate)
    local = ", and give each layer a loss of its own" if best == "LG-FG-A" else ""
    return Row(
        "many parameters, and nothing but forward passes",
        f"a forward gradient with little noise: perturb the layers' outputs{local}",
        f"{interval(rows[best]['accuracy'])} % right on MNIST ({best}), backprop {interval(rows['BP']['accuracy'])} %",
        "feedback",
    )


def _large(context: dict[str, Any]) -> dict[str, Any]:
    rows = made(context, "feedback", "large", "rows")
    if not {"BP", "FG"} <= rows.keys():
        raise NotMeasuredError("feedback")
    return rows
