"""Recurrent nets, torch's own transformers, embeddings, memory that is filled step by step."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from tests.zoo.case import NUM_CLASSES, Builder, Case, classifies, regresses

LENGTHS = torch.tensor([6, 2, 4])


def series(batch: int = 3, length: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, length, width)


class Recurrent(nn.Module):
    """A recurrent net and a head on its last step."""

    def __init__(self, kind: type[nn.RNNBase], **options):
        super().__init__()
        self.body = kind(5, 8, batch_first=True, **options)
        width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Packed(Recurrent):
    def forward(self, x):
        packed = rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
        padded, lengths = rnn.pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return self.head(padded[torch.arange(3), lengths - 1])


class Cells(nn.Module):
    """Cells in a loop that writes each state into a tensor of zeros."""

    def __init__(self, kind=nn.LSTMCell):
        super().__init__()
        self.cell, self.head = kind(5, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        states, state = x.new_zeros(3, 6, 8), None
        for t in range(6):
            state = self.cell(x[:, t], state)
            states[:, t] = state[0] if isinstance(state, tuple) else state
        return self.head(states.mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoder with its defaults, on a padded batch."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.up, self.body, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        padding = torch.arange(6) >= LENGTHS.unsqueeze(1)
        return self.head(self.body(self.up(x), src_key_padding_mask=padding)[:, 0])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.up, self.body, self.head = nn.Linear(5, 8), nn.TransformerDecoder(layer, 2), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        h = self.up(x)
        causal = nn.Transformer.generate_square_subsequent_mask(6)
        return self.head(self.body(h, h.flip(1), tgt_mask=causal, tgt_is_causal=True)).movedim(2, 1)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16)
        self.source, self.target = nn.Embedding(12, 8), nn.Embedding(NUM_CLASSES, 8)

    def forward(self, ids):
        h = self.body(self.source(ids.t()), self.target(ids.t() % NUM_CLASSES))
        return F.linear(h, self.target.weight).permute(1, 2, 0)  # the embedding is tied to the head


class Weights(nn.Module):
    """Attention whose weights are part of the output, with keys of another width and a learnt extra key."""

    def __init__(self):
        super().__init__()
        self.body = nn.MultiheadAttention(8, 2, 0.1, add_bias_kv=True, add_zero_attn=True, kdim=5, vdim=5)
        self.up = nn.Linear(5, 8)

    def forward(self, x):
        h, weights = self.body(self.up(x), x, x, average_attn_weights=False)
        return h.mean(1) + weights.square().mean()


class Flexible(nn.Module):
    """Attention as many write it: einsum, a causal mask that is a buffer, masked_fill, softmax."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 24, bias=False), nn.Linear(8, NUM_CLASSES)
        self.register_buffer("causal", torch.ones(6, 6).tril().bool())

    def forward(self, x):
        q, k, v = self.qkv(x).view(3, 6, 3, 2, 4).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        weights = scores.masked_fill(~self.causal, float("-inf")).softmax(-1)
        return self.head(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)[:, -1])


class Grouped(Flexible):
    """torch's attention with fewer keys than queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(5, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q, k, v = q.view(3, 6, 2, 4).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
        return self.head(h.transpose(1, 2).flatten(2)[:, -1])


class Nested(nn.Module):
    """A nested tensor, through a layer and back."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(5, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        rows = [self.up(row[:n]) for row, n in zip(x, LENGTHS, strict=True)]
        h = torch.nested.as_nested_tensor(rows)
        return self.head(torch.nested.to_padded_tensor(h.relu(), 0.0).mean(1))


class Bag(nn.Module):
    def __init__(self, mode="mean", weighted=False, **options):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(12, 8, mode=mode, **options), nn.Linear(8, NUM_CLASSES)
        self.weights = nn.Parameter(torch.rand(24)) if weighted else None

    def forward(self, ids):
        offsets = torch.tensor([0, 5, 9])
        return self.head(self.table(ids.flatten(), offsets, per_sample_weights=self.weights))


class Dilated(nn.Module):
    """A temporal convolutional net, with weight norm as its authors have it."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(norm(nn.Conv1d(5, 5, 2, dilation=2**i)) for i in range(2))
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        h = x.transpose(1, 2)
        for i, layer in enumerate(self.layers):
            h = h + F.dropout(F.relu(layer(F.pad(h, (2**i, 0)))), 0.2, self.training)
        return self.head(h[..., -1])


class StateSpace(nn.Module):
    """A diagonal state space model: complex kernels, convolution by FFT."""

    def __init__(self):
        super().__init__()
        self.rates, self.angles = nn.Parameter(torch.rand(5, 4)), nn.Parameter(torch.rand(5, 4))
        self.mix = nn.Parameter(torch.randn(5, 4, 2))
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        poles = torch.complex(-self.rates.exp(), self.angles)
        powers = torch.exp(poles.unsqueeze(-1) * torch.arange(6))
        kernel = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.mix), powers).real
        y = torch.fft.irfft(torch.fft.rfft(x.transpose(1, 2), n=12) * torch.fft.rfft(kernel, n=12), n=12)[..., :6]
        return self.head(F.gelu(y).mean(-1))


class LinearAttention(nn.Module):
    """Attention without a softmax, by cumulative sums."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 24), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
        h = torch.matmul(q.unsqueeze(-2), state).squeeze(-2) / (q * k.cumsum(1)).sum(-1, keepdim=True)
        return self.head(F.layer_norm(h, (8,))[:, -1])


class Tagger(nn.Module):
    """A conditional random field: the log of a sum over all paths."""

    def __init__(self):
        super().__init__()
        self.emit, self.moves = nn.Linear(5, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        scores = self.emit(x)
        alpha = scores[:, 0]
        for t in range(1, 6):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.moves, 1) + scores[:, t]
        return torch.logsumexp(alpha, 1) - scores[..., 0].sum(1)


def adaptive() -> Case:
    model = nn.ModuleDict({"body": nn.Linear(5, 8), "head": nn.AdaptiveLogSoftmaxWithLoss(8, 12, [3, 6], div_value=2)})
    x, targets = torch.randn(6, 5), torch.tensor([0, 2, 4, 5, 9, 11])
    return Case(model, lambda model: model["head"](model["body"](x), targets).loss, 6)


def recurrent(kind: type[nn.RNNBase], make: type = Recurrent, **options) -> Case:
    return classifies(make(kind, **options), series())


def ids() -> Tensor:
    return torch.randint(0, 12, (3, 8))


MODELS: dict[str, Builder] = {
    "RNN": partial(recurrent, nn.RNN, nonlinearity="relu"),
    "LSTM, two layers, both ways": partial(recurrent, nn.LSTM, bidirectional=True, num_layers=2, dropout=0.2),
    "LSTM with projections": partial(recurrent, nn.LSTM, proj_size=3),
    "GRU": partial(recurrent, nn.GRU, num_layers=2),
    "GRU, packed": partial(recurrent, nn.GRU, Packed, bidirectional=True),
    "LSTM, packed": partial(recurrent, nn.LSTM, Packed),
    "LSTM cells": lambda: classifies(Cells(), series()),
    "GRU cells": lambda: classifies(Cells(nn.GRUCell), series()),
    "nn.TransformerEncoder": lambda: classifies(Encoder(), series()),
    "nn.TransformerEncoder, norm first": lambda: classifies(Encoder(norm_first=True, activation="gelu"), series()),
    "nn.TransformerDecoder": lambda: classifies(Decoder(), series()),
    "nn.Transformer, tied embedding": lambda: classifies(Translator(), ids()),
    "nn.MultiheadAttention, weights": lambda: classifies(Weights(), series()),
    "attention by einsum": lambda: classifies(Flexible(), series()),
    "attention with grouped queries": lambda: classifies(Grouped(), series()),
    "attention without softmax": lambda: classifies(LinearAttention(), series()),
    "nested tensors": lambda: classifies(Nested(), series()),
    "EmbeddingBag, mean": lambda: classifies(Bag(), ids()),
    "EmbeddingBag, max": lambda: classifies(Bag("max"), ids()),
    "EmbeddingBag, weighted sum": lambda: classifies(Bag("sum", weighted=True), ids()),
    "temporal convolutions": lambda: classifies(Dilated(), series()),
    "state space model": lambda: classifies(StateSpace(), series()),
    "conditional random field": lambda: regresses(Tagger(), series()),
    "adaptive softmax": adaptive,
}
