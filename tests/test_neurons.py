"""Every entry of the neuron table against its function."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptorch.neurons import NEURONS, activation, neuron

MORE = [
    "leaky_relu(0.2)", "leaky_relu(-3.0)", "prelu(0.25)", "rrelu(0.1, 0.5)", "threshold(0.0, 0.0)",
    "threshold(1.0, 1.0)", "threshold(1.0, 0.0)", "hardtanh(0.0, 6.0)", "hardtanh(-2.0, 2.0)",
    "softplus(3.0, 20.0)", "softplus(1.0, 1.0)", "elu(0.5)", "elu(2.0)", "elu(-1.0)", "elu(1.0, 2.0, 3.0)",
    "celu(0.3)", "gelu(tanh)", "hardshrink(0.1)", "softshrink(0.2)", "clamp_min(0.0)", "clamp_min(1.0)",
    "clamp_max(0.0)", "clamp(-1.0, 1.0)",
]  # fmt: skip
KNOWN = [name for name in NEURONS if NEURONS[name].function] + MORE
KINKS = torch.tensor([-6.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
# Steep points of the smooth ones; +-15 for slopes that are only approached.
STEEP = torch.tensor([1.41421356, 1.41850401, 2.39935728, 1.49057118, -15.0, 15.0], dtype=torch.float64)
NEAR = torch.tensor([[-1.5e-7], [0.0], [1.5e-7]], dtype=torch.float64)
LINE = torch.cat([(KINKS + NEAR).flatten(), STEEP, torch.linspace(-30, 30, 4001, dtype=torch.float64)])


@pytest.mark.parametrize("spec", KNOWN)
@settings(max_examples=100)
@given(seed=st.integers(0, 2**31), log_gap=st.floats(-6, 2))
def test_lipschitz_constant_is_never_exceeded(spec, seed, log_gap):
    lipschitz, function = neuron(spec).lipschitz, activation(spec)
    generator = torch.Generator().manual_seed(seed)
    y = 4 * torch.randn(1000, generator=generator, dtype=torch.float64)
    z = y + 10**log_gap * torch.randn(1000, generator=generator, dtype=torch.float64)
    jump = 2.1e-9 if spec.startswith("softplus") else 0.0  # of torch's softplus at its threshold
    slack = 4e-15 * (1 + y.abs() + z.abs()) * min(lipschitz, 10) + jump
    assert bool(((function(y) - function(z)).abs() <= lipschitz * (y - z).abs() + slack).all())


@pytest.mark.parametrize("spec", KNOWN)
def test_lipschitz_constant_is_sharp(spec):
    lipschitz, function = neuron(spec).lipschitz, activation(spec)
    if math.isinf(lipschitz):
        # A jump: the slope across it grows without limit. (celu and elu are never inf for these constants.)
        gap = torch.tensor([1e-12], dtype=torch.float64)
        around = torch.cat([KINKS, torch.tensor([0.1, -0.1], dtype=torch.float64)])
        assert float(((function(around + gap) - function(around - gap)).abs() / (2 * gap)).max()) > 1e6
        return
    slope = (function(LINE + 1e-7) - function(LINE - 1e-7)).abs() / 2e-7
    assert float(slope.max()) >= (1 - 2e-6) * lipschitz


@pytest.mark.parametrize("spec", KNOWN)
def test_homogeneity_reflection_and_monotony(spec):
    known, function = neuron(spec), activation(spec)
    scaled = [torch.allclose(function(c * LINE), c * function(LINE), atol=1e-12) for c in (0.0, 0.3, 7.0)]
    assert all(scaled) == known.homogeneous
    steps = function(LINE.sort().values).diff()
    assert known.monotone == (bool((steps >= -1e-12).all()) or bool((steps <= 1e-12).all()))
    reflections = [known.reflection] if known.reflection else [(-1.0, 0.0), (-1.0, 1.0), (1.0, 0.0)]
    holds = [torch.allclose(function(-LINE), s * function(LINE) + o, atol=1e-12) for s, o in reflections]
    assert any(holds) == (known.reflection is not None)


@pytest.mark.parametrize("spec", ["general", "square", "clamp(1.0)", "prelu", "elu(1, 2, 3, 4, 5)"])
def test_what_is_not_known_claims_nothing(spec):
    assert math.isinf(neuron(spec).lipschitz)
    with pytest.raises(KeyError):
        activation(spec)
