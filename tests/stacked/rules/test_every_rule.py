"""Each rule against torch.func.jvp in float64, with tangents in each of its arguments."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import resolve_name

from fwdlib.stacked.explain import explain
from fwdlib.stacked.forward_pass import RULES
from tests.stacked.rules.cases import CASES, FALLS_BACK, Calls, assert_agrees_with_jvp, name_of
from tests.stacked.rules.test_constants import CONSTANTS

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize("key", CASES, ids=name_of)
@torch.no_grad()
def test_rule_agrees_with_forward_mode(key):
    several = [("activation", "parameter")]
    if len(CASES[key][0]) > 1:  # else the loss would be a constant
        several.append(("plain", "parameter"))
    for kinds in (*several, ("activation",), ("parameter",)):
        for num_tangents in (1, 3) if kinds in several else (1,):
            assert_agrees_with_jvp(Calls(key[0], *CASES[key], kinds), torch.zeros(1), num_tangents=num_tangents)


def test_importing_the_engine_registers_the_rules():
    code = "from fwdlib.stacked.forward_pass import RULES; assert RULES"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_rule_has_a_case():
    ours = {function for function, rule in RULES.items() if rule.__module__.startswith("fwdlib.stacked.rules.")}
    assert ours == {function for function, _ in CASES} | set(CONSTANTS) | {
        torch._weight_norm,
        F.embedding_bag,
    }  # without torch.func.jvp


@pytest.mark.parametrize("key", [key for key in CASES if key not in FALLS_BACK], ids=name_of)
@torch.no_grad()
def test_rule_answers(key):
    calls = explain(Calls(key[0], *CASES[key], ("activation", "parameter")), torch.zeros(1))
    assert (calls[calls["function"] == resolve_name(key[0])]["by"] == "rule").all()
