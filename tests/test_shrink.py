"""`shrink`: planted redundancy of every kind goes, bounds hold for every input, and bad input changes nothing."""

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from apoptorch import shrink
from apoptorch.closed_form import gain_and_offset, gate_gain
from apoptorch.errors import ArgumentError
from apoptorch.graph import trace_chain
from apoptorch.neurons import NEURONS, neuron


class Elementwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MODULES = {
    "linear": nn.Identity, "neg": lambda: Elementwise(torch.neg), "abs": lambda: Elementwise(torch.abs),
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU, "rrelu": nn.RReLU, "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6, "sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid, "tanh": nn.Tanh,
    "log_sigmoid": nn.LogSigmoid, "softplus": nn.Softplus, "elu": nn.ELU, "selu": nn.SELU, "celu": nn.CELU,
    "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "hardswish": nn.Hardswish, "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
    "sin": lambda: Elementwise(torch.sin), "cos": lambda: Elementwise(torch.cos),
    "erf": lambda: Elementwise(torch.erf),
}  # fmt: skip
SLOPED = {"prelu": "prelu(0.25)"}  # the type that a freshly made module has
DEAD = {"relu": -9.0, "hardtanh": 9.0, "relu6": -9.0, "hardsigmoid": -9.0}  # bias beyond which f is constant


def known(name):
    return neuron(SLOPED.get(name, name))


def layers(*shape, kernel=0):
    """Weights of norm about 1 a neuron, so that inputs of norm 1 don't saturate."""
    layer = nn.Conv2d(*shape, kernel) if kernel else nn.Linear(*shape)
    with torch.no_grad():
        layer.weight.normal_(0, 1 / math.sqrt(layer.weight[0].numel()))
        layer.bias.normal_(0, 0.3)
    return layer


@torch.no_grad()
def plant(layer, kind):
    """Makes the second half of a layer's neurons redundant."""
    half = len(layer.weight) // 2
    scales = torch.linspace(0.3, 1.7, half).to(layer.weight)
    factor = {
        "duplicate": scales / scales,
        "parallel": scales,
        "reflected": -scales / scales,
        "constant": scales * 0,
    }
    view = (-1,) + (1,) * (layer.weight.ndim - 1)
    if kind in factor:
        layer.weight[half:] = factor[kind].view(view) * layer.weight[:half]
        layer.bias[half:] = scales if kind == "constant" else factor[kind] * layer.bias[:half]
    else:
        layer.weight[half:] *= 0.5
        layer.bias[half:] = kind  # far from where f changes
    return half


def kinds_of(name):
    kinds = ["duplicate", "constant"]
    kinds += ["parallel"] if known(name).homogeneous else []
    kinds += ["reflected"] if known(name).reflection is not None else []
    return kinds + ([DEAD[name]] if name in DEAD else [])


CASES = [(name, kind) for name in MODULES for kind in kinds_of(name)]


def mlp(name, dtype, deep):
    inner = [layers(8, 8), MODULES[name]()] if deep else []
    return nn.Sequential(layers(6, 8), MODULES[name](), *inner, layers(8, 3)).to(dtype).eval()


def cnn(name, dtype, pool=nn.AvgPool2d):
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)[4:] = norm.weight[:4]
        norm.running_var.uniform_(0.5, 1.5)[4:] = norm.running_var[:4]
        norm.bias.zero_(), norm.running_mean.zero_()
    return nn.Sequential(
        layers(2, 8, kernel=3), norm, MODULES[name](), pool(2), layers(8, 6, kernel=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), layers(24, 3),
    ).to(dtype).eval()  # fmt: skip


def unchanged(model, old, x, dtype, event):
    with torch.no_grad():
        before, after = old(x).double(), model(x).double()
    scale = 1 + float(before.abs().max())
    assert float((before - after).norm(dim=1).max()) <= event.bound + 300 * torch.finfo(dtype).eps * scale
    return float((before - after).abs().max()) / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_planted_redundancy_goes_from_an_mlp(name, kind, dtype):
    for seed, deep in ((0, False), (1, True)):
        torch.manual_seed(seed)
        model = mlp(name, dtype, deep)
        half = plant(model[0], kind)
        old, x = copy.deepcopy(model), torch.nn.functional.normalize(torch.randn(64, 6, dtype=dtype), dim=1)
        event = shrink(model, example_inputs=x)
        assert event.widths_after["0"] <= 8 - half, event
        assert model[0].weight.shape[0] == event.widths_after["0"]
        assert unchanged(model, old, x, dtype, event) < 300 * torch.finfo(dtype).eps


POOLED = [(*case, nn.AvgPool2d) for case in CASES] + [
    (*case, nn.MaxPool2d) for case in CASES if case[0] in ("relu", "abs", "tanh", "sigmoid", "gelu")
]


@pytest.mark.parametrize(("name", "kind", "pool"), POOLED)
def test_planted_redundancy_goes_from_a_cnn_with_batch_norm(name, kind, pool):
    """Except reflections f(-z) = -f(z) + o under max pooling, which they do not pass (statement 8)."""
    torch.manual_seed(0)
    model = cnn(name, torch.float64, pool)
    half = plant(model[0], kind)
    old, x = copy.deepcopy(model), torch.randn(16, 2, 6, 6, dtype=torch.float64)
    x /= x.flatten(1).norm(dim=1).max()
    event = shrink(model, example_inputs=x)
    barred = kind == "reflected" and pool is nn.MaxPool2d and known(name).reflection[0] < 0
    assert event.widths_after["0"] <= 8 - (0 if barred else half), event
    assert unchanged(model, old, x, torch.float64, event) < 1e-12


@torch.no_grad()
def worst(model, old, norm, x, steps=24):
    """Largest change of the output that inputs of that norm show: random ones, and the worst eight pushed uphill."""

    def ball(z):
        return z * (norm / z.flatten(1).norm(dim=1).clamp(min=1e-30)).view(-1, *[1] * (z.ndim - 1)).clamp(max=1)

    def change(z):
        return (model(z) - old(z)).flatten(1).norm(dim=1)

    x = ball(x * 1e3)
    x = torch.cat([x, 0.3 * x, x[:1] * 0])
    found = change(x)
    most, x = float(found.max()), x[found.topk(8).indices]
    for step in range(steps):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            found = change(leaf)
            (uphill,) = torch.autograd.grad(found.sum(), leaf)
        most = max(most, float(found.detach().max()))
        x = ball(x + 0.6 * 0.9**step * norm * torch.nn.functional.normalize(uphill.flatten(1), dim=1).view_as(x))
    return most


BOUNDED = [name for name in MODULES if math.isfinite(known(name).lipschitz)]


def random_chain(name, shape):
    """A network of that neuron type whose layers, poolings and norms are drawn by the test's own seed."""
    if shape == "mlp":
        return mlp(name, torch.float64, deep=True), torch.randn(32, 6, dtype=torch.float64)
    if shape == "tokens":
        model = nn.Sequential(
            layers(3, 6), MODULES[name](), layers(6, 4), nn.Flatten(), layers(20, 2), nn.LogSoftmax(1)
        )
        return model.double().eval(), torch.randn(32, 5, 3, dtype=torch.float64)
    pools = [
        nn.MaxPool2d(3, 2),
        nn.AvgPool2d(3, 1, 1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveMaxPool2d(4),
    ]
    pool = pools[int(torch.randint(len(pools), ()))]
    middle = (
        [pool, MODULES[name]()]
        if torch.rand(()) < 0.5 and pool.__class__ is not nn.AvgPool2d
        else [MODULES[name](), pool]
    )
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight, -1.5, 1.5), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 1.5)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=int(torch.randint(2, ())), dilation=int(torch.randint(1, 3, ()))), norm, *middle,
        weight_norm(nn.Conv2d(6, 5, 3, stride=int(torch.randint(1, 3, ())), padding=1)), MODULES[name](),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers(5, 3),
    )  # fmt: skip
    return model.double().eval(), torch.randn(32, 2, 10, 10, dtype=torch.float64)


@settings(max_examples=32)
@given(
    st.integers(0, 2**31),
    st.sampled_from(BOUNDED),
    st.sampled_from(["mlp", "tokens", "cnn"]),
    st.floats(0.01, 30),
    st.floats(-1, 1),
    st.floats(-6, -1),
)
def test_no_input_of_the_norm_moves_the_output_beyond_the_bound(seed, name, shape, norm, size, close):
    """Near duplicates go, and what else the bound allows."""
    torch.manual_seed(seed)
    model, x = random_chain(name, shape)
    plant(model[0], "duplicate")
    model[0].weight.data += 10**close * torch.randn_like(model[0].weight)
    old = copy.deepcopy(model)
    bound = 10**size * norm
    event = shrink(model, example_inputs=x, bound=bound, input_norm=norm)
    assert math.fsum(change.bound for change in event.changes) == pytest.approx(event.bound)
    assert event.bound <= bound
    assert worst(model, old, norm, x) <= event.bound * (1 + 1e-9) + 1e-11 * (1 + norm)


def test_a_larger_bound_removes_more_and_is_used():
    widths = []
    for bound in (0.0, 0.3, 3.0, 1e6):
        torch.manual_seed(0)
        model = mlp("relu", torch.float64, deep=True)
        event = shrink(model, example_inputs=torch.randn(4, 6, dtype=torch.float64), bound=bound, input_norm=1.0)
        widths.append(sum(event.widths_after.values()))
        assert bool(event.changes) == (event.reason is None)
    assert widths[0] == 19 > widths[1] > widths[2] > widths[3] == 5  # one neuron in each hidden layer, and the output


def test_event_is_plain_data_and_its_numbers_are_the_models():
    model = mlp("tanh", torch.float32, deep=True)
    half = plant(model[0], "reflected")
    event = shrink(model, example_inputs=torch.randn(4, 6))
    assert type(event).from_json(event.to_json()) == event
    assert (event.widths_before["0"], event.widths_after["0"]) == (8, 8 - half)
    assert event.parameters_after == sum(p.numel() for p in model.parameters()) < event.parameters_before
    assert event.flops_after < event.flops_before
    assert (event.predicted, event.measured, event.certificate, event.budget) == (None, None, None, None)
    assert [(c.group, c.predicted, c.error) for c in event.changes] == [("0", None, None)]


def test_negative_folds_do_not_pass_a_max_pooling():
    for pool_first in (False, True):
        torch.manual_seed(0)
        middle = [nn.MaxPool2d(2), nn.Tanh()] if pool_first else [nn.Tanh(), nn.MaxPool2d(2)]
        model = nn.Sequential(layers(2, 8, kernel=3), *middle, nn.Flatten(), layers(32, 3)).eval()
        plant(model[0], "reflected")
        event = shrink(model, example_inputs=torch.randn(4, 2, 6, 6), input_norm=1.0)
        assert event.changes == ()
        plant(model[0], "duplicate")
        assert shrink(model, example_inputs=torch.randn(4, 2, 6, 6)).widths_after["0"] == 4


@pytest.mark.parametrize(("act", "width"), [(nn.Sigmoid, 8), (nn.ReLU, 5)])
def test_no_constant_passes_zero_padding(act, width):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 6)
    for reader in ([nn.Conv2d(8, 3, 3, padding=1)], [nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 3, 3)]):
        model = nn.Sequential(layers(2, 8, kernel=3), act(), *reader).eval()
        plant(model[0], "constant")
        old = copy.deepcopy(model)
        event = shrink(model, example_inputs=x)
        assert event.widths_after["0"] == width  # four constants are one where a multiple of a neuron is one
        assert unchanged(model, old, x, torch.float32, event) < 1e-4


class Gated(nn.Module):
    """Value times f(gate): by two layers, by the halves of one (either first), or by nn.GLU; linear or convolutions."""

    def __init__(self, form, name, units, inputs=6, outputs=3, pool=None):
        super().__init__()
        self.form, self.gate, self.dim, kernel = form, MODULES[name](), 1 if pool else -1, 2 if pool else 0
        widths = [units, units] if form == "two" else [2 * units]
        self.made = nn.ModuleList([layers(inputs, width, kernel=kernel) for width in widths])
        behind = [pool, nn.Flatten(), layers(units * 4, outputs)] if pool else [layers(units, outputs)]
        self.read = nn.Sequential(*behind)

    def forward(self, x):
        made = [layer(x) for layer in self.made]
        if self.form == "glu":
            return self.read(nn.functional.glu(made[0], self.dim))
        first, second = made if self.form == "two" else made[0].chunk(2, self.dim)
        return self.read(self.gate(first) * second if self.form == "gate first" else first * self.gate(second))

    def halves(self):
        """Value and gate, each one row of weights and bias a unit."""
        rows = torch.cat([torch.cat([m.weight.data.flatten(1), m.bias.data[:, None]], 1) for m in self.made])
        return rows.chunk(2)[::-1] if self.form == "gate first" else rows.chunk(2)

    def load(self, value, gate):
        rows = torch.cat([gate, value] if self.form == "gate first" else [value, gate])
        for layer, part in zip(self.made, rows.split([len(m.weight) for m in self.made]), strict=True):
            layer.weight.data.copy_(part[:, :-1].view_as(layer.weight))
            layer.bias.data.copy_(part[:, -1])


def plant_units(model, name, pool=None):
    """Makes all units but the first four redundant: four of each kind that there is."""
    value, gate = model.halves()
    value, gate, none = value[:4], gate[:4], torch.zeros_like(value[:4])
    size = torch.tensor([[0.25], [0.5], [2.0], [4.0]]).to(value)  # exact in floats: many roundings would add up
    sign = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]).to(value) ** (not isinstance(pool, nn.MaxPool2d))
    fixed = torch.cat([none[:, :-1], value[:, -1:]], 1)
    units = [(value, gate), (value, gate), (sign * size * value, gate), (none, gate), (fixed, fixed)]
    if known(name).homogeneous:
        units += [(size * value, 2 * size * gate), (value, none)]
    if known(name).reflection == (-1.0, 0.0):
        units += [(-sign * value, -gate)]
    if name == "relu":
        shut = gate.clone()
        shut[:, -1] = -30.0
        units += [(value, shut)]
    model.load(*(torch.cat(half) for half in zip(*units, strict=True)))


def count_units(name):
    return 4 * (5 + 2 * known(name).homogeneous + (known(name).reflection == (-1.0, 0.0)) + (name == "relu"))


TWO = [("two", name) for name in ("silu", "gelu", "relu", "linear", "tanh")]
GATES = [*TWO, ("glu", "sigmoid"), ("halves", "gelu"), ("halves", "relu"), ("gate first", "silu")]


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2, 2), nn.AvgPool2d(3, 2, 1)])
@pytest.mark.parametrize(("form", "name"), GATES)
def test_planted_redundancy_goes_from_gated_units(form, name, pool):
    """Duplicates, parallel values, parallel gates, reflected gates, dead and constant units. No constant passes a
    pooling with zeros beside the image: constant units stay, as one where their gates are parallel."""
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = Gated(form, name, count_units(name), 2 if pool else 6, pool=pool).to(dtype).eval()
        plant_units(model, name, pool)
        old = copy.deepcopy(model)
        x = torch.randn(64, *((2, 5, 5) if pool else (6,)), dtype=dtype)
        x /= x.flatten(1).norm(dim=1).max()
        event = shrink(model, example_inputs=x)
        kept = len(model.made[-1].weight) // (1 if form == "two" else 2)
        assert kept <= 4 + (1 if known(name).homogeneous else 4) * isinstance(pool, nn.AvgPool2d), event
        assert model.read[-1].weight.shape[1] == kept * (4 if pool else 1)
        assert unchanged(model, old, x, dtype, event) < 300 * torch.finfo(dtype).eps


@settings(max_examples=24)
@given(
    st.integers(0, 2**31),
    st.sampled_from(GATES),
    st.sampled_from(["gated", "behind a layer", "before a gate"]),
    st.floats(0.05, 5),
    st.floats(-0.5, 1),
    st.floats(-4, -0.5),
)
def test_no_input_of_the_norm_moves_gated_networks_beyond_the_bound(seed, gate, place, norm, size, close):
    """Near duplicates and multiples in each layer: their removals add up along the network."""
    torch.manual_seed(seed)
    parts = [Gated(*gate, 12, 6, 4), *([Gated(*gate, 12, 4, 3)] if place == "before a gate" else [])]
    plain = [layers(6, 6), nn.Tanh()] if place == "behind a layer" else []
    model = nn.Sequential(*plain, *parts).double().eval()
    for part in parts:
        value, other = (half[torch.arange(12) % 5] for half in part.halves())
        value = value * torch.randn(12, 1, dtype=torch.float64)
        part.load(*(half + 10**close * torch.randn_like(half) for half in (value, other)))
    if plain:
        plant(model[0], "duplicate")
    old, bound = copy.deepcopy(model), 10**size * norm
    x = torch.randn(32, 6, dtype=torch.float64)
    event = shrink(model, example_inputs=x, bound=bound, input_norm=norm)
    assert not plain or event.widths_after["0"] <= 3
    assert event.bound <= bound
    assert worst(model, old, norm, x) <= event.bound * (1 + 1e-9) + 1e-10 * (1 + norm)


@pytest.mark.parametrize("name", ["linear", "relu", "sigmoid", "silu", "tanh", "cos"])
def test_gain_of_a_gate_holds(name):
    """Statement 9; attained by f(z) = z, at a = 0."""
    torch.manual_seed(0)
    function = neuron(name).function
    for norm in (0.01, 1.0, 30.0):
        a, b = norm * torch.nn.functional.normalize(torch.randn(2, 20000, dtype=torch.float64), dim=0)
        b[0], a[0] = norm, 0.0
        other = torch.stack([a, b]) * (1 - 1e-6 * torch.rand(2, 20000, dtype=torch.float64))
        other[0, 0] = 1e-6 * norm
        other[1, 0] = b[0]
        slope = (a * function(b) - other[0] * function(other[1])).abs() / (torch.stack([a, b]) - other).norm(dim=0)
        assert float(slope.max()) <= gate_gain(neuron(name), norm) * (1 + 1e-6)
        if name == "linear":
            assert float(slope.max()) >= 0.99 * gate_gain(neuron(name), norm)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))) + x)


class Changed(nn.Module):
    """Reads the base of a view that was changed in place: the graph doesn't say so."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layers(6, 8), layers(8, 2)

    def forward(self, x):
        y = self.a(x)
        y.unsqueeze(-1).relu_()
        return self.b(y)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Residual, "joins 2 tensors"),
        (Changed, "changes in place"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), r"model.eval\(\)"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 2)), r"model.eval\(\)"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)), "layer_norm"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 2)), "comes between"),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2)), "spectral_norm"),
    ],
)  # fmt: skip
def test_without_a_closed_form_nothing_goes_and_the_notes_say_why(make, reason):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 6)
    old = copy.deepcopy(model.state_dict())
    event = shrink(model, example_inputs=x, bound=1e9)
    assert event.changes == ()
    assert "calibration" in event.reason
    assert re.search(reason, "; ".join(event.notes.values())), event.notes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old[name]), name


def test_slopes_of_prelu_are_read():
    torch.manual_seed(0)
    for slopes, width in ((nn.PReLU(8), 4), (nn.PReLU(init=0.9), 4)):
        model = nn.Sequential(layers(6, 8), slopes, layers(8, 3)).eval()
        plant(model[0], "parallel")
        assert shrink(model, example_inputs=torch.randn(4, 6)).widths_after["0"] == width
    model = nn.Sequential(layers(6, 8), nn.PReLU(8), layers(8, 3)).eval()
    plant(model[0], "duplicate")
    nn.init.normal_(model[1].weight)
    event = shrink(model, example_inputs=torch.randn(4, 6))
    assert event.changes == ()
    assert "several slopes" in event.notes["0"] or "prelu" in event.notes["0"]


def wide(dropout=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        layers(6, 64),
        nn.ReLU(),
        *([nn.Dropout(0.5)] if dropout else []),
        layers(64, 32),
        nn.Tanh(),
        layers(32, 3),
    )
    with torch.no_grad():
        model[0].weight[24:] = model[0].weight[:24].repeat(2, 1)[:40]
        model[0].bias[24:] = model[0].bias[:24].repeat(2)[:40]
    return model


@pytest.mark.parametrize("loss_fn", [None, nn.functional.cross_entropy])
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_with_calibration_duplicates_go(loss_fn, batches):
    model = wide().eval()
    old, x, y = copy.deepcopy(model), torch.randn(600, 6), torch.randint(3, (600,))
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True)) if loss_fn else list(x.chunk(batches))
    event = shrink(model, data, example_inputs=x[:4], budget=1e-7, loss_fn=loss_fn)
    assert event.widths_after["0"] == 24
    assert event.predicted <= event.budget == 1e-7
    assert event.certificate is not None
    assert (event.certificate.changed_predictions == 0) is (loss_fn is not None)
    with torch.no_grad():
        assert float((model(x) - old(x)).norm() / old(x).norm()) < 1e-4 + (2e-3 if event.widths_after["2"] < 32 else 0)


def test_without_a_budget_the_price_decides():
    model, x = wide(), torch.randn(900, 6)
    event = shrink(model, (x[i : i + 100] for i in range(0, 900, 100)), example_inputs=x[:4])
    assert event.widths_after["0"] <= 24
    assert event.budget is None or event.predicted <= event.budget


def test_an_endless_loader_is_read_as_far_as_needed():
    def endless():
        while True:
            yield torch.randn(512, 6)

    assert shrink(wide(), endless(), example_inputs=torch.randn(4, 6)).widths_after["0"] <= 24


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_modes_stay_and_dropout_counts_as_off(training, calibrated):
    model = wide(dropout=True).train(training)
    model[4].eval()
    modes = [module.training for module in model.modules()]
    old, x = copy.deepcopy(model).eval(), torch.randn(300, 6)
    rng = torch.get_rng_state()
    event = shrink(model, [x] if calibrated else None, example_inputs=x, budget=1e-8 if calibrated else None)
    assert torch.equal(rng, torch.get_rng_state())
    assert event.widths_after["0"] == 24
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), old(x), atol=1e-3 if calibrated else 1e-5)


DATA = [torch.randn(8, 6)]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ({"bound": -1.0}, ["`bound` must be a finite number"]),
        ({"bound": math.nan, "input_norm": math.inf}, ["`bound` must", "`input_norm` must"]),
        ({"budget": 0.1}, ["`budget` must be None without"]),
        ({"calibration": DATA, "bound": 1.0, "input_norm": 1.0}, ["`bound` must be None with", "`input_norm` must"]),
        ({"calibration": []}, ["`calibration` must hold at least one batch"]),
        ({"calibration": DATA, "loss_fn": nn.functional.mse_loss}, ["must give pairs"]),
        ({"calibration": [torch.full((8, 6), math.nan)]}, ["`calibration` must be finite"]),
        ({"calibration": [torch.randn(0, 6)]}, ["`calibration` must not be empty"]),
        ({"calibration": DATA, "loss_fn": 3}, ["`loss_fn` must be callable"]),
        ({"example_inputs": torch.randn(4, 5)}, ["`example_inputs` must fit"]),
        ({"example_inputs": torch.zeros(4, 6)}, ["`input_norm` must be given"]),
        ({"model": "network"}, ["`model` must be a torch.nn.Module"]),
        ({"example_inputs": torch.randn(4, 5), "bound": -1}, ["`example_inputs` must fit", "`bound`"]),
    ],
)  # fmt: skip
def test_bad_input_names_every_problem_and_changes_nothing(arguments, problems):
    model = wide()
    old = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError) as error:
        shrink(**{"model": model, "example_inputs": torch.randn(4, 6), **arguments})
    for problem in problems:
        assert problem in str(error.value)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused():
    model = wide()
    model[0].weight.data[3, 3] = math.nan
    with pytest.raises(ArgumentError, match="`model` must have finite parameters"):
        shrink(model, example_inputs=torch.randn(4, 6))


def test_every_neuron_type_of_the_table_is_tested():
    assert set(MODULES) == set(NEURONS)


LINKS = [
    *(lambda a=a: nn.Conv2d(2, 3, *a) for a in itertools.product((1, 3), (1, 2, 4), (0, 2), (1, 2))),
    *(lambda a=a: nn.AvgPool2d(*a) for a in itertools.product((2, 3), (1, 2, 3), (0, 1), (False,), (False, True))),
    *(lambda a=a: nn.MaxPool2d(*a) for a in itertools.product((2, 3), (1, 2, 3), (1,), (1, 2))),
    lambda: nn.AvgPool2d(2, 2, 1, ceil_mode=True), lambda: nn.AvgPool2d(2, 2, 1, count_include_pad=False),
    lambda: nn.AdaptiveAvgPool2d((2, 1)), lambda: nn.AdaptiveMaxPool2d((4, 2)), lambda: nn.BatchNorm2d(2),
    lambda: Elementwise(lambda x: x.mean((2, 3))), lambda: Elementwise(lambda x: x.amax(1)), lambda: nn.Linear(8, 3),
    lambda: Elementwise(lambda x: 3 * x), lambda: Elementwise(lambda x: (x - 2) / 0.5), lambda: nn.PReLU(2, 1.5),
    lambda: Elementwise(lambda x: x.permute(0, 2, 3, 1)), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(2),
    lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 32))),
]  # fmt: skip


@pytest.mark.parametrize("make", LINKS)
def test_gain_and_offset_of_each_op_hold(make):
    torch.manual_seed(0)
    model = make().double().eval()
    if isinstance(model, nn.BatchNorm2d):
        for tensor in (model.weight.data, model.bias.data, model.running_mean):
            tensor.normal_()
        model.running_var.uniform_()
    sizes = torch.logspace(-3, 1, 400, dtype=torch.float64)
    x = torch.randn(400, 2, 8, 8, dtype=torch.float64) * sizes[:, None, None, None]
    gain, offset = 1.0, 0.0
    for link in trace_chain(model, (x,), {}):
        ahead, constant = gain_and_offset(model, link)
        gain, offset = gain * ahead, offset * ahead + constant
    y = torch.zeros_like(x).requires_grad_()  # power iteration for the steepest direction at 0 and elsewhere
    point, most = torch.where(torch.rand(400, 1, 1, 1) < 0.2, 0.0, x), 0.0
    for _ in range(30):
        step = torch.nn.functional.normalize((y if most else x).flatten(1), dim=1).view_as(x) * 1e-3
        other = (point + step).requires_grad_()
        change = (model(other) - model(point)).flatten(1).norm(dim=1)
        (y,) = torch.autograd.grad(change.sum(), other)
        most = max(most, float(change.max() / 1e-3))
    assert most <= gain * (1 + 1e-9)
    assert float(model(x * 0).flatten(1).norm(dim=1).max()) <= offset * (1 + 1e-9)
    assert most >= 0.25 * gain  # and they are not far too large


def constant_kernel():
    layer = nn.Conv1d(1, 1, 3, padding=1)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def steep_norm():
    layer = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -3.0]))
        layer.running_var.copy_(torch.tensor([1.0, 0.25]))
    return layer


SPIKE, FLAT = torch.zeros(1, 1, 9, 9), torch.ones(1, 1, 12, 12)
SPIKE[..., 4, 4] = 1.0


@pytest.mark.parametrize(
    ("make", "x", "least"),
    [
        (constant_kernel, torch.ones(1, 1, 1000), 0.99),
        (lambda: nn.Conv1d(1, 1, 3, 3), torch.ones(1, 1, 9), 0.99),
        (steep_norm, torch.stack([0 * SPIKE[0, 0], SPIKE[0, 0]])[None], 0.99),
        (lambda: nn.MaxPool2d(3, 1), SPIKE, 0.99),
        (lambda: nn.MaxPool2d(3), SPIKE, 0.99),
        (lambda: nn.AvgPool2d(3), FLAT, 0.99),
        (lambda: nn.AdaptiveAvgPool2d(3), FLAT, 0.99),
        (lambda: Elementwise(lambda x: x.mean((2, 3))), FLAT, 0.99),
        (lambda: Elementwise(lambda x: x.amax((2, 3))), SPIKE, 0.99),
    ],
)
def test_gains_are_attained(make, x, least):
    """Statement 8: an input whose image is as large as the constant of the op allows."""
    torch.manual_seed(0)
    model, x = make().double(), x.double()
    if isinstance(model, nn.Conv1d) and model.stride == (3,):
        x = model.weight.detach().repeat(1, 1, 3)
    (link,) = trace_chain(model, (x,), {})
    with torch.no_grad():
        found = float((model(x) - model(x * 0)).norm() / x.norm())
    gain = gain_and_offset(model, link)[0]
    assert least * gain <= found <= gain * (1 + 1e-9)


def test_gains_of_softmax_are_attained():
    for make, logits, gain in (
        (lambda: nn.Softmax(1), [[0.0, 0.0]], 0.5),
        (lambda: nn.LogSoftmax(1), [[30.0, 0.0, 0.0]], 3**0.5),
    ):
        x = torch.tensor(logits, dtype=torch.float64)
        (link,) = trace_chain(make(), (x,), {})
        assert link.gain == pytest.approx(gain)
        slope = float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(make(), x)[0, :, 0], 2))
        assert 0.99 * gain <= slope <= gain * (1 + 1e-9)


def test_bound_of_a_chain_is_attained():
    """Statement 10: two nearly parallel neurons read by a column that the later layers stretch most."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.01], [1.0, 0.0]])), model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[3.0, 1.0], [0.0, 0.0]])), model[2].bias.fill_(10.0)
        model[4].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]])), model[4].bias.zero_()
    old, x = copy.deepcopy(model), torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    event = shrink(model, example_inputs=x, bound=0.1, input_norm=1.0)
    assert event.widths_after["0"] == 1
    found = float((model(x) - old(x)).norm(dim=1).max())
    assert 0.99 * event.bound <= found <= event.bound * (1 + 1e-9)


def test_bound_says_which_predictions_can_change():
    torch.manual_seed(0)
    model, x = mlp("tanh", torch.float64, deep=False), torch.randn(200, 6, dtype=torch.float64)
    plant(model[0], "duplicate")
    old = copy.deepcopy(model)
    sure = shrink(model, example_inputs=x)
    assert sure.notes["predictions"] == "the largest output can change for 0 of the 200 example inputs at most"
    event = shrink(model, example_inputs=x, bound=0.5)
    limit = int(event.notes["predictions"].split("for ")[1].split()[0])
    assert int((model(x).argmax(1) != old(x).argmax(1)).sum()) <= limit < 200


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.AdaptiveAvgPool2d(3), "unequal size"),
        (lambda: nn.Conv2d(2, 2, 3, groups=2), "grouped"),
        (lambda: nn.AvgPool2d(2, divisor_override=3), "no closed form"),
        (lambda: Elementwise(lambda x: x.transpose(0, 1)), "dimension 0"),
        (lambda: Elementwise(lambda x: x.reshape(-1, 8)), "dimension 0"),
        (lambda: Elementwise(lambda x: x.softmax(0)), "inputs of a batch"),
        (lambda: Elementwise(lambda x: x.mean()), "inputs of a batch"),
        (lambda: Elementwise(lambda x: x + 0 * x.exp()), "joins 2"),
        (lambda: Elementwise(lambda x: x * x.sigmoid()), "joins 2"),
        (lambda: Elementwise(lambda x: x.chunk(2, 3)[0] * x.chunk(2, 2)[0].mT.sigmoid()), "joins 2"),
        (lambda: Elementwise(lambda x: x.chunk(4, 3)[0] * x.chunk(4, 3)[2].sigmoid()), "joins 2"),
        (lambda: Elementwise(lambda x: x[:4].chunk(2, 0)[0] * x[:4].chunk(2, 0)[1].sigmoid()), "joins 2"),
        (lambda: Elementwise(lambda x: x.cos().chunk(2, 1)[0] * x.sin().chunk(2, 1)[1].sigmoid()), "joins 2"),
        (lambda: Elementwise(lambda x: x.long().float()), "floating"),
        (lambda: Elementwise(lambda x: nn.functional.dropout(x, 0.5)), "eval mode too"),
    ],
)
def test_what_is_no_chain_says_why(make, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = make(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.inner(x)

    found = trace_chain(Model().eval(), (torch.randn(5, 2, 8, 8),), {})
    assert isinstance(found, str)
    assert reason in found
