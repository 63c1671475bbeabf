"""The claims table: each verdict follows from the data by its rule, and no claim can silently vanish."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest

from fwdlib.statistics import Interval
from report.names import BUDGET
from report.page import render
from report.page.context import PARTS, build_context, load_results
from report.sections import verdicts
from report.sections.claims import CLAIMS
from report.sections.verdicts import Claim, ClaimError, NotMeasuredError, above, below, compatible, judge, made, within
from tests.report.records import make_results, section

RESULTS = Path(__file__).resolve().parents[2] / "report" / "results"
every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:40].lower().replace(" ", "-"))


@pytest.fixture(scope="module")
def context():
    return build_context(load_results(RESULTS))


def interval_at(middle, half=1e-3):
    return Interval(middle - half, middle, middle + half)


@pytest.mark.parametrize(
    ("rule", "holds", "fails", "open_"),
    [
        (below(1), (0.8, 0.9, 0.99), (1.0, 1.1, 1.2), (0.9, 1.0, 1.1)),
        (above(1), (1.01, 1.1, 1.2), (0.8, 0.9, 1.0), (0.9, 1.0, 1.1)),
        (below(1, margin=0.1), (0.95, 0.97, 0.99), (0.91, 1.0, 1.09), (0.89, 1.0, 1.09)),  # fails: equal
        (above(0, 0.2), (0.05, 0.1, 0.15), (-0.15, 0.0, 0.15), (-0.15, 0.1, 0.25)),
        (within(1, 3), (1.0, 2.0, 3.0), (3.1, 3.2, 3.3), (0.5, 2.0, 2.5)),
        (compatible(0), (-1.0, 0.5, 1.0), (0.1, 0.2, 0.3), None),
    ],
)
def test_a_rule_decides_by_the_whole_interval(rule, holds, fails, open_):
    assert verdicts._outcome(rule, Interval(*holds)) == "holds"
    assert verdicts._outcome(rule, Interval(*fails)) == "fails"
    if open_:
        assert verdicts._outcome(rule, Interval(*open_)) == "inconclusive"
    assert verdicts._outcome(rule, Interval(math.nan, 1.0, math.nan)) == "inconclusive"


@pytest.mark.parametrize(
    ("rule", "value", "factor"),
    [
        (below(1), (0.5, 0.9, 1.1), 5),  # half of the half width, 0.2, must fit into 0.1: 4 times touches the bound
        (above(1), (0.7, 0.9, 1.31), 17),  # refuted: 0.41 must fit into 0.1
        (within(1, 3), (-0.1, 2.0, 2.5), 5),  # 2.1 must fit into 1
        (below(1), (0.5, 1.0, 1.5), math.inf),  # on the bound
        (below(1), (math.nan, 0.5, math.nan), math.inf),
    ],
)
def test_how_many_more_seeds_would_decide(rule, value, factor):
    assert verdicts.more_seeds(rule, Interval(*value)) == factor


def test_only_an_inconclusive_claim_says_how_many_more_seeds_it_takes():
    def found(*ends):
        return judge(Claim("s", "t", "m", lambda _: {"": Interval(*ends)}, below(1), {}), {}).more_seeds

    assert found(0.5, 0.9, 1.1) == 5
    assert found(0.5, 0.6, 0.9) is None


@every_claim
def test_other_data_flips_the_verdict(claim):
    found = set()
    for middle in (-1e6, -10, 0, 0.3, 0.95, 1, 1.5, 2, 7, 15, 30, 60, 99, 1e6):
        given = claim._replace(cases=lambda _, middle=middle: {"": interval_at(middle)})
        found.add(judge(given, {}).verdict)
    assert {"holds", "does not hold"} <= found


# --- what is missing -------------------------------------------------------------------------------------------------


class Watched(dict):
    """A dict that notes the keys that are looked up, in it and in what is in it."""

    def __init__(self, content, seen, path=()):
        self.seen, self.path = seen, path
        super().__init__({key: watched(value, seen, (*path, key)) for key, value in content.items()})

    def __getitem__(self, key):
        self.seen.append((*self.path, key))
        return super().__getitem__(key)


def watched(value, seen, path=()):
    if isinstance(value, dict):
        return Watched(value, seen, path)
    if type(value) in (list, tuple):
        return type(value)(watched(item, seen, (*path, i)) for i, item in enumerate(value))
    return value


def without(context, path):
    changed = dict(context) if len(path) == 1 else context | {path[0]: copy.deepcopy(context[path[0]])}
    *way, last = path
    inner = changed
    for key in way:
        inner = inner[key]
    del inner[last]
    return changed


@every_claim
def test_a_claim_whose_key_is_missing_is_an_error_that_names_both(claim, context):
    seen = []
    known = {key: value for key, value in context.items() if key != "claims"}
    if not judge(claim, known).cases:
        pytest.skip("the committed results do not hold its study yet")
    assert judge(claim, watched(known, seen)).cases
    assert len(seen) >= 3
    for path in dict.fromkeys(seen):
        with pytest.raises(ClaimError) as caught:
            judge(claim, without(known, path))
        assert claim.text in str(caught.value).replace("\\'", "'")
        assert repr(path[-1]) in str(caught.value)


@every_claim
def test_a_study_that_was_not_made_is_a_verdict_of_its_own(claim, context):
    found = judge(claim, context | dict.fromkeys(PARTS))
    if found.verdict != "not measured here":
        assert found == judge(claim, context)  # it needs no study
    else:
        assert (found.outcome, found.cases, found.reason) == ("not measured", {}, "")


def test_the_page_says_which_claims_were_not_measured(tmp_path):
    context = build_context(load_results(make_results(tmp_path)))
    assert len(context["claims"]) == len(CLAIMS)
    text = section(render.markdown(context), "claims")
    number = sum(found.outcome == "not measured" for found in context["claims"])
    assert 20 < number < len(CLAIMS)
    assert text.count("**not measured here**") == number
    assert f"{number} need studies that were not made here" in text


def test_a_mode_that_was_not_trained_is_not_measured_and_no_error(context):
    claim = next(claim for claim in CLAIMS if "Kolen" in claim.text)
    feedback = copy.deepcopy(context["feedback"])
    studies = [study for study in feedback["studies"] if study["rows"].pop("DKP", None)]
    for study in studies:
        study["missing"] = ["DKP"]
    assert judge(claim, context | {"feedback": feedback}).outcome == "not measured"
    studies[0]["missing"] = []
    with pytest.raises(ClaimError, match=r"Kolen and Pollack.*'DKP'"):
        judge(claim, context | {"feedback": feedback})


def test_made_tells_what_was_not_measured_from_what_is_missing():
    found = {"cost": {"depth": None, "bench": [1]}}
    assert made(found, "cost", "bench") == [1]
    with pytest.raises(NotMeasuredError, match="depth"):
        made(found, "cost", "depth", "memory")
    with pytest.raises(KeyError, match="steps"):
        made(found, "cost", "steps")


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_several_cases_are_judged_each():
    values = {"a": interval_at(0.5), "b": interval_at(2), "c": interval_at(0.4), "d": interval_at(1)}
    claim = Claim(
        "source", "text", "measure", lambda c: {k: values[k] for k in c["cases"]}, below(1), {"partly": "why"}
    )
    found = judge(claim, {"cases": "abcd"})
    assert (found.outcome, found.verdict, found.reason) == ("partly", "holds for a and c", "why")
    assert [outcome for _, outcome in found.cases.values()] == ["holds", "fails", "holds", "inconclusive"]
    assert judge(claim, {"cases": "bd"}).verdict == "does not hold for b"
    assert judge(claim, {"cases": "ac"}).verdict == "holds"
    assert judge(claim, {"cases": "b"}).verdict == "does not hold"
    assert judge(claim, {"cases": "d"}).verdict == "inconclusive"
    assert judge(claim, {"cases": ""}).verdict == "not measured here"


def test_the_committed_results_judge_every_claim(context):
    assert len(context["claims"]) == len(CLAIMS) >= 25
    waits = [] if (RESULTS / BUDGET).is_file() else ["same time", "its time"]
    outcomes = {f.outcome for f in context["claims"] if not any(words in f.claim.measure for words in waits)}
    assert outcomes <= {"holds", "partly", "fails", "inconclusive"}


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
    assert verdict(build_context(load_results(tmp_path / "results"))) == "does not hold"
