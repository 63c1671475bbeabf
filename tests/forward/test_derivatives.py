"""Derivatives of functions with several results along several tangents."""

from __future__ import annotations

import torch

from fwdlib.forward.derivatives import pushforward, repeated_pushforward, unrolled_pushforward


def test_all_ways_to_push_tangents_forward_give_the_same():
    draw = torch.Generator().manual_seed(0)
    point = {"x": torch.rand(4, generator=draw), "a": torch.rand((), generator=draw), "unused": torch.ones(2)}
    tangents = {name: torch.randn(3, *x.shape, generator=draw) for name, x in point.items()}
    count = torch.tensor([1, 2])

    def function(some):
        return [some["x"].sin() * some["a"], some["a"].exp(), some["x"].detach()], [count + 1]

    values, slopes, others = pushforward(function, point, tangents)
    every = [tuple(point)] * 3
    for found in (
        repeated_pushforward(function, point, tangents),
        unrolled_pushforward(function, point, tangents, every),
    ):
        torch.testing.assert_close(found, (values, slopes, others))
    torch.testing.assert_close(
        slopes[0][1], point["x"].cos() * tangents["x"][1] * point["a"] + values[0] / point["a"] * tangents["a"][1]
    )
