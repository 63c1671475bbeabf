"""A convolution of all rows at once and one of each row agree with torch.func.jvp."""

import pytest
import torch

from fwdlib.stacked.rules import convolutions
from tests.stacked.rules.cases import CASES, Calls, assert_agrees_with_jvp, name_of


@pytest.mark.parametrize("limit", [0, 10**9], ids=["one of each row", "one of all rows"])
@pytest.mark.parametrize("key", [key for key in CASES if "conv" in key[0].__name__], ids=name_of)
@torch.no_grad()
def test_convolution_agrees_with_forward_mode_either_way(key, limit, monkeypatch):
    monkeypatch.setattr(convolutions, "NARROW", limit)
    for kinds in (("activation", "parameter"), ("plain", "parameter"), ("activation",), ("parameter", "plain")):
        for num_tangents in (1, 3):
            assert_agrees_with_jvp(Calls(key[0], *CASES[key], kinds), torch.zeros(1), num_tangents=num_tangents)
