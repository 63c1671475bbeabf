"""Local losses: exact cases in float64 against autograd, closed forms within 5 sigma, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.data import Dataset
from fwdlib.methods.blocks import blocks_of
from fwdlib.methods.local_losses import HEADS, LocalBackprop, LocalForwardGradient, LocalGreedyBackprop
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.trainer.networks import MIXERS, LocalMixer, MixerSize
from fwdlib.training import make_optimizer, train
from tests.methods.chains import (
    MODELS,
    TARGETS,
    Border,
    Chain,
    Shifted,
    assert_within_5_sigma,
    cnn,
    exact,
    grads_of,
    mlp,
    relu_net,
    seeded,
)

FIXED = make_optimizer("SGD", 1e-300)
SGD_ONE = make_optimizer("SGD", 1.0)  # a step of the heads is minus their gradient
RULES = {"L-BP": LocalBackprop, "LG-BP": LocalGreedyBackprop, "LG-FG-A": LocalForwardGradient}
GREEDY = ("LG-BP", "LG-FG-A")
ONE_UNIT = {"num_groups": 10**6, "grid": 10**6}  # in each part


ALL_MODELS = MODELS | {"ReLU": relu_net}


def with_heads(rule, *arguments, **options):
    """Make a rule whose heads are random, because the first step of one with zero heads is zero."""
    estimator = rule(*arguments, **options)
    draw = seeded(7)
    estimator.matrix.copy_(0.3 * torch.randn(estimator.matrix.shape, generator=draw, dtype=torch.float64))
    return estimator


def by_autograd(model, inputs, heads, grid=2, head="grid", greedy=True):
    """The gradients of the sum of all losses, of parameters and heads; greedy: every block's input is detached."""
    heads = [weight.clone().requires_grad_() for weight in heads]
    total, activation = 0, inputs
    *hidden, readout = blocks_of(model)
    for block, weight in zip(hidden, heads, strict=True):
        activation = block(activation.detach() if greedy else activation)
        features = activation
        if activation.dim() == 4:
            features = F.adaptive_avg_pool2d(activation, grid).flatten(2)
            features = features.mean(2) if head == "mean" else features
        total = total + F.cross_entropy(features.flatten(1) @ weight.flatten(1).t(), TARGETS)
    total = total + F.cross_entropy(readout(activation.detach()), TARGETS)
    names = list(params_of(model))
    found = torch.autograd.grad(total, [*model.parameters(), *heads])
    return dict(zip(names, found, strict=False)), found[len(names) :]


# exact cases


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("make", ALL_MODELS)
@pytest.mark.parametrize("rule", ["L-BP", "LG-BP"])
def test_local_backprop_is_the_gradient_of_the_local_losses(rule, make, head, recorded):
    model, inputs = ALL_MODELS[make]()
    options = {"grid": 2, "head": head, "recorded": recorded, "optimizer": SGD_ONE}
    estimator = with_heads(RULES[rule], model, inputs, **options)
    before = [weight.clone() for weight in estimator.feedback]
    expected, of_heads = by_autograd(copy.deepcopy(model), inputs, before, head=head, greedy=rule in GREEDY)
    grads = grads_of(estimator, model, inputs)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)
    for after, weight, gradient in zip(estimator.feedback, before, of_heads, strict=True):
        torch.testing.assert_close(weight - after, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("make", ALL_MODELS)
def test_with_one_unit_in_each_part_the_forward_gradient_is_exact(make, head, num_tangents):
    model, inputs = ALL_MODELS[make]()
    options = {"grid": ONE_UNIT["grid"], "head": head, "optimizer": FIXED}
    local = with_heads(LocalGreedyBackprop, model, inputs, **options)
    forward = with_heads(
        LocalForwardGradient, model, inputs, **options, num_groups=ONE_UNIT["num_groups"], num_tangents=num_tangents
    )
    expected = grads_of(local, copy.deepcopy(model), inputs)
    for name, grad in grads_of(forward, model, inputs, generator=seeded()).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)


def test_the_losses_of_the_parts_have_the_gradient_of_the_loss_of_the_block():
    # Replicated feature aggregation: each part's own loss, with the values of the other parts as constants.
    torch.manual_seed(0)
    features = torch.randn(6, 8, 4, dtype=torch.float64, requires_grad=True)  # examples, channels, patches
    weight = torch.randn(3, 8, 4, dtype=torch.float64)

    def loss(features):
        return F.cross_entropy(torch.einsum("bcp,ocp->bo", features, weight), TARGETS)

    def parts():
        for group in range(4):
            for patch in range(4):
                own = torch.zeros_like(features, dtype=torch.bool)
                own[:, 2 * group : 2 * group + 2, patch] = True
                yield loss(torch.where(own, features, features.detach()))

    (whole,) = torch.autograd.grad(loss(features), features)
    (of_parts,) = torch.autograd.grad(sum(parts()), features)
    torch.testing.assert_close(of_parts, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", ALL_MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_the_readout_is_exact_and_the_loss_is_the_model_s(rule, make):
    model, inputs = ALL_MODELS[make]()
    expected = exact(copy.deepcopy(model), inputs)
    estimate = with_heads(RULES[rule], model, inputs)(BatchLoss(model, inputs, TARGETS), params_of(model))
    torch.testing.assert_close(estimate.loss, F.cross_entropy(model(inputs), TARGETS).detach())
    for name in list(expected)[-2:]:
        torch.testing.assert_close(estimate.grads[name], expected[name], rtol=1e-10, atol=1e-14)


def test_no_tangent_crosses_a_border():
    # Other signs for one block change the gradients of this block alone.
    model, inputs = relu_net()
    options = {"num_groups": 2, "optimizer": FIXED}
    estimator = with_heads(LocalForwardGradient, model, inputs, **options)
    signs = estimator._draw(6, seeded())
    found = []
    for block in (None, 0, 1):
        changed = signs.clone()
        if block is not None:
            changed[..., [0, 2, 4] if block == 0 else [8, 10]] *= -1
        estimator._draw = lambda *_, changed=changed: changed
        found.append(grads_of(estimator, model, inputs))
    names = list(found[0])
    for of_block, grads in zip((names[:4], names[4:8]), found[1:], strict=True):
        differs = [name for name in names if not torch.equal(grads[name], found[0][name])]
        assert set(differs) <= set(of_block)
        assert of_block[0] in differs


@pytest.mark.parametrize("rule", GREEDY)
def test_no_error_is_carried_back_from_block_to_block(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Border(), nn.Linear(5, 5), nn.Tanh(), Border(), nn.Linear(5, 3))
    inputs = torch.randn(6, 4)
    assert grads_of(RULES[rule](model, inputs), model, inputs)["0.weight"].isfinite().all()


@pytest.mark.parametrize("recorded", [False, True])
def test_the_jvps_are_the_derivatives_along_the_signs(recorded):
    # Along all signs of all blocks: the sum of what the gradients of the shifts say.
    torch.manual_seed(0)
    model = Chain(Shifted(4, 6), Shifted(6, 4), nn.Linear(4, 3)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    local = grads_of(with_heads(LocalGreedyBackprop, model, inputs), model, inputs)
    forward = with_heads(LocalForwardGradient, model, inputs, num_groups=2, num_tangents=3, recorded=recorded)
    signs = forward._draw(6, seeded()).split([6, 4], -1)
    jvps = forward(BatchLoss(model, inputs, TARGETS), params_of(model), generator=seeded()).jvps
    expected = sum((u * local[f"chain.{i}.shift"]).flatten(1).sum(1) for i, u in enumerate(signs))
    torch.testing.assert_close(jvps, expected, rtol=1e-10, atol=1e-13)


def mixer(size=(2, 2, 8, 4)):
    """A small LocalMixer: 2 blocks with inner layers, 2 x 2 patches, 8 channels in 4 groups."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXERS, "tiny", MixerSize(*size))
        model = LocalMixer("tiny", 1, 8, 3).double()
    return model, torch.randn(6, 1, 8, 8, dtype=torch.float64)


MIXER = {"grid": 2, "head": "mean", "optimizer": FIXED}


@pytest.mark.parametrize("rule", ["L-BP", "LG-BP"])
def test_inside_a_block_with_several_layers_the_exact_rules_are_autograd(rule):
    model, inputs = mixer()
    estimator = with_heads(RULES[rule], model, inputs, **MIXER)
    expected, _ = by_autograd(model, inputs, estimator.feedback, head="mean", greedy=rule in GREEDY)
    for name, grad in grads_of(estimator, model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("recorded", [False, True])
def test_signs_at_the_inner_layers_estimate_the_same_gradient(recorded):
    model, inputs = mixer()
    expected = grads_of(with_heads(LocalGreedyBackprop, model, inputs, **MIXER), model, inputs)
    options = {"num_groups": 4, "num_tangents": 20, "recorded": recorded}
    estimator = with_heads(LocalForwardGradient, model, inputs, **MIXER, **options)
    draw = seeded()
    estimates = [grads_of(estimator, model, inputs, generator=draw) for _ in range(150)]
    assert estimates[0].keys() == expected.keys()
    for name, grad in expected.items():
        samples = torch.stack([estimate[name] for estimate in estimates])
        assert_within_5_sigma(samples, grad)
        is_readout = name.startswith("readout")
        assert bool((samples.std(0) > 0).any()) is not is_readout


def test_a_unit_of_an_inner_layer_acts_on_its_own_part_only_where_the_network_says_so():
    model, inputs = mixer()
    for block, x in zip(model.blocks()[:2], (inputs, torch.randn(6, 8, 2, 2, dtype=torch.float64)), strict=True):
        for layer, keeps in block.layers().items():
            outputs = []
            hook = layer.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
            output = block(x)
            hook.remove()
            (slopes,) = torch.autograd.grad(output[:, 2:4, 0, 1].square().sum(), outputs)  # of one part
            outside = torch.ones_like(slopes, dtype=torch.bool)
            outside[:, 2:4, 0, 1] = False
            assert bool((slopes[outside] == 0).all()) is keeps


# statistics


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("make", ALL_MODELS)
def test_it_is_unbiased_for_the_local_losses(make, head):
    model, inputs = ALL_MODELS[make]()
    model.eval()  # BatchNorm's statistics do not move between the draws
    options = {"optimizer": FIXED, "grid": 2, "head": head}
    expected = grads_of(with_heads(LocalGreedyBackprop, model, inputs, **options), model, inputs)
    estimator = with_heads(LocalForwardGradient, model, inputs, **options, num_groups=2, num_tangents=20)
    draw = seeded()
    estimates = [grads_of(estimator, model, inputs, generator=draw) for _ in range(150)]
    for name, grad in expected.items():
        assert_within_5_sigma(torch.stack([estimate[name] for estimate in estimates]), grad)


@pytest.mark.parametrize("num_tangents", [1, 4])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_the_variance_is_that_of_the_part(num_groups, num_tangents):
    torch.manual_seed(0)
    model = Chain(Shifted(4, 6), Shifted(6, 6), nn.Linear(6, 3)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    expected = grads_of(with_heads(LocalGreedyBackprop, model, inputs, optimizer=FIXED), model, inputs)
    options = {"num_groups": num_groups, "num_tangents": num_tangents, "optimizer": FIXED, "recorded": True}
    estimator = with_heads(LocalForwardGradient, model, inputs, **options)
    draw = seeded()
    found = [grads_of(estimator, model, inputs, generator=draw) for _ in range(800)]
    for name in ("chain.0.shift", "chain.1.shift"):
        v = expected[name].square()
        of_parts = v.unflatten(1, (num_groups, -1)).sum(2).repeat_interleave(6 // num_groups, 1)
        squares = torch.stack([(of_draw[name] - expected[name]).square() for of_draw in found])
        assert_within_5_sigma(squares, (of_parts - v) / num_tangents)


def test_units_that_a_relu_has_switched_off_add_no_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    model[0].bias.data[20:] = -100.0
    inputs = torch.randn(6, 4, dtype=torch.float64)
    estimator = with_heads(LocalForwardGradient, model, inputs, num_groups=1, optimizer=FIXED, recorded=True)
    live = model[:2](inputs).detach() != 0
    v = by_autograd(model, inputs, estimator.feedback)[0]["0.bias"]
    outputs = model[:2](inputs).detach().requires_grad_()
    loss = F.cross_entropy(outputs @ estimator.feedback[0].flatten(1).t(), TARGETS)
    (slopes,) = torch.autograd.grad(loss, outputs)
    expected = ((slopes.square() * live).sum(1, keepdim=True) - slopes.square()) * live  # of each unit and example
    draw = seeded()
    found = torch.stack([grads_of(estimator, model, inputs, generator=draw)["0.bias"] for _ in range(1200)])
    assert_within_5_sigma((found - v).square(), expected.sum(0))
    assert not found[:, 20:].any()


# what surrounds it


@pytest.mark.parametrize("rule", RULES)
def test_recorded_it_does_the_same(rule):
    # Over several steps, through a change of mode and of the batch's size, while the heads learn.
    ends = []
    for recorded in (False, True):
        model, inputs = relu_net()
        optimizer = make_optimizer("Adam", 0.01, fused=True)
        estimator, draw, seen = RULES[rule](model, inputs, recorded=recorded, optimizer=optimizer), seeded(), []
        options = {"generator": draw} if rule == "LG-FG-A" else {}
        for is_training, size in [(True, 6), (True, 6), (True, 5), (False, 6)]:
            model.train(is_training)
            params = params_of(model)
            estimate = estimator(BatchLoss(model, inputs[:size], TARGETS[:size]), params, **options)
            for name, grad in estimate.grads.items():
                params[name].sub_(0.1 * grad)
            seen += [estimate.loss, estimate.jvps, *estimate.grads.values()]
        ends.append([*seen, *estimator.feedback, *model.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_that_is_loaded_goes_on(rule):
    model, inputs = cnn()
    first, second = (RULES[rule](model, inputs, grid=2) for _ in range(2))
    for _ in range(3):
        grads_of(first, model, inputs)
    second.load_state_dict(first.state_dict())
    found = []
    for estimator in (first, second):
        options = {"generator": seeded()} if rule == "LG-FG-A" else {}
        found.append(grads_of(estimator, model, inputs, **options))
    torch.testing.assert_close(first.matrix, second.matrix)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)
    with pytest.raises(ValueError, match="different model"):
        RULES[rule](model, inputs, head="mean", grid=2).load_state_dict(first.state_dict())


def test_sizes_that_do_not_divide_get_the_largest_number_that_does():
    model = nn.Sequential(nn.Conv2d(1, 15, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15 * 36, 3))
    inputs = torch.randn(6, 1, 6, 6)
    estimator = LocalForwardGradient(model, inputs, num_groups=16, grid=4)
    assert tuple(estimator.feedback[0].shape) == (3, 15, 9)  # 3 x 3 patches of 2 x 2 positions
    assert grads_of(estimator, model, inputs)["0.weight"].shape == (15, 1, 3, 3)


@pytest.mark.parametrize("rule", RULES)
def test_it_trains_a_network(rule):
    def build():
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    inputs = torch.eye(4)[[0, 1, 2, 0, 1, 2]] + 0.1 * torch.randn(6, 4, generator=seeded())
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    data = Dataset(inputs, targets, inputs, targets, ("a", "b", "c"), None)
    estimator = RULES[rule](build(), inputs, optimizer=make_optimizer("Adam", 0.01))
    history = train(build, data, estimator, learning_rate=0.5, max_iterations=200, progress=None)
    assert history.runs[0].train_loss[-1] < 0.05
    assert history.runs[0].test_errors[-1] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [({"grid": 0}, "grid must be"), ({"head": "own"}, "head must be"), ({"num_groups": 0}, "num_groups must be")],
)
def test_options_out_of_range_are_refused(options, words):
    model, inputs = mlp()
    with pytest.raises(ValueError, match=words):
        LocalForwardGradient(model, inputs, **options)


def test_outputs_that_are_no_images_are_refused():
    model = Chain(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(15, 3)))
    with pytest.raises(ValueError, match=r"returns \(B, 3, 5\).*flatten"):
        LocalGreedyBackprop(model, torch.zeros(2, 3, 4))
