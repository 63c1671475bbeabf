import math

import pytest
import torch

from fwdlib.tangents import (
    NAMED,
    TANGENTS,
    Replicates,
    normal,
    orthonormal,
    random_signs,
    rank_one,
    rank_one_factors,
    sample_tangents,
)

PARAMS = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "scale": torch.zeros(())}
P = 16


def flat(tangents):
    return torch.cat([v.reshape(len(v), -1) for v in tangents.values()], dim=1)


@pytest.mark.parametrize("name", TANGENTS)
def test_shapes_are_the_parameters_with_a_leading_axis(name):
    tangents = sample_tangents(PARAMS, 5, name, torch.Generator().manual_seed(0))
    assert {key: v.shape for key, v in tangents.items()} == {key: (5, *p.shape) for key, p in PARAMS.items()}


@pytest.mark.parametrize("name", TANGENTS)
def test_components_have_zero_mean_unit_variance_and_are_uncorrelated(name):
    num, together = 40_000, P if name == "orthonormal" else 40_000  # of them no more than P at a time
    draw = torch.Generator().manual_seed(1)
    v = torch.cat([flat(sample_tangents(PARAMS, together, name, draw)).double() for _ in range(num // together)])
    # 5 sigma: a mean of n has standard deviation 1/sqrt(n), a second moment at most sqrt(2/n)
    assert v.mean(0).abs().max() < 5 / math.sqrt(num)
    assert (v.T @ v / num - torch.eye(P)).abs().max() < 5 * math.sqrt(2 / num)


@pytest.mark.parametrize("name", ["rademacher", "rank-one"])
def test_tangents_are_signs(name):
    v = flat(sample_tangents(PARAMS, 50, name, torch.Generator().manual_seed(0)))
    assert set(v.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("name", ["normal", "rademacher"])
def test_tangent_k_does_not_depend_on_how_many_there_are(name):
    few = flat(sample_tangents(PARAMS, 2, name, torch.Generator().manual_seed(3)))
    many = flat(sample_tangents(PARAMS, 7, name, torch.Generator().manual_seed(3)))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize("sample", [normal, orthonormal, rank_one])
def test_every_replicate_of_a_stack_draws_what_it_draws_alone(sample):
    seeds = (5, 6, 7)
    stacked_params = {name: torch.zeros(3, *p.shape) for name, p in PARAMS.items()}
    replicates = Replicates([torch.Generator().manual_seed(seed) for seed in seeds])
    draw = torch.func.vmap(lambda params, index: sample_tangents(params, 4, sample, replicates.at(index)))
    first, second = (draw(stacked_params, replicates.indices) for _ in range(2))
    for i, seed in enumerate(seeds):
        alone = torch.Generator().manual_seed(seed)
        for stacked in (first, second):
            expected = sample(PARAMS, 4, alone)
            assert all(torch.equal(stacked[name][i], expected[name]) for name in PARAMS)


def test_a_sampler_of_your_own_is_called():
    ones = sample_tangents(PARAMS, 2, lambda params, k, _: {n: torch.ones(k, *p.shape) for n, p in params.items()})
    assert torch.equal(flat(ones), torch.ones(2, P))


def test_keeps_the_dtype_of_each_parameter():
    tangents = sample_tangents({"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2)}, 3)
    assert (tangents["a"].dtype, tangents["b"].dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("num_tangents", [0, -1, 1.5])
def test_refuses_a_bad_number_of_tangents(num_tangents):
    with pytest.raises(ValueError, match=r"num_tangents must be a whole number of at least 1"):
        sample_tangents(PARAMS, num_tangents)


def test_refuses_unknown_tangents():
    with pytest.raises(
        ValueError, match=r"tangents must be one of 'normal', 'rademacher', 'orthonormal', 'rank-one', 'unit', got"
    ):
        sample_tangents(PARAMS, 1, "uniform")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_refuses_parameters_without_a_tangent(dtype):
    with pytest.raises(TypeError, match=r"params\['x'\] must be a real floating tensor, got torch\."):
        sample_tangents({"x": torch.zeros(2, dtype=dtype)})


@pytest.mark.parametrize("value", [1.0, None, [1.0]])
def test_refuses_parameters_that_are_no_tensors(value):
    with pytest.raises(TypeError, match=r"params\['x'\] must be a real floating tensor, got"):
        sample_tangents({"x": value})


@pytest.mark.parametrize("name", NAMED)
def test_refuses_parameters_without_an_element(name):
    with pytest.raises(ValueError, match="params has only empty tensors, x"):
        sample_tangents({"x": torch.zeros(0, 3)}, 1, name)


def test_refuses_a_sampler_without_names_and_a_generator_that_is_none():
    with pytest.raises(ValueError, match="must return a dict with a tensor for each parameter, got list"):
        sample_tangents({"x": torch.zeros(3)}, 1, lambda p, k, g: [])
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator.*got 3"):
        sample_tangents({"x": torch.zeros(3)}, 1, "normal", 3)


def test_refuses_no_parameters():
    with pytest.raises(ValueError, match="nothing to differentiate"):
        sample_tangents({})


# orthonormal


@pytest.mark.parametrize("num", [1, 5, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_tangents_are_at_right_angles_and_of_length_sqrt_p(num, dtype):
    params = {name: p.to(dtype) for name, p in PARAMS.items()}
    v = flat(orthonormal(params, num, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(v @ v.T, P * torch.eye(num, dtype=dtype), rtol=0, atol=200 * torch.finfo(dtype).eps)


def test_orthonormal_tangents_span_what_the_normal_ones_do():
    v, w = (flat(sample(PARAMS, 3, torch.Generator().manual_seed(0))).double() for sample in (orthonormal, normal))
    torch.testing.assert_close(w @ v.T @ v / P, w, rtol=1e-5, atol=1e-5)
    assert ((v * w).sum(1) > 0).all()  # the first along the first, each later one on the side of its own


def test_one_orthonormal_tangent_is_uniform_over_directions():
    # what QR alone would give is not: its signs follow the routine. The mean of a component has deviation 1/sqrt(n), of
    # its fourth power 3 P / (P + 2), that of a point of the sphere, and less than sqrt(96/n)
    num = 5000
    draws = Replicates([torch.Generator().manual_seed(0)] * num)
    tangents = torch.func.vmap(lambda index: orthonormal(PARAMS, 1, draws.at(index)))(draws.indices)
    v = flat({name: v[:, 0] for name, v in tangents.items()}).double()
    assert v.mean(0).abs().max() < 5 / math.sqrt(num)
    assert ((v**4).mean(0) - 3 * P / (P + 2)).abs().max() < 5 * math.sqrt(96 / num)


def test_refuses_more_orthonormal_tangents_than_there_are_dimensions():
    with pytest.raises(ValueError, match=r"num_tangents must be at most 16, the number of parameters, .* got 17"):
        sample_tangents(PARAMS, 17, "orthonormal")


# signs, 64 from each word


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (64,), (7, 11), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_signs_are_signs_of_the_shape_and_type(shape, dtype):
    signs = random_signs(shape, torch.zeros(1, dtype=dtype), torch.Generator().manual_seed(0))
    assert (signs.shape, signs.dtype) == (torch.Size(shape), dtype)
    assert (signs.abs() == 1).all()


def test_random_signs_have_zero_mean_and_are_uncorrelated_within_and_across_words():
    num = 20_000
    signs = random_signs((num, 128), torch.zeros(()), torch.Generator().manual_seed(1)).double()
    # 5 sigma: each mean, and each mean product of two signs, has standard deviation 1/sqrt(n)
    assert signs.mean(0).abs().max() < 5 / math.sqrt(num)
    assert (signs.T @ signs / num - torch.eye(128)).abs().max() < 5 / math.sqrt(num)


def test_one_generator_gives_the_same_signs_and_then_others():
    like, draw = torch.zeros(()), torch.Generator().manual_seed(2)
    first, second = random_signs((100,), like, draw), random_signs((100,), like, draw)
    assert torch.equal(first, random_signs((100,), like, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, second)


def test_rank_one_tangents_are_the_outer_products_of_their_factors():
    params = PARAMS | {"kernel": torch.zeros(2, 3, 2)}
    dense = rank_one(params, 3, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    factors = rank_one_factors(params, 3, lambda shape, like: random_signs(shape, like, draw))
    assert torch.equal(dense["weight"], torch.einsum("ki,kj->kij", *factors["weight"]))
    assert torch.equal(dense["kernel"], torch.einsum("ki,kjl->kijl", *factors["kernel"]))
    assert torch.equal(dense["scale"], factors["scale"].left)
    assert factors["scale"].right is None
