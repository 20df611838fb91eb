"""Recurrent layers step by step, against torch's own."""

import pytest
import torch
from torch import nn

from apoptorch.reading import unrolled

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "both", "first", "bias"), [(1, False, True, True), (2, True, False, True), (3, True, True, False)]
)
def test_unrolled_is_the_layer(kind, layers, both, first, bias):
    """Outputs, last states and the gradients of all weights, in float64."""
    torch.manual_seed(0)
    module = KINDS[kind](4, 5, layers, bidirectional=both, batch_first=first, bias=bias).double()
    x, directions = torch.randn(3, 6, 4, dtype=torch.float64), 2 if both else 1
    count = 3 if first else 6
    state = torch.randn(layers * directions, count, 5, dtype=torch.float64)
    states = (state, state.flip(0)) if kind == "lstm" else state
    output, last = module(x, states)
    expected = (output, *(last if kind == "lstm" else (last,)))
    weights = list(module.parameters())
    given = states if kind == "lstm" else state
    found = unrolled(kind, x, given, weights, bias, layers, 0.5, True, both, first)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(sum(part.sin().sum() for part in parts), weights) for parts in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
