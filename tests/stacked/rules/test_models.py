"""Rules together: whole models against torch.func.jvp in float64."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from tests.stacked.rules.cases import LABELS, assert_agrees_with_jvp

# parameters outside of layers


class Patches(nn.Module):
    """A small vision transformer: class token, positions, attention by hand, a learned scale, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        x = self.embed(inputs).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[: x.shape[1] + 1]
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        x = x + self.scale * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


class Tied(nn.Module):
    """A language model whose last layer has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.hidden.weight

    def forward(self, inputs):
        x = self.again(torch.tanh(self.hidden(self.embedding(inputs))))
        return F.linear(x, self.embedding.weight).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        x = self.linear(inputs)
        return self.attention(x, x, x, need_weights=False)[0] + self.attention(x, x, x)[0]


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_parameters_outside_of_layers(num_tangents):
    torch.manual_seed(0)
    images, words = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([[0, 4, 1], [2, 2, 3]])
    agrees = partial(assert_agrees_with_jvp, loss=F.cross_entropy, num_tangents=num_tangents)
    agrees(Patches().double(), images, torch.tensor([0, 1, 2]))
    agrees(Tied().double(), words, words.flip(1))


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(num_tangents, norm_first, training):
    torch.manual_seed(0)
    # no dropout: torch fills a mask in memory order, which torch's own transposes change
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True, norm_first=norm_first)
    inputs = torch.randn(3, 5, 4, dtype=torch.float64)
    for model in (layer, Attention()):
        assert_agrees_with_jvp(model.double().train(training), inputs, num_tangents=num_tangents)


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_norms_and_dropout_in_both_modes(num_tangents, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.4), nn.MaxPool2d(2)),
        *(nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Dropout(0.4, inplace=True), nn.Linear(16, 6)),
        *(nn.BatchNorm1d(6, affine=False), nn.LeakyReLU(), nn.PReLU(), nn.Linear(6, 3)),
    )
    model = model.double().train(training)
    for buffer in model.buffers():
        buffer += torch.rand_like(buffer.double()).to(buffer.dtype)
    assert_agrees_with_jvp(
        model, torch.randn(4, 2, 6, 6, dtype=torch.float64), LABELS, F.cross_entropy, num_tangents=num_tangents
    )


# random compositions

BLOCKS = {
    "linear": lambda: nn.Linear(4, 4),
    "affine": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(3),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "convolution": lambda: nn.Conv1d(3, 3, 3, padding=1),
    "grouped convolution": lambda: nn.Conv1d(3, 3, 3, padding="same", groups=3),
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(-1),
    "softsign": nn.Softsign,
    "pool": lambda: nn.AvgPool1d(3, 1, 1),
    "max pool": lambda: nn.MaxPool1d(3, 1, 1),
    "dropout": lambda: nn.Dropout(0.3),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
}
JOINS = {
    "plain": lambda x, y: y,
    "residual": lambda x, y: x + y,
    "gate": lambda x, y: x * torch.sigmoid(y),
    "cat": lambda x, y: torch.cat([x, y], -1)[..., 2:6],
    "ratio": lambda x, y: y / (1 + x.square()),
    "transposed": lambda x, y: y.transpose(1, 2).reshape(x.shape),
    "product": lambda x, y: x @ x.transpose(-1, -2) @ y,
    "in place": lambda x, y: y.add_(x, alpha=0.5),
}


class Composition(nn.Module):
    def __init__(self, blocks, joins):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks, self.joins = nn.ModuleList(BLOCKS[name]() for name in blocks), joins
        self.last = nn.Linear(12, 3)

    def forward(self, inputs):
        x = self.first(inputs)
        for block, join in zip(self.blocks, self.joins, strict=True):
            y = x.clone()
            y = block(y, y, y)[0] if isinstance(block, nn.MultiheadAttention) else block(y)
            x = JOINS[join](x, y)
        return self.last(x.flatten(1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(list(BLOCKS)), st.sampled_from(list(JOINS))), max_size=5),
    training=st.booleans(),
    num_tangents=st.integers(1, 3),
    loss=st.sampled_from([F.cross_entropy, F.mse_loss, F.l1_loss]),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_compositions_agree_with_forward_mode(pairs, training, num_tangents, loss, seed):
    torch.manual_seed(seed)
    model = Composition([block for block, _ in pairs], [join for _, join in pairs]).double().train(training)
    targets = LABELS if loss is F.cross_entropy else torch.randn(4, 3, dtype=torch.float64)
    inputs = torch.randn(4, 3, 4, dtype=torch.float64)
    assert_agrees_with_jvp(model, inputs, targets, loss, num_tangents, seed)
