"""One process, alone; numbers of processes."""

from __future__ import annotations

import pytest

from fwdlib.trainer.processes import prime_factors


@pytest.mark.parametrize(
    ("number", "factors"), [(1, []), (2, [2]), (12, [2, 2, 3]), (97, [97]), (1000, [2] * 3 + [5] * 3)]
)
def test_prime_factors(number, factors):
    assert prime_factors(number) == factors
