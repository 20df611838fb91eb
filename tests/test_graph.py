"""Channel groups, checked by what they are for: planted duplicates are folded away and the output stays the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from apoptorch.errors import ExportError
from apoptorch.graph import trace
from apoptorch.graph.capture import capture
from apoptorch.neurons import neuron
from apoptorch.plan import Fold, FoldPlan
from apoptorch.rehearsal import rehearsed
from apoptorch.surgery import Surgery

OUTPUT = "its channels are the model's output"


class Net(nn.Module):
    """`forward` is `compute(self, *inputs)`."""

    def __init__(self, compute, **members):
        super().__init__()
        self.compute = compute
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def wake(model):
    """Random values everywhere, also where modules start at 0 or 1: a wrong slot must show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return model


def plant(model, group, seed):
    """Makes about half of each block's channels copies of others of it, and returns the plan that is right then."""
    generator, m = torch.Generator().manual_seed(seed), group.width // group.blocks
    keep, source = [], list(range(group.width))
    for first in range(0, group.width, m):
        order = [first + c for c in torch.randperm(m, generator=generator).tolist()]
        stay = sorted(order[m // 2 :])
        keep += stay
        for i, channel in enumerate(order[: m // 2]):
            source[channel] = stay[i % len(stay)]
    coeffs = torch.zeros(group.width, len(keep), dtype=torch.float64)
    coeffs[range(group.width), [keep.index(c) for c in source]] = 1.0
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for slot in group.producers + group.passthrough:
        with torch.no_grad():
            tensor, index = tensors[slot.tensor], slot.index(group.width)
            parts = slot.opened(tensor).movedim(slot.dim, 0).clone()
            parts[index.flatten()] = parts[index[source].flatten()]
            tensor.copy_(slot.closed(parts.movedim(0, slot.dim)))
    return FoldPlan(group.name, torch.tensor(keep), (Fold(coeffs),) * len(group.consumers))


def groups_of(model, *inputs):
    return {group.name: group for group in trace(model, inputs, {})[0]}


def fold_planted(model, *inputs, groups=None):
    """Traces, plants, folds every prunable group; returns outputs before and after in eval mode, and the groups."""
    groups = groups_of(model, *inputs) if groups is None else groups
    plans = {name: plant(model, g, seed) for seed, (name, g) in enumerate(groups.items()) if g.prunable}
    model.eval()
    with torch.no_grad():
        before = model(*inputs)
    with Surgery(model) as surgery:
        groups = {group.name: group for group in surgery.fold_all_(list(groups.values()), plans.values())}
    with torch.no_grad():
        after = model(*inputs)
    return before, after, groups


def assert_attributes_follow(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert module.weight.shape == shape, name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_mean.shape == (module.num_features,), name
        elif isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,), name


def assert_trains(model, *inputs):
    model.train()
    output = model(*inputs)
    output.square().mean().backward()
    graded = [p for p in model.parameters() if p.grad is not None]
    assert graded
    assert all(p.grad.shape == p.shape and p.grad.isfinite().all() for p in graded)


def check(model, x, prunable, pinned=(), tolerance=1e-12):
    """The check that every entry goes through. `prunable`: group -> neuron; `pinned`: group -> part of its reason."""
    model = wake(model.to(torch.float64))
    before, after, groups = fold_planted(model, x)
    assert {name: g.neuron for name, g in groups.items() if g.prunable} == dict(prunable)
    assert {name for name, g in groups.items() if not g.prunable} == set(pinned)
    for name, reason in dict(pinned).items():
        assert reason in groups[name].reason
    for name in prunable:
        full, blocks = groups[name].full_width, groups[name].blocks
        assert groups[name].width == full - full // blocks // 2 * blocks
    assert before.abs().max() > 1e-3
    assert (after - before).norm() <= tolerance * before.norm()
    assert_attributes_follow(model)
    assert_trains(model, x)


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def seeded(build):
    torch.manual_seed(0)
    return build()


def mlp(*between, width=12, inputs=6):
    return nn.Sequential(nn.Linear(inputs, width), *between, nn.Linear(width, 3))


LAST = {"last": OUTPUT}
VECTOR, IMAGE, LINE, VOLUME = (7, 6), (3, 2, 8, 8), (3, 2, 12), (2, 2, 5, 5, 5)


def head(*layers, last):
    """Layers named by their number, and a last one by the name "last"."""
    model = nn.Sequential(*layers)
    model.add_module("last", last)
    return model


# name -> (model, shape of its input, prunable groups and their neurons, pinned groups and a part of the reason)
CASES = {
    "one linear": lambda: (head(last=nn.Linear(6, 3)), VECTOR, {}, LAST),
    "linear": lambda: (head(nn.Linear(6, 12), nn.ReLU(), last=nn.Linear(12, 3)), VECTOR, {"0": "relu"}, LAST),
    "no bias": lambda: (
        head(nn.Linear(6, 12, bias=False), nn.ReLU(), last=nn.Linear(12, 3, bias=False)), VECTOR, {"0": "relu"}, LAST),
    "no activation": lambda: (head(nn.Linear(6, 12), last=nn.Linear(12, 3)), VECTOR, {"0": "linear"}, LAST),
    "two activations": lambda: (
        head(nn.Linear(6, 12), nn.Tanh(), nn.ReLU(), last=nn.Linear(12, 3)), VECTOR, {"0": "general"}, LAST),
    "deep": lambda: (
        head(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), last=nn.Linear(9, 3)), VECTOR,
        {"0": "relu", "2": "tanh"}, LAST),
    "more dimensions": lambda: (
        head(nn.Linear(6, 12), nn.ReLU(), last=nn.Linear(12, 3)), (2, 5, 6), {"0": "relu"}, LAST),
    "no batch": lambda: (head(nn.Linear(6, 12), nn.ReLU(), last=nn.Linear(12, 3)), (6,), {"0": "relu"}, LAST),
    "conv1d": lambda: (
        head(nn.Conv1d(2, 8, 3), nn.ReLU(), last=nn.Conv1d(8, 3, 3)), LINE, {"0": "relu"}, LAST),
    "conv2d": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), last=nn.Conv2d(8, 3, 3)), IMAGE, {"0": "relu"}, LAST),
    "conv3d": lambda: (
        head(nn.Conv3d(2, 8, 3), nn.ReLU(), last=nn.Conv3d(8, 3, 2)), VOLUME, {"0": "relu"}, LAST),
    "conv without batch": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), last=nn.Conv2d(8, 3, 3)), (2, 8, 8), {"0": "relu"}, LAST),
    "strided, dilated, padded": lambda: (
        head(nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, dilation=2, padding=2), nn.ReLU(),
             last=nn.Conv2d(6, 3, (1, 3), padding=(0, 1))),
        IMAGE, {"0": "relu", "2": "relu"}, LAST),
    "padding same": lambda: (
        head(nn.Conv2d(2, 8, 3, padding="same"), nn.ReLU(), last=nn.Conv2d(8, 3, 3, padding="same")), IMAGE,
        {"0": "relu"}, LAST),
    "padding valid": lambda: (
        head(nn.Conv2d(2, 8, 3, padding="valid"), nn.ReLU(), last=nn.Conv2d(8, 3, 3, padding="valid")), IMAGE,
        {"0": "relu"}, LAST),
    **{
        f"padding mode {mode}": lambda mode=mode: (
            head(nn.Conv2d(2, 8, 3), nn.ReLU(), last=nn.Conv2d(8, 3, 3, padding=1, padding_mode=mode)), IMAGE,
            {"0": "relu"}, LAST)
        for mode in ("reflect", "replicate", "circular")
    },
    "pads": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3), nn.ConstantPad2d(1, 2.0), nn.Tanh(),
             last=nn.Conv2d(6, 3, 3)),
        IMAGE, {"0": "general", "3": "general"}, LAST),
    "pad along channels": lambda: (
        head(nn.Linear(6, 12), nn.ConstantPad1d(1, 0.0), last=nn.Linear(14, 3)), VECTOR, {},
        {"0": "pads along them", **LAST}),
    "depthwise": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
             last=nn.Conv2d(8, 3, 1)),
        IMAGE, {"0": "general"}, LAST),
    "grouped": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), last=nn.Conv2d(8, 3, 1)), IMAGE,
        {"0": "relu", "2": "relu"}, LAST),
    "depthwise with a multiplier": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), last=nn.Conv2d(16, 3, 1)), IMAGE,
        {"0": "general"}, LAST),
    "batch norm 1d": lambda: (
        head(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), last=nn.Linear(12, 3)), VECTOR, {"0": "relu"}, LAST),
    "batch norm 1d on lines": lambda: (
        head(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), last=nn.Conv1d(8, 3, 3)), LINE, {"0": "relu"}, LAST),
    "batch norm 2d": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), last=nn.Conv2d(8, 3, 3)), IMAGE, {"0": "relu"}, LAST),
    "batch norm 3d": lambda: (
        head(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), last=nn.Conv3d(8, 3, 2)), VOLUME, {"0": "relu"}, LAST),
    "batch norm, not affine": lambda: (  # its scale is 1 whatever the channels' is: they can't be scaled
        head(nn.Linear(6, 12), nn.BatchNorm1d(12, affine=False), nn.ReLU(), last=nn.Linear(12, 3)), VECTOR,
        {"0": "general"}, LAST),
    "batch norm without statistics": lambda: (
        head(nn.Linear(6, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.ReLU(), last=nn.Linear(12, 3)), VECTOR,
        {"0": "relu"}, LAST),
    "batch norm after flatten": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 36), nn.ReLU(), last=nn.Linear(8 * 36, 3)), IMAGE,
        {"0": "relu"}, LAST),
    "batch norm after an activation": lambda: (
        head(nn.Linear(6, 12), nn.ReLU(), nn.BatchNorm1d(12), last=nn.Linear(12, 3)), VECTOR, {"0": "general"}, LAST),
    "batch norm over positions": lambda: (
        head(nn.Linear(6, 12), nn.BatchNorm1d(5), nn.ReLU(), last=nn.Linear(12, 3)), (4, 5, 6), {},
        {"0": "normalises over them", **LAST}),
    "layer norm": lambda: (
        head(nn.Linear(6, 12), nn.LayerNorm(12), last=nn.Linear(12, 3)), VECTOR, {}, {"0": "`aten.layer_norm` in 1",
        **LAST}),
    "group norm": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), last=nn.Conv2d(8, 3, 3)), IMAGE, {},
        {"0": "`aten.group_norm` in 1", **LAST}),
    "dropouts": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.AlphaDropout(0.3),
             nn.FeatureAlphaDropout(0.3), last=nn.Linear(8 * 36, 3)),
        IMAGE, {"0": "relu"}, LAST),
    "dropout 1d and 3d": lambda: (
        head(nn.Conv1d(2, 8, 3), nn.Dropout1d(0.3), nn.Tanh(), last=nn.Conv1d(8, 3, 3)), LINE, {"0": "tanh"}, LAST),
    "inplace": lambda: (
        head(nn.Linear(6, 12), nn.Dropout(0.1, inplace=True), nn.ReLU(inplace=True), nn.Linear(12, 9),
             nn.LeakyReLU(0.2, inplace=True), last=nn.Linear(9, 3)),
        VECTOR, {"0": "relu", "3": "leaky_relu(0.2)"}, LAST),
    "max pool, then activation": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.MaxPool2d(2), nn.ReLU(), last=nn.Conv2d(8, 3, 3)), IMAGE, {"0": "general"}, LAST),
    "flatten": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), last=nn.Linear(8 * 36, 3)), IMAGE, {"0": "relu"}, LAST),
    "flatten a single image": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), last=nn.Linear(8 * 36, 3)), (1, 2, 8, 8), {"0": "relu"},
        LAST),
    "flatten without batch": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(0), last=nn.Linear(8 * 36, 3)), (2, 8, 8), {"0": "relu"}, LAST),
    "flatten to one pixel": lambda: (
        head(nn.Conv2d(2, 8, 8), nn.ReLU(), nn.Flatten(), last=nn.Linear(8, 3)), IMAGE, {"0": "relu"}, LAST),
    "flatten only positions": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(2), last=nn.Conv1d(8, 3, 3)), IMAGE, {"0": "relu"}, LAST),
    "flatten channels into the batch": lambda: (
        head(nn.Conv2d(2, 8, 3), nn.Flatten(0, 1), nn.Flatten(), last=nn.Linear(36, 3)), IMAGE, {},
        {"0": OUTPUT, **LAST}),
    "linear over positions": lambda: (
        head(nn.Conv1d(2, 8, 3, padding=1), nn.Linear(12, 12), nn.ReLU(), last=nn.Conv1d(8, 3, 3)), LINE,
        {"0": "general"}, {"1": "slides along them", **LAST}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_planted_duplicates_fold_exactly(name):
    model, shape, prunable, pinned = seeded(CASES[name])
    check(model, inputs(*shape), prunable, pinned)


def flat(h):
    return h.flatten(1)


FUNCTIONS = {
    "view": (lambda h: h.view(h.size(0), -1), "relu"),
    "reshape": (lambda h: h.reshape(h.shape[0], h.shape[1] * 36), "relu"),
    "unflatten": (lambda h: h.flatten(1).unflatten(1, (-1, 36)).flatten(1), "relu"),
    "permute to the end and back": (lambda h: flat(h.permute(0, 2, 3, 1).permute(0, 3, 1, 2)), "relu"),
    "transpose": (lambda h: flat(h.transpose(1, 2).transpose(2, 1)), "relu"),
    "unsqueeze, squeeze": (lambda h: flat(h.unsqueeze(1).squeeze(1)), "relu"),
    "contiguous, clone": (lambda h: flat(h.clone().contiguous(memory_format=torch.channels_last)), "relu"),
    "mean": (lambda h: h.mean((2, 3)), "relu"),
    "mean, keepdim": (lambda h: h.mean((-2, -1), keepdim=True).squeeze(-1).squeeze(-1), "relu"),
    "sum": (lambda h: h.sum(3).sum(2), "relu"),
    "amax": (lambda h: h.amax((2, 3)), "relu"),
    "times a number": (lambda h: flat(2 * h / 3 - 1 + 0.5), "general"),
    "number minus": (lambda h: flat(1 - h), "general"),
    "number over": (lambda h: flat(1 / (1 + h)), "general"),
    "number to the power": (lambda h: flat(2**h), "general"),
    "power": (lambda h: flat(h**2), "general"),
    "square by itself": (lambda h: flat(h * h), "general"),
    "swish by hand": (lambda h: flat(h * h.sigmoid()), "general"),
    "added to itself": (lambda h: flat(h + h), "general"),
    "softmax over positions": (lambda h: h.flatten(2).softmax(2).flatten(1), "general"),
    "clamp": (lambda h: flat(h.clamp(0.1, 0.9)), "general"),
    "float": (lambda h: flat(h.float().double()), "relu"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_conv_and_linear(name):
    function, neuron_type = FUNCTIONS[name]
    x = inputs(*IMAGE)
    entries = function(torch.ones(3, 8, 6, 6, dtype=torch.float64)).shape[1]
    model = seeded(lambda: Net(
        lambda net, x: net.last(function(net.conv(x).relu())), conv=nn.Conv2d(2, 8, 3), last=nn.Linear(entries, 3)
    ))  # fmt: skip
    tolerance = 1e-6 if name == "float" else 1e-12
    check(model, x, {"conv": neuron_type}, LAST, tolerance)


POOLS = [
    *((f"{kind}Pool{n}d", (2,), n) for kind in ("Max", "Avg") for n in (1, 2, 3)),
    *((f"Adaptive{kind}Pool{n}d", (2,), n) for kind in ("Max", "Avg") for n in (1, 2, 3)),
    ("MaxPool2d", (3, 2, 1), 2),
    ("AvgPool2d", (3, 2, 1), 2),
    ("AvgPool1d", (3, 2, 1), 1),
    ("LPPool2d", (2, 2), 2),
    ("FractionalMaxPool2d", (2, 2), 2),
]


@pytest.mark.parametrize(("kind", "arguments", "n"), POOLS)
def test_pooling(kind, arguments, n):
    conv, shape = getattr(nn, f"Conv{n}d"), (3, 2, *[6] * n)
    model = seeded(lambda: head(conv(2, 8, 1), nn.ReLU(), getattr(nn, kind)(*arguments), last=conv(8, 3, 1)))
    if kind in ("LPPool2d", "FractionalMaxPool2d"):
        op = "" if kind == "LPPool2d" else "fractional_max_pool2d"
        groups = groups_of(model.double(), inputs(*shape))
        if not groups["0"].prunable:
            assert op in groups["0"].reason
            return
        check(model, inputs(*shape), {"0": groups["0"].neuron}, LAST)
        return
    check(model, inputs(*shape), {"0": "relu"}, LAST)
    assert groups_of(model, inputs(*shape))["0"].max_pooled == ("Max" in kind)


def test_pooling_that_gives_indices_too():
    pool = nn.MaxPool2d(2, return_indices=True)
    model = seeded(lambda: Net(
        lambda net, x: net.last(net.pool(net.conv(x))[0]), conv=nn.Conv2d(2, 8, 3), pool=pool, last=nn.Conv2d(8, 3, 1)
    ))  # fmt: skip
    check(model, inputs(*IMAGE), {"conv": "linear"}, LAST)


PINS = {
    "LogSoftmax": "normalises over them",
    "Softmax": "normalises over them",
    "Softmax2d": "normalises over them",
    "Softmin": "normalises over them",
    "MultiheadAttention": "attention",
}
ARGUMENTS = {
    "Threshold": (0.1, 0.3), "GLU": (1,), "LogSoftmax": (1,), "Softmax": (1,), "Softmin": (1,), "PReLU": (12,),
    "CELU": (0.7,), "ELU": (0.7,), "Hardshrink": (0.3,), "Hardtanh": (-0.5, 0.7), "LeakyReLU": (0.3,),
    "Softplus": (2.0, 5.0), "Softshrink": (0.2,),
}  # fmt: skip


@pytest.mark.parametrize("default", [False, True], ids=["constants", "default"])
@pytest.mark.parametrize("kind", sorted(set(activation.__all__) - {"MultiheadAttention", "Softmax2d", "GLU"}))
def test_every_activation_of_torch(kind, default):
    layer = seeded(
        lambda: getattr(nn, kind)(*(() if default and kind not in ("Threshold", *PINS) else ARGUMENTS.get(kind, ())))
    )
    x, model = inputs(7, 6), seeded(lambda: head(nn.Linear(6, 12), layer, last=nn.Linear(12, 3)))
    if kind in PINS:
        check(model, x, {}, {"0": PINS[kind], **LAST})
        return
    found = groups_of(model.double(), x)["0"].neuron
    check(model, x, {"0": found}, LAST)
    known = neuron(found)
    if known.function is None:  # nothing is claimed of these
        assert found in ("general", "prelu")
        assert math.isinf(known.lipschitz)
    else:
        z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
        torch.testing.assert_close(known.function(z), layer.eval()(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ReLU", "ReLU6", "ELU", "CELU", "SELU", "LeakyReLU", "RReLU", "SiLU", "Mish",
"Hardtanh",
                                  "Hardswish", "Hardsigmoid", "Threshold"])  # fmt: skip
def test_every_inplace_activation(kind):
    layer = getattr(nn, kind)(*((0.1, 0.3) if kind == "Threshold" else ()), inplace=True)
    model = seeded(lambda: head(nn.Linear(6, 12), layer, last=nn.Linear(12, 3)))
    check(model, inputs(7, 6), {"0": groups_of(model.double(), inputs(7, 6))["0"].neuron}, LAST)


def test_every_activation_is_in_one_of_the_tests():
    assert {"MultiheadAttention", "Softmax2d"} <= set(activation.__all__) & set(PINS)


def test_glu_makes_pairs_and_softmax_2d_pins():
    model = seeded(lambda: head(nn.Linear(6, 12), nn.GLU(), last=nn.Linear(6, 3)))
    check(model, inputs(7, 6), {"0": "general"}, LAST)
    assert (model[0].out_features, model.last.in_features) == (6, 3)
    model = seeded(lambda: head(nn.Conv2d(2, 8, 3), nn.Softmax2d(), last=nn.Conv2d(8, 3, 1)))
    check(model, inputs(*IMAGE), {}, {"0": PINS["Softmax2d"], **LAST})


def test_attention_pins_what_it_reads():
    model = seeded(lambda: Net(
        lambda net, x: net.last(net.attention(*[net.first(x)] * 3, need_weights=False)[0]),
        first=nn.Linear(6, 12), attention=nn.MultiheadAttention(12, 2, batch_first=True), last=nn.Linear(12, 3),
    ).double())  # fmt: skip
    x = inputs(2, 5, 6)
    groups = {group.name: group for group in rehearsed(model, list(groups_of(model, x).values()), (x,), {})}
    assert "embed" in groups["first"].reason or "embedding" in groups["first"].reason
    assert not any(group.prunable for name, group in groups.items() if name.startswith("attention.in_proj"))
    before, after, groups = fold_planted(model, x, groups=groups)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def parameter(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


def test_bare_parameters_per_channel_follow():
    def compute(net, x):
        h = net.first(x) * net.scale + net.offset
        return net.last(torch.clamp(h, max=net.limit) - (h.abs() ** net.power) / net.divisor)

    model = seeded(lambda: Net(compute, first=nn.Linear(6, 12), last=nn.Linear(12, 3), **{
        name: parameter(12) for name in ("scale", "offset", "limit", "power", "divisor")
    }))  # fmt: skip
    model.register_buffer("unused", torch.ones(12))
    check(model, inputs(7, 6), {"first": "general"}, LAST)
    assert {model.scale.shape, model.power.shape} == {(6,)}
    assert model.unused.shape == (12,)


def test_a_parameter_with_positions_and_one_that_broadcasts_follow():
    model = seeded(lambda: Net(
        lambda net, x: net.last(((net.conv(x) + net.map) * net.gain * net.column).flatten(1)),
        conv=nn.Conv2d(2, 8, 3), last=nn.Linear(8 * 36, 3), map=parameter(8, 6, 6), gain=parameter(1),
        column=parameter(8, 1, 1),
    ))  # fmt: skip
    check(model, inputs(*IMAGE), {"conv": "general"}, LAST)
    assert (model.map.shape, model.gain.shape, model.column.shape) == ((4, 6, 6), (1,), (4, 1, 1))


def test_a_parameter_is_cut_in_blocks_after_flatten():
    model = seeded(lambda: Net(
        lambda net, x: net.last(net.conv(x).flatten(1) * net.scale), conv=nn.Conv2d(2, 8, 3), last=nn.Linear(8 * 36, 3),
        scale=parameter(8 * 36),
    ))  # fmt: skip
    check(model, inputs(*IMAGE), {"conv": "general"}, LAST)


def test_bare_functional_weights_are_layers_with_names_of_their_own():
    model = seeded(lambda: Net(
        lambda net, x: F.linear(F.linear(F.linear(x, net.a, net.b).relu(), net.c).tanh(), net.last), a=parameter(12, 6),
        b=parameter(12), c=parameter(9, 12), last=parameter(3, 9),
    ))  # fmt: skip
    check(model, inputs(7, 6), {"a": "relu", "c": "tanh"}, LAST)


def test_residual_addition_makes_one_group_of_both():
    model = seeded(lambda: Net(
        lambda net, x: net.last((h := net.a(x)) + net.c(net.b(h).relu())), a=nn.Linear(6, 12), b=nn.Linear(12, 9),
        c=nn.Linear(9, 12), last=nn.Linear(12, 3),
    ))  # fmt: skip
    check(model, inputs(7, 6), {"a": "general", "b": "relu"}, LAST)
    assert (model.b.weight.shape, model.c.weight.shape) == ((5, 6), (6, 5))


def test_a_change_in_place_of_a_view_is_seen_by_those_who_read_its_base():
    def compute(net, x):
        h = net.conv(x)
        h.view(3, -1).tanh_()
        return net.last(h)

    model = seeded(lambda: Net(compute, conv=nn.Conv2d(2, 8, 3), last=nn.Conv2d(8, 3, 3)))
    check(model, inputs(*IMAGE), {"conv": "general"}, LAST)


def filled(out):
    """A recurrence with a decay for each channel, its states written one by one into what `out` makes of the layer's
    output; on 4 sequences of 3."""

    def compute(net, x):
        h = net.a(x).tanh()
        result, state = out(h), torch.zeros_like(h[:, 0])
        for step in range(h.shape[1]):
            state = net.decay * state + h[:, step]
            result[:, step] = state
        return net.last(result)

    model = seeded(lambda: Net(compute, a=nn.Linear(6, 12), decay=nn.Parameter(torch.rand(12)), last=nn.Linear(12, 3)))
    return model, inputs(4, 3, 6)


def test_a_tensor_that_is_written_part_by_part_has_the_channels_of_its_parts():
    model, x = filled(torch.zeros_like)
    check(model, x, {"a": "general"}, LAST)
    assert model.decay.shape == (6,)


def test_channels_written_into_a_tensor_of_another_origin_are_pinned():
    model, x = filled(lambda h: torch.zeros(4, 3, 12, dtype=h.dtype))
    group = groups_of(model.double(), x)["a"]
    assert "`aten.copy`" in group.reason
    assert "a tensor that apoptosis doesn't follow" in group.reason


def test_residual_block_with_norms():
    def compute(net, x):
        h = net.n1(net.a(x)).relu()
        return net.last((net.n3(net.c(net.n2(net.b(h)).relu())) + h).relu().mean((2, 3)))

    model = seeded(lambda: Net(
        compute, a=nn.Conv2d(2, 8, 3, padding=1), b=nn.Conv2d(8, 6, 3, padding=1, bias=False),
        c=nn.Conv2d(6, 8, 3, padding=1), n1=nn.BatchNorm2d(8), n2=nn.BatchNorm2d(6), n3=nn.BatchNorm2d(8),
        last=nn.Linear(8, 3),
    ))  # fmt: skip
    found = groups_of(model.double(), inputs(*IMAGE))
    wide = next(name for name, group in found.items() if group.width == 8)
    check(model, inputs(*IMAGE), {wide: "general", "b": "relu"}, LAST)
    assert len(found[wide].producers) == 4  # two weights, two biases


def test_channels_of_unlike_widths_that_are_added_go_together():
    model = seeded(lambda: Net(
        lambda net, x: net.last(net.a(x).flatten(1) + net.b(x.flatten(1))), a=nn.Conv1d(2, 8, 3), b=nn.Linear(24, 80),
        last=nn.Linear(80, 3),
    ))  # fmt: skip
    check(model, inputs(*LINE), {"a": "general"}, LAST)
    assert (model.a.out_channels, model.b.out_features, model.last.in_features) == (4, 40, 40)


@pytest.mark.parametrize("function", [lambda h: h.softmax(1), lambda h: h.log_softmax(-1), lambda h: F.normalize(h)])
def test_heads_on_the_output(function):
    model = seeded(
        lambda: Net(lambda net, x: function(net.last(net.a(x).relu())), a=nn.Linear(6, 12), last=nn.Linear(12, 3))
    )
    model = wake(model.double())
    before, after, groups = fold_planted(model, inputs(7, 6))
    assert (groups["a"].prunable, groups["last"].prunable) == (True, False)
    assert groups["last"].reason
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def pair(compute, **members):
    """Two layers of 12 channels on the same input, and two readers."""
    layers = {"a": nn.Linear(6, 12), "b": nn.Linear(6, 12), "c": nn.Linear(12, 3), "d": nn.Linear(12, 3)}
    return seeded(lambda: Net(compute, **{**layers, **members}))


SHARED = {
    "norm": lambda: pair(lambda n, x: n.c(n.s(n.a(x))) + n.d(n.s(n.b(x)).relu()), s=nn.BatchNorm1d(12)),
    "slopes": lambda: pair(lambda n, x: n.c(n.s(n.a(x))) + n.d(n.s(n.b(x))), s=nn.PReLU(12)),
    "parameter": lambda: pair(lambda n, x: n.c(n.s * n.a(x)) + n.d(n.s + n.b(x)), s=parameter(12)),
    "bias": lambda: pair(
        lambda n, x: n.c(F.linear(x, n.s, n.a.bias)) + n.d(n.a(x).relu()) + 0 * n.b(x).sum(1, True), s=parameter(12,
            6)),
    "weight under two biases": lambda: pair(
        lambda n, x: n.c(F.linear(x, n.a.weight, n.s)) + n.d(n.a(x).relu()) + 0 * n.b(x).sum(1, True), s=parameter(12)),
    "reader": lambda: pair(lambda n, x: n.c(n.a(x)) + n.c(n.b(x).relu()) + n.d(n.a(x))),
    "bias of two readers": lambda: pair(
        lambda n, x: F.linear(n.a(x), n.c.weight, n.c.bias) + F.linear(n.b(x), n.d.weight, n.c.bias)),
    "a square layer twice": lambda: Net(
        lambda n, x: n.c(n.s(n.s(n.a(x)).relu())), a=nn.Linear(6, 12), s=nn.Linear(12, 12), c=nn.Linear(12, 3)),
    "layer": lambda: pair(
        lambda n, x: n.c(n.s(n.a(x)).relu()) + n.d(n.s(n.b(x)).tanh()), s=nn.Linear(12, 12)),
    "layer with weight norm": lambda: pair(
        lambda n, x: n.c(n.s(n.a(x)).relu()) + n.d(n.s(n.b(x)).tanh()), s=weight_norm(nn.Linear(12, 12))),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_two_layers_share_makes_one_group_of_their_channels(name):
    model = wake(SHARED[name]().double())
    before, after, groups = fold_planted(model, inputs(7, 6))
    assert any(group.prunable for group in groups.values())
    assert (after - before).norm() <= 1e-12 * before.norm()
    assert_attributes_follow(model)
    assert_trains(model, inputs(7, 6))
    if name == "bias of two readers":  # the constant of one fold must not reach the other reader
        assert all(consumer.bias is None for group in groups.values() for consumer in group.consumers)


CONFLICTS = {
    "a square layer twice in a row": (
        lambda: Net(lambda n, x: n.c(n.s(n.s(x).relu()).relu()), s=nn.Linear(6, 6), c=nn.Linear(6, 3)),
        "s", "s.weight also reads other inputs"),
    "a layer that reads the input too": (
        lambda: Net(lambda n, x: n.c(n.s(x) + n.s(n.a(x).relu())), a=nn.Linear(6, 6), s=nn.Linear(6, 12),
            c=nn.Linear(12, 3)),
        "a", "s.weight also reads other inputs"),
    "a norm of the input too": (
        lambda: Net(lambda n, x: n.c(n.s(n.a(x)) + n.s(x)), a=nn.Linear(6, 6), s=nn.BatchNorm1d(6), c=nn.Linear(6, 3)),
        "a", "is also used by `aten.batch_norm` in s"),
    "a weight in a penalty": (
        lambda: Net(lambda n, x: n.c(n.a(x).relu()) + n.a.weight.square().sum(), a=nn.Linear(6, 12), c=nn.Linear(12,
            3)),
        "a", "sums over them"),
    "a parametrized weight in a penalty": (
        lambda: Net(lambda n, x: n.c(n.a(x).relu()) + n.a.weight.square().sum(), a=weight_norm(nn.Linear(6, 12)),
                    c=nn.Linear(12, 3)),
        "a", "a.weight is also used by `aten.square`"),
    "a bias elsewhere": (
        lambda: Net(lambda n, x: n.c(n.a(x).relu()) + (x + n.a.bias).sum(), a=nn.Linear(6, 6), c=nn.Linear(6, 3)),
        "a", "uses them for positions"),
    "a weight that is transposed": (
        lambda: Net(lambda n, x: n.c(F.linear(n.a(x).relu(), n.a.weight.t())), a=nn.Linear(6, 12), c=nn.Linear(6, 3)),
        "a", "with a weight that is computed in forward()"),
    "a parametrized weight that is changed": (
        lambda: Net(lambda n, x: F.linear(n.a(x).relu(), n.c.weight.exp()), a=nn.Linear(6, 12),
            c=weight_norm(nn.Linear(12, 3))),
        "a", "with a weight that is computed in forward()"),
    "weight norm of the other dimension": (
        lambda: Net(lambda n, x: n.c(n.a(x).relu()), a=weight_norm(nn.Linear(6, 12), dim=1), c=nn.Linear(12, 3)),
        "a", "a.weight has a parametrization (_WeightNorm) for which there is no rule"),
    "a mask that is not of floating point": (
        lambda: Net(lambda n, x: n.c(n.a(x) * n.mask), a=nn.Linear(6, 12), c=nn.Linear(12, 3),
                    mask=nn.Buffer(torch.arange(12) > 2)),
        "a", "mask holds torch.bool"),
    "an op without a rule": (
        lambda: Net(lambda n, x: n.c(n.inner(n.a(x))), a=nn.Linear(6, 12), inner=Net(lambda n, h: h.cumsum(1)),
            c=nn.Linear(12, 3)),
        "a", "`aten.cumsum` in inner"),
    "a convolution along the channels": (
        lambda: Net(lambda n, x: n.c(n.s(n.a(x)).mean(1)), a=nn.Linear(6, 12), s=nn.Conv1d(7, 4, 3, padding=1),
                    c=nn.Linear(12, 3)),
        "a", "slides along them"),
    "a computed tensor per channel": (
        lambda: Net(lambda n, x: n.c(n.a(x) * n.s(x.mean(0))), a=nn.Linear(6, 12),
                    s=Net(lambda n, h: h.cumsum(0)[[0] * 12]),
                    c=nn.Linear(12, 3)),
        "a", "combines them with a tensor that apoptosis doesn't follow"),
    "a norm with computed parameters": (
        lambda: Net(lambda n, x: n.c(F.batch_norm(n.a(x), None, None, n.s.exp(), None, True)), a=nn.Linear(6, 12),
                    s=parameter(12), c=nn.Linear(12, 3)),
        "a", "uses parameters that are computed in forward()"),
    "an outer product": (
        lambda: Net(lambda n, x: n.c((n.a(x)[:, :, None] * n.a(x)[:, None, :]).flatten(1)), a=nn.Linear(6, 5),
            c=nn.Linear(25, 3)),
        "a", ""),
    "summed over": (
        lambda: Net(lambda n, x: n.c(x) + n.a(x).sum(1, keepdim=True), a=nn.Linear(6, 12), c=nn.Linear(6, 3)),
        "a", "sums over them"),
    "tied": (lambda: tied(), "a", "also reads other inputs"),
}  # fmt: skip


def tied():
    model = Net(lambda n, x: n.c(n.b(n.a(x).relu())), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_can_not_be_followed_pins_with_a_reason(name):
    build, group, reason = CONFLICTS[name]
    shape = (5, 7, 6) if "along the channels" in name else (7, 6)
    model = wake(seeded(build).double())
    before, after, groups = fold_planted(model, inputs(*shape))
    found = {g for g in groups if g == group or groups[g].producers[0].tensor.startswith(f"{group}.")}
    assert found
    assert all(not groups[g].prunable and reason in groups[g].reason for g in found)
    assert (after - before).norm() <= 1e-12 * before.norm()  # also where other groups did shrink
    assert_trains(model, inputs(*shape))


def test_a_reason_names_op_module_and_line():
    model = Net(
        lambda n, x: n.c(n.inner(n.a(x))), a=nn.Linear(6, 12), inner=Net(lambda n, h: h.cumsum(1)), c=nn.Linear(12, 3)
    )
    reason = groups_of(model.double(), inputs(7, 6))["a"].reason
    assert "`aten.cumsum` in inner" in reason
    assert "test_graph.py" in reason


def test_shared_module_keeps_working_in_each_call():
    model = seeded(lambda: Net(
        lambda n, x: n.c(n.s(n.a(x).relu()).relu()) + n.c(n.s(n.b(x).tanh()).relu()), a=nn.Linear(6, 12),
            b=nn.Linear(6, 12),
        s=nn.Linear(12, 10), c=nn.Linear(10, 3),
    ))  # fmt: skip
    groups = groups_of(model.double(), inputs(7, 6))
    both = next(name for name, group in groups.items() if group.width == 12)
    check(model, inputs(7, 6), {both: "general", "s": "relu"}, {"c": OUTPUT})


def test_weight_norm():
    model = seeded(lambda: head(
        weight_norm(nn.Conv2d(2, 8, 3)), nn.ReLU(), weight_norm(nn.Conv2d(8, 6, 3)), nn.Tanh(), nn.Flatten(),
        last=weight_norm(nn.Linear(6 * 16, 3)),
    ))  # fmt: skip
    check(model, inputs(*IMAGE), {"0": "general", "2": "general"}, LAST)


def test_spectral_norm_is_exact_where_the_norm_stays():
    """Channels whose rows and columns are zero don't enter the largest singular value."""
    model = seeded(lambda: head(
        spectral_norm(nn.Conv2d(2, 8, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 6, 3)), nn.ReLU(), nn.Flatten(),
        last=spectral_norm(nn.Linear(6 * 16, 3)),
    ).double())  # fmt: skip
    x, gone = inputs(*IMAGE), [1, 2, 5]
    weights = [model[i].parametrizations.weight.original for i in (0, 2, 5)]
    with torch.no_grad():
        for made, read, inner in zip(weights, weights[1:], (1, 16), strict=False):
            made[gone] = 0
            for c in gone:
                read[:, c * inner : (c + 1) * inner] = 0
        for _ in range(200):
            model.train()(x)
    groups = groups_of(model, x)
    before = model.eval()(x)
    with Surgery(model) as surgery:
        for name in ("0", "2"):
            group = groups[name]
            assert group.prunable
            keep = [c for c in range(group.width) if c not in gone]
            fold = Fold(torch.eye(group.width, dtype=torch.float64)[:, keep])
            surgery.fold_(group, FoldPlan(name, torch.tensor(keep), (fold,)))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert_attributes_follow(model)
    assert_trains(model, x)


def test_float32_to_rounding():
    model = wake(seeded(lambda: head(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16,
        12),
        nn.Tanh(), last=nn.Linear(12, 3),
    )))  # fmt: skip
    before, after, groups = fold_planted(model, inputs(*IMAGE).float())
    assert sum(group.prunable for group in groups.values()) == 2
    assert (after - before).norm() <= 1e-5 * before.norm()


def test_constants_can_be_taken_only_where_they_are_exact():
    def bias(layer, *between):
        model = head(nn.Conv2d(2, 8, 3), *between, last=layer).double()
        return groups_of(model, inputs(*IMAGE))["0"].consumers[0].bias

    assert bias(nn.Conv2d(8, 3, 3)) == "last.bias"
    assert bias(nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")) == "last.bias"
    assert bias(nn.Conv2d(8, 3, 3, bias=False)) is None
    assert bias(nn.Conv2d(8, 3, 3, padding=1)) is None
    assert bias(nn.Conv2d(8, 3, 3, padding="same")) is None
    assert bias(nn.Conv2d(8, 3, 3), nn.ZeroPad2d(1)) is None
    assert bias(nn.Conv2d(8, 3, 3), nn.AvgPool2d(3, 1, padding=1)) is None
    assert bias(nn.Conv2d(8, 3, 3), nn.MaxPool2d(3, 1, padding=1)) == "last.bias"


def test_costs_are_twice_the_products_and_parameters():
    model = head(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), last=nn.Linear(12, 3))
    _, costs = trace(model.double(), (inputs(5, 2, 8, 8),), {})
    widths = {"0": 8, "3": 12, "last": 3, None: 1}
    flops = sum(c.flops * widths[c.out_group] * widths[c.in_group] for c in costs)
    assert flops == 2 * 5 * (36 * 8 * 2 * 9 + 8 * 36 * 12 + 12 * 3)
    parameters = sum(c.parameters * widths[c.out_group] * widths[c.in_group] for c in costs)
    assert parameters == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_tracing_changes_nothing():
    model = head(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), spectral_norm(nn.Linear(12, 9)), last=nn.Linear(9, 3)
    )
    model.double().train()[1].eval()
    model.register_buffer("counter", torch.zeros(1))
    state = {name: t.clone() for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
    owners, rng = dict(model.named_buffers()), torch.get_rng_state()
    trace(model, (inputs(7, 6),), {})
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(torch.equal(state[name], now[name]) for name in state)
    assert all(b is owners[n] for n, b in model.named_buffers())
    assert torch.equal(rng, torch.get_rng_state())
    assert (model.training, model[1].training, model[2].training) == (True, False, True)


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_norm_is_captured_as_torch_exports_it_but_for_what_it_counts(train):
    def compute(net, x):
        return net.last(net.old(net.norm(net.conv(x))).mean((2, 3)))

    class Old(nn.BatchNorm2d):
        """Counts as nn.BatchNorm2d once did."""

        def forward(self, x):
            if self.training:
                self.num_batches_tracked += 1
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    norms = {"norm": nn.BatchNorm2d(6, momentum=0.2), "old": Old(6)}
    model = Net(compute, conv=nn.Conv2d(3, 6, 3), last=nn.Linear(6, 2), **norms).train(train)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    ours = capture(model, (x,), {}, modes=(train,)).graph.nodes
    assert not [node for node in ours if "num_batches" in node.name]
    theirs = [node for node in torch.export.export(model, (x,), strict=False).graph.nodes if "num_b" not in node.name]
    counts = [node for node in theirs if any("num_b" in used.name for used in node.all_input_nodes)]
    kept = [node for node in theirs if node.op == "call_function" and node not in counts]
    values = [[n.meta["val"] for n in nodes if n.op == "call_function"] for nodes in (ours, kept)]
    assert [(v.shape, v.stride(), v.dtype) for v in values[0]] == [(v.shape, v.stride(), v.dtype) for v in values[1]]
    assert [norm.num_batches_tracked.tolist() for norm in norms.values()] == [0, 0]


def test_a_buffer_that_forward_replaces_comes_back():
    def compute(net, x):
        net.mean = net.mean * 0.9 + 0.1 * x.mean()
        return net.last(net.a(x).relu()) - net.mean

    model = Net(compute, a=nn.Linear(6, 12), last=nn.Linear(12, 3), mean=nn.Buffer(torch.zeros(())))
    buffer = model.double().mean
    groups = groups_of(model, inputs(7, 6))
    assert groups["a"].prunable
    assert model.mean is buffer
    assert model.mean == 0


def test_model_that_exports_only_in_eval_mode():
    def compute(net, x):
        if net.training and bool(x.sum() > 0):
            x = x + 1
        return net.last(net.a(x).relu())

    model = Net(compute, a=nn.Linear(6, 12), last=nn.Linear(12, 3)).train()
    check(model, inputs(7, 6), {"a": "relu"}, LAST)


def test_weights_that_forward_scales_where_the_mode_changes_are_weights():
    """RWKV does this. After a forward pass in eval mode the next one in training mode scales them back."""

    def compute(net, x):
        if net.training == net.scaled:
            with torch.no_grad():
                net.last.weight.mul_(2 if net.training else 0.5)
            net.scaled = not net.training
        return net.last(net.a(x).relu())

    model = seeded(lambda: Net(compute, a=nn.Linear(6, 12), last=nn.Linear(12, 3), scaled=False)).double()
    model.eval()(inputs(7, 6))
    assert model.train().scaled
    check(model, inputs(7, 6), {"a": "relu"}, LAST)


def test_export_error_says_what_was_tried(capsys):
    def compute(net, x):
        return net.a(x) if bool(x.sum() > 0) else net.a(-x)

    with pytest.raises(ExportError) as error:
        trace(Net(compute, a=nn.Linear(6, 12)), (inputs(7, 6).float(),), {})
    assert "in train()" in str(error.value)
    assert "in eval()" in str(error.value)
    assert "submodule" in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_rows_of_a_weight_that_forward_computes_are_a_group_with_that_reason():
    """Weight standardisation (NFNets)."""

    def compute(net, x):
        weight = F.batch_norm(net.a.weight.flatten(1)[None], None, None, net.scale, training=True).view_as(net.a.weight)
        return net.last(F.conv2d(x, weight, net.a.bias).relu().mean((2, 3)))

    model = Net(compute, a=nn.Conv2d(3, 8, 3), last=nn.Linear(8, 2), scale=nn.Parameter(torch.ones(8)))
    groups = {group.name: group for group in trace(model, (torch.randn(4, 3, 8, 8),), {})[0]}
    (slots,) = [
        {slot.tensor for slot in g.slots} for g in groups.values() if "computed in forward()" in (g.reason or "")
    ]
    assert slots == {"a.weight", "scale"}
