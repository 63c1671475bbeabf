"""The claims table: every verdict follows from the data by its rule, and another result gives another verdict."""

import json
import math
import shutil
from pathlib import Path

import pytest

from fwdlib.statistics import Interval
from report.page import context as page_context
from report.sections import claims
from report.sections.claims import CLAIMS, Claim, above, below, compatible, judge, within

RESULTS = Path(__file__).resolve().parents[2] / "report" / "results"
every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:40].lower().replace(" ", "-"))


@pytest.fixture(scope="module")
def context():
    return page_context.context(page_context.load(RESULTS))


def interval_at(middle, half=1e-3):
    return Interval(middle - half, middle, middle + half)


@pytest.mark.parametrize(
    ("rule", "holds", "fails", "open_"),
    [
        (below(1), (0.8, 0.9, 0.99), (1.0, 1.1, 1.2), (0.9, 1.0, 1.1)),
        (above(1), (1.01, 1.1, 1.2), (0.8, 0.9, 1.0), (0.9, 1.0, 1.1)),
        (within(1, 3), (1.0, 2.0, 3.0), (3.1, 3.2, 3.3), (0.5, 2.0, 2.5)),
        (compatible(0), (-1.0, 0.5, 1.0), (0.1, 0.2, 0.3), None),
    ],
)
def test_a_rule_decides_by_the_whole_interval(rule, holds, fails, open_):
    assert claims._outcome(rule, Interval(*holds)) == "holds"
    assert claims._outcome(rule, Interval(*fails)) == "fails"
    if open_:
        assert claims._outcome(rule, Interval(*open_)) == "unclear"
    assert claims._outcome(rule, Interval(math.nan, 1.0, math.nan)) == "unclear"


@every_claim
def test_other_data_flips_the_verdict(claim):
    found = set()
    for middle in (-1e6, -10, 0, 0.3, 0.95, 1, 1.5, 2, 7, 15, 30, 60, 99, 1e6):
        given = claim._replace(cases=lambda _, middle=middle: {"": interval_at(middle)})
        found.add(judge(given, {}).verdict)
    assert {"holds", "does not hold"} <= found


@every_claim
def test_what_was_not_measured_is_not_judged(claim):
    assert judge(claim, {"protocols": None, "functions": None, "tasks": {}}) is None


def test_several_cases_are_judged_each():
    values = {"a": interval_at(0.5), "b": interval_at(2), "c": interval_at(0.4), "d": interval_at(1)}
    claim = Claim(
        "source", "text", "measure", lambda c: {k: values[k] for k in c["cases"]}, below(1), {"partly": "why"}
    )
    found = judge(claim, {"cases": "abcd"})
    assert (found.outcome, found.verdict, found.reason) == ("partly", "holds for a and c", "why")
    assert [outcome for _, outcome in found.cases.values()] == ["holds", "fails", "holds", "unclear"]
    assert judge(claim, {"cases": "bd"}).verdict == "does not hold for b"
    assert judge(claim, {"cases": "ac"}).verdict == "holds"
    assert judge(claim, {"cases": "b"}).verdict == "does not hold"


def test_the_committed_results_judge_at_least_25_claims(context):
    assert len(context["claims"]) >= 25
    assert all(found.verdict for found in context["claims"])


def test_a_changed_result_changes_its_verdict(context, tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "timings.json"
    timings = json.loads(file.read_text())
    forward = timings["tasks"]["mlp"]["methods"]["forward gradient"]
    forward["step_seconds"] = [seconds / 1000 for seconds in forward["step_seconds"]]
    file.write_text(json.dumps(timings))

    def verdict(context):
        return next(f.verdict for f in context["claims"] if "multilayer" in f.claim.source and "Each" in f.claim.text)

    assert verdict(context) == "holds"
    assert verdict(page_context.context(page_context.load(tmp_path / "results"))) == "does not hold"
