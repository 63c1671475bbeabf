"""The feedback rules: exact cases in float64, unbiasedness and second moments within 5 sigma, and what they refuse."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fwdlib.data import Dataset
from fwdlib.estimators import backprop_gradient
from fwdlib.methods.activity import ActivityForwardGradient, ControlVariateForwardGradient
from fwdlib.methods.blocks import blocks_of
from fwdlib.methods.feedback import (
    DirectFeedbackAlignment,
    DirectKolenPollack,
    ForwardDirectFeedbackAlignment,
)
from fwdlib.methods.local_losses import LocalGreedyBackprop
from fwdlib.models import CNN
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.trainer.networks import fully_connected
from fwdlib.training import make_optimizer, train
from tests.methods.chains import (
    FIXED,
    MODELS,
    TARGETS,
    Border,
    Chain,
    assert_within_5_sigma,
    cnn,
    exact,
    grads_of,
    mlp,
    seeded,
)

SGD_ONE = make_optimizer("SGD", 1.0)  # with it the feedback becomes the last mean of d u^T
RULES = {
    "DFA": DirectFeedbackAlignment,
    "DKP": DirectKolenPollack,
    "FDFA": ForwardDirectFeedbackAlignment,
    "FG-CV": ControlVariateForwardGradient,
    "FG-A": ActivityForwardGradient,
}


# exact cases


@torch.no_grad()
def test_with_the_true_jacobian_of_a_linear_network_it_is_backprop():
    torch.manual_seed(0)
    model = Chain(*(nn.Linear(n, m) for n, m in ((4, 5), (5, 6), (6, 3)))).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    estimator = DirectFeedbackAlignment(model, inputs)
    second, third = model.chain[1].weight, model.chain[2].weight
    for feedback, jacobian in zip(estimator.feedback, (third @ second, third), strict=True):
        feedback.data.copy_(jacobian)
    expected = exact(model, inputs)
    for name, grad in grads_of(estimator, model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [mlp, partial(mlp, nn.BatchNorm1d(5)), cnn], ids=["MLP", "BatchNorm", "CNN"])
def test_the_readout_is_exact(rule, make):
    model, inputs = make()
    estimate = RULES[rule](model, inputs)(BatchLoss(model, inputs, TARGETS), params_of(model))
    expected = backprop_gradient(BatchLoss(model, inputs, TARGETS), params_of(model))
    torch.testing.assert_close(estimate.loss, expected.loss)
    for name in list(expected.grads)[-2:]:
        torch.testing.assert_close(estimate.grads[name], expected.grads[name], rtol=1e-10, atol=1e-14)


def test_a_shared_weight_gets_the_sum_of_its_uses_and_a_frozen_one_nothing():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = Chain(shared, shared, nn.Linear(4, 3)).double()
    model.chain[2].bias.requires_grad_(False)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    estimator = DirectFeedbackAlignment(model, inputs)
    last = model.chain[2].weight.detach()
    for feedback, jacobian in zip(estimator.feedback, (last @ shared.weight.detach(), last), strict=True):
        feedback.data.copy_(jacobian)
    grads, expected = grads_of(estimator, model, inputs), exact(model, inputs)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_kolen_pollack_feedback_goes_to_the_weight_as_its_rule_predicts():
    torch.manual_seed(0)
    model = Chain(nn.Linear(4, 5), nn.Linear(5, 3, bias=False)).double()
    rate, decay = 0.1, 0.3
    plain = {"lr": rate, "weight_decay": decay}
    estimator = DirectKolenPollack(model, torch.zeros(1, 4).double(), optimizer=partial(torch.optim.SGD, **plain))
    optimizer = torch.optim.SGD(model.parameters(), **plain)
    mismatch = estimator.feedback[0].detach() - model.chain[1].weight.detach()
    draw = seeded()
    for _ in range(20):
        inputs = torch.randn(6, 4, generator=draw, dtype=torch.float64)
        assign_gradients(model, grads_of(estimator, model, inputs))
        optimizer.step()
        mismatch = mismatch * (1 - rate * decay)
        now = estimator.feedback[0].detach() - model.chain[1].weight.detach()
        torch.testing.assert_close(now, mismatch, rtol=1e-10, atol=1e-13)


def test_forward_feedback_is_an_exponential_average_under_sgd():
    model, inputs = mlp()
    rate, estimators = 0.25, [ForwardDirectFeedbackAlignment(model, inputs, optimizer=SGD_ONE)]
    estimators.append(ForwardDirectFeedbackAlignment(model, inputs, optimizer=make_optimizer("SGD", rate)))
    average, draws = torch.zeros_like(estimators[0].feedback[1]), (seeded(), seeded())
    for _ in range(4):
        for estimator, draw in zip(estimators, draws, strict=True):
            grads_of(estimator, model, inputs, generator=draw)
        average = (1 - rate) * average + rate * estimators[0].feedback[1].detach()
        torch.testing.assert_close(estimators[1].feedback[1].detach(), average.detach())


@pytest.mark.parametrize("make", [partial(mlp, nn.BatchNorm1d(5)), cnn], ids=["BatchNorm", "CNN"])
def test_several_tangents_in_one_pass_are_those_one_by_one(make):
    model, inputs = make()
    joint = ControlVariateForwardGradient(model, inputs, num_tangents=3)
    drawn = joint._draw(6, seeded())
    estimate = joint(BatchLoss(model, inputs, TARGETS), params_of(model), generator=seeded())
    singles = []
    for k in range(3):
        single = ControlVariateForwardGradient(model, inputs)
        single._draw = lambda *_, k=k: drawn[k : k + 1]
        singles.append(single(BatchLoss(model, inputs, TARGETS), params_of(model)))
    torch.testing.assert_close(estimate.jvps, torch.cat([single.jvps for single in singles]))
    for name, grad in estimate.grads.items():
        torch.testing.assert_close(grad, sum(single.grads[name] for single in singles) / 3)


BLOCKS = {
    "two linear layers": (lambda: [nn.Linear(4, 6), nn.Linear(6, 5), nn.Tanh()], (4,)),
    "no bias": (lambda: [nn.Linear(4, 5, bias=False), nn.Sigmoid()], (4,)),
    "in place": (lambda: [nn.Linear(4, 5), nn.ReLU(inplace=True)], (4,)),
    "BatchNorm, in place": (lambda: [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)], (4,)),
    "LayerNorm": (lambda: [nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU()], (4,)),
    "no rule": (lambda: [nn.Linear(4, 5), nn.Softsign()], (4,)),
    "positions": (lambda: [nn.Linear(4, 5), nn.ReLU()], (3, 4)),
    "convolution": (lambda: [nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2), nn.MaxPool1d(2), nn.ReLU()], (2, 8)),
    "groups": (lambda: [nn.Conv1d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1), nn.Tanh()], (2, 8)),
}


@pytest.mark.parametrize("num_tangents", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_tangents_beside_the_tape_change_no_local_derivative(name, num_tangents):
    # With the same feedback FDFA's estimate is DFA's, whose blocks run without tangents.
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    first = nn.Sequential(nn.Identity(), nn.Tanh())
    inputs = torch.randn(6, *shape, dtype=torch.float64)
    hidden = nn.Sequential(*make()).double()
    readout = nn.Sequential(nn.Flatten(), nn.Linear(hidden(first(inputs)).flatten(1).shape[1], 3)).double()
    model = Chain(first, hidden, readout)
    plain = DirectFeedbackAlignment(model, inputs)
    learning = ForwardDirectFeedbackAlignment(model, inputs, optimizer=FIXED, num_tangents=num_tangents)
    learning.matrix.data.copy_(plain.matrix)
    expected = grads_of(plain, model, inputs)
    for name, grad in grads_of(learning, model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)
        assert grad.any()


@pytest.mark.parametrize("rule", RULES)
def test_running_statistics_advance_as_in_one_forward_pass(rule):
    (model, inputs), (twin, _) = (mlp(nn.BatchNorm1d(5)) for _ in range(2))
    options = {"num_tangents": 2} if rule in ("FDFA", "FG-CV") else {}
    grads_of(RULES[rule](model, inputs, **options), model, inputs)
    twin(inputs)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("rule", RULES)
def test_no_error_is_carried_back_from_block_to_block(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Border(), nn.Linear(5, 5), nn.Tanh(), Border(), nn.Linear(5, 3))
    inputs = torch.randn(6, 4)
    assert grads_of(RULES[rule](model, inputs), model, inputs)["0.weight"].isfinite().all()
    with pytest.raises(AssertionError, match="could be carried back"):
        exact(model, inputs)


# statistics


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("tangents", ["rademacher", "normal"])
def test_the_mean_of_d_u_is_the_jacobian(make, tangents):
    model, inputs = MODELS[make]()
    estimator = ForwardDirectFeedbackAlignment(model, inputs, optimizer=SGD_ONE, num_tangents=50, tangents=tangents)
    draw, seen = seeded(), []
    for _ in range(60):
        grads_of(estimator, model, inputs, generator=draw)
        seen.append([feedback.detach().clone() for feedback in estimator.feedback])
    blocks = blocks_of(model)
    activation = inputs
    for i, block in enumerate(blocks[:-1]):
        activation = block(activation).detach()
        rest = nn.Sequential(*blocks[i + 1 :])
        of_examples = [torch.autograd.functional.jacobian(lambda a, f=rest: f(a[None])[0], a) for a in activation]
        assert_within_5_sigma(torch.stack([of_draw[i] for of_draw in seen]), torch.stack(of_examples).mean(0))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_recorded_it_does_the_same(rule, norm):
    # Over several steps, through a change of mode, of the batch's size and of what is trained.
    model, inputs = mlp(*[nn.BatchNorm1d(5), nn.Dropout(0.2)] * norm)
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        learner = copy.deepcopy(model)
        estimator, draw = RULES[rule](learner, inputs, recorded=recorded), seeded()
        options = {} if rule in ("DFA", "DKP") else {"generator": draw}
        seen = []
        for is_training, size, frozen in [(True, 6, None), (True, 6, None), (True, 5, "0.bias"), (False, 6, None)]:
            learner.train(is_training)
            params = {name: p for name, p in params_of(learner).items() if name != frozen}
            objective = BatchLoss(learner, inputs[:size], TARGETS[:size])
            estimate = estimator(objective, params, **options)
            assert not estimate.loss.requires_grad
            assert estimate.grads.keys() == params.keys()
            for name, grad in estimate.grads.items():
                params[name].sub_(0.1 * grad)
            seen += [estimate.loss, estimate.jvps, *estimate.grads.values()]
        ends.append([*seen, *estimator.feedback, *learner.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {"weight_decay": 0.1}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("SGD", {})],
)
@pytest.mark.parametrize("rule", ["DKP", "FDFA", "FG-CV"])
def test_recorded_the_feedback_learns_the_same(rule, name, options):
    # Through another rate, a state that is loaded, and a new beginning: a fused optimizer's steps are recorded.
    model, inputs = mlp(nn.BatchNorm1d(5))
    make = make_optimizer(name, 0.01, fused=True, **options)
    ends = []
    for recorded in (False, True):
        learner, draw, seen = copy.deepcopy(model), seeded(), []
        estimator = RULES[rule](learner, inputs, optimizer=make, recorded=recorded)
        for change in (None, None, "rate", "state", None, "reset", None):
            if change == "rate":
                estimator.optimizer.param_groups[0]["lr"] = 0.02
            elif change == "state":
                state, estimator = estimator.state_dict(), RULES[rule](learner, inputs, optimizer=make)
                estimator.recorded = recorded
                estimator.load_state_dict(state)
            elif change == "reset":
                estimator.reset(0)
            grads_of(estimator, learner, inputs, generator=draw)
            seen.append(estimator.matrix.detach().clone())
        ends.append([*seen, *estimator.optimizer.state.get(estimator.matrix, {}).values()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_recorded_it_does_the_same_on_images_in_any_layout(rule):
    model, inputs = cnn()
    plain, recorded = (RULES[rule](model, inputs, recorded=recorded) for recorded in (False, True))
    tall = torch.cat([inputs, inputs], 2)
    layouts = [inputs, tall[:, :, ::2], inputs.transpose(2, 3), inputs[:1].expand(6, -1, -1, -1)]
    for x in [*layouts, inputs.to(memory_format=torch.channels_last)]:
        options = [{} if rule in ("DFA", "DKP") else {"generator": seeded()} for _ in range(2)]
        expected = grads_of(plain, model, x, **options[0])
        torch.testing.assert_close(grads_of(recorded, model, x, **options[1]), expected, rtol=1e-12, atol=1e-14)


def test_jvps_are_those_of_the_loss():
    model, inputs = mlp()
    estimator = ForwardDirectFeedbackAlignment(model, inputs, num_tangents=2)
    drawn = estimator._draw(6, seeded())
    found = estimator(BatchLoss(model, inputs, TARGETS), params_of(model), generator=seeded()).jvps
    first, second, last = blocks_of(model)

    def loss(shifts):
        return F.cross_entropy(last(second(first(inputs) + shifts[0]) + shifts[1]), TARGETS)

    shifts = estimator._by_site(drawn)
    zeros = tuple(torch.zeros_like(u[0]) for u in shifts)
    expected = [torch.func.jvp(lambda *s: loss(s), zeros, tuple(u[k] for u in shifts))[1] for k in range(2)]
    torch.testing.assert_close(found, torch.stack(expected))


# training


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_learns_in_the_one_loop(rule):
    torch.manual_seed(0)
    centres = torch.randn(3, 8)
    labels = torch.arange(120) % 3
    points = centres[labels] + 0.3 * torch.randn(120, 8)
    data = Dataset(points[:90], labels[:90], points[90:], labels[90:], ("a", "b", "c"), None)

    def build():
        return fully_connected(8, 2, 16, 3)

    estimator = RULES[rule](build(), data.train_inputs[:2])
    options = {"optimizer": "Adam", "learning_rate": 0.01, "batch_size": 30, "max_iterations": 150}
    history = train(build, data, estimator, **options, progress=None)
    assert history.runs[0].test_errors[-1] == 0
    if rule not in ("DFA", "FG-A"):
        assert all(feedback.any() for feedback in estimator.feedback)


@pytest.mark.parametrize("rule", RULES)
def test_goes_on_from_its_state_and_begins_anew(rule):
    def run(estimator, steps, draw):
        return [grads_of(estimator, *mlp(), generator=draw) for _ in range(steps)]

    whole, draw = RULES[rule](*mlp()), seeded()
    expected = run(whole, 4, draw)
    first, draw = RULES[rule](*mlp()), seeded()
    run(first, 2, draw)
    second = RULES[rule](*mlp())
    second.load_state_dict(first.state_dict())
    for found, grads in zip(run(second, 2, draw), expected[2:], strict=True):
        assert all(torch.equal(found[name], grad) for name, grad in grads.items())
    second.reset(0)
    for name, grad in run(second, 1, seeded())[0].items():
        assert torch.equal(grad, expected[0][name])


def test_another_seed_draws_another_feedback():
    model, inputs = mlp()
    a, b = (DirectFeedbackAlignment(model, inputs, seed=seed).feedback[0] for seed in (0, 1))
    assert not torch.equal(a, b)
    assert a.abs().max() <= math.sqrt(6 / 5)


# blocks, and what is refused


@pytest.mark.parametrize("rule", RULES)
def test_a_model_whose_blocks_cannot_be_told_is_refused(rule):
    with pytest.raises(ValueError, match=r"CNN does not show its blocks.*nn\.Sequential.*blocks\(\)"):
        RULES[rule](CNN(), torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="has 1 block, and feedback needs a hidden one"):
        RULES[rule](nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.zeros(2, 4))


def test_blocks_that_leave_out_parameters_are_refused():
    model = Chain(nn.Linear(4, 5), nn.Linear(5, 3))
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"blocks\(\) leaves out the parameters scale"):
        DirectFeedbackAlignment(model, torch.zeros(2, 4))


@pytest.mark.parametrize("rule", RULES)
def test_refuses_what_is_not_its_model(rule):
    model, inputs = mlp()
    estimator = RULES[rule](model, inputs)
    with pytest.raises(TypeError, match=r"pass a BatchLoss.*got function"):
        estimator(lambda p: p["x"].sum(), {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="made for a model of 3 blocks, got one of 2"):
        grads_of(estimator, Chain(nn.Linear(4, 5), nn.Linear(5, 3)).double(), inputs)
    with pytest.raises(ValueError, match="belongs to a different model"):
        estimator.load_state_dict(RULES[rule](*cnn()).state_dict())
    with pytest.raises(ValueError, match="params has 'far', which is not a parameter of the model; it has"):
        estimator(BatchLoss(model, inputs, TARGETS), {"far": torch.zeros(2)})
    with pytest.raises(ValueError, match="inputs is an empty batch"):
        estimator(BatchLoss(model, inputs[:0], TARGETS[:0]), params_of(model))


@pytest.mark.parametrize("widths", [(4, 5, 7, 3), (4, 5, 6, 4)])
@pytest.mark.parametrize("rule", [*RULES.values(), LocalGreedyBackprop])
def test_refuses_a_model_of_other_widths_or_another_dtype(rule, widths):
    model, inputs = mlp()
    estimator = rule(model, inputs)
    with pytest.raises(ValueError, match=rf"has 3 outputs, got \(5,\), \({widths[2]},\) and {widths[3]}"):
        grads_of(estimator, Chain(*map(nn.Linear, widths[:-1], widths[1:])).double(), inputs)
    if rule is DirectFeedbackAlignment:
        with pytest.raises(ValueError, match=r"made for a model of torch.float64, got one of torch.float32"):
            grads_of(estimator, model.float(), inputs.float())


CHANGES = {
    "another activation": lambda m: m.__setitem__(1, nn.Sigmoid()),
    "another layer": lambda m: m.__setitem__(2, nn.Linear(5, 6)),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[2]),
    "a nested layer": lambda m: m.__setitem__(3, nn.Sequential(nn.LayerNorm(6), nn.Tanh())),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_two_steps_is_seen_as_it_is(change, recorded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, targets = torch.randn(7, 4), torch.arange(7) % 3
    rule, objective = DirectFeedbackAlignment(model, inputs, recorded=recorded), BatchLoss(model, inputs, targets)
    rule(objective, params_of(model))
    CHANGES[change](model)
    found, expected = (of(objective, params_of(model)) for of in (rule, DirectFeedbackAlignment(model, inputs)))
    torch.testing.assert_close(found.loss, objective.run().detach())
    torch.testing.assert_close(found.grads, expected.grads)
    assert found.grads.keys() == params_of(model).keys()
    model.append(nn.Tanh())
    model.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="made for a model of 3 blocks, got one of 4"):
        rule(objective, params_of(model))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_parameter_that_is_asked_for_gets_its_gradient(rule, recorded):
    model, inputs = mlp()
    own = {name: p.detach() for name, p in model.named_parameters()}
    estimators = [RULES[rule](model, inputs, recorded=recorded) for _ in range(2)]
    found = []
    for estimator in estimators:
        found.append(estimator(BatchLoss(model, inputs, TARGETS), own, generator=seeded(0)).grads)
        next(model.parameters()).requires_grad_(False)
    torch.testing.assert_close(*found)
    assert not next(model.parameters()).requires_grad


def test_the_drawing_sends_the_error_straight_to_each_block_or_from_one_to_the_next():
    from fwdlib.methods import feedback_figures

    lengths = []
    for axes in feedback_figures.plot_ways().axes:
        arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
        lengths.append(sorted(note.xyann[0] - note.xy[0] for note in arrows if note.xyann[0] > note.xy[0]))
    assert lengths == [[1, 1], [1, 2]]


def test_a_rule_can_be_copied():
    model, inputs = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
    objective = BatchLoss(model, inputs, torch.tensor([0, 1, 1, 0, 1]))
    rule = DirectFeedbackAlignment(model, inputs)
    assert_close(copy.deepcopy(rule)(objective, params_of(model)).grads, rule(objective, params_of(model)).grads)
