"""Surgery against independent references: explicit folds, and full-size models whose removed channels are masked."""

import copy
import gc
import inspect
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from apoptorch.errors import SurgeryError
from apoptorch.plan import ChannelGroup, Consumer, Fold, FoldPlan, Slot
from apoptorch.surgery import Surgery, attributes, narrow_, narrowed, problems, transaction

F64 = torch.float64


def group(name, width, producers, consumers, passthrough=()):
    """Slots as (tensor, dim) or (tensor, dim, inner); consumers as (slot, bias)."""
    made, passed = tuple(Slot(*s) for s in producers), tuple(Slot(*s) for s in passthrough)
    return ChannelGroup(
        name, width, width, "general", made, passed, tuple(Consumer(Slot(*s), bias) for s, bias in consumers)
    )


def plan_for(group, keep, shift=True, seed=0):
    """Random coefficients for removed channels, the identity for survivors."""
    generator, n, k = torch.Generator().manual_seed(seed), group.width, len(keep)
    keep, folds = torch.tensor(keep), []
    removed = [c for c in range(n) if c not in keep]
    for consumer in group.consumers:
        coeffs, constant = torch.zeros(n, k, dtype=F64), torch.zeros(n, dtype=F64)
        coeffs[keep, torch.arange(k)] = 1.0
        coeffs[removed] = torch.randn(len(removed), k, generator=generator, dtype=F64)
        constant[removed] = torch.randn(len(removed), generator=generator, dtype=F64)
        folds.append(Fold(coeffs, constant if shift and consumer.bias else None))
    return FoldPlan(group.name, keep, tuple(folds))


def selection(group, keep):
    """A plan that drops channels and folds nothing."""
    eye = torch.eye(group.width, dtype=F64)[:, keep]
    return FoldPlan(group.name, torch.tensor(keep), tuple(Fold(eye) for _ in group.consumers))


def mlp(dtype=F64, bias=True, norm=True):
    torch.manual_seed(0)  # no bias before a norm: its gradient is rounding noise, which Rprop takes at full step
    layers = [nn.Linear(6, 12, bias and not norm), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 8, bias), nn.Tanh(), nn.Linear(8, 3, bias)).to(dtype)


def mlp_groups(bias=True, norm=True):
    b = lambda i: [(f"{i}.bias", 0)] if bias else []
    through = [(f"1.{t}", 0) for t in ("weight", "bias", "running_mean", "running_var")] if norm else []
    return [
        group(
            "0",
            12,
            [("0.weight", 0), *([] if norm else b(0))],
            [(("3.weight", 1), "3.bias" if bias else None)],
            through,
        ),
        group("3", 8, [("3.weight", 0), *b(3)], [(("5.weight", 1), "5.bias" if bias else None)]),
    ]


def cnn(dtype=F64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3),
    ).to(dtype)  # fmt: skip


def cnn_groups():
    through = [(f"1.{t}", 0) for t in ("weight", "bias", "running_mean", "running_var")] + [("2.weight", 0)]
    return [
        group("0", 8, [("0.weight", 0)], [(("4.weight", 1), "4.bias")], through),
        group("4", 6, [("4.weight", 0), ("4.bias", 0)], [(("7.weight", 1, 4), "7.bias")]),
    ]


KEEP = {12: [0, 2, 3, 7, 8, 10, 11], 8: [1, 2, 4, 5, 7], 6: [0, 3, 5]}


def plans_for(groups, **options):
    return [plan_for(g, KEEP[g.width], seed=i, **options) for i, g in enumerate(groups)]


def batches(shape, count, dtype=F64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def loss_of(model, x):
    return (model(x).tanh() - x.flatten(1)[:, :3]).square().mean() * 10


def train(model, optimizers, xs):
    for x in xs:

        def closure(x=x):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        for optimizer in optimizers:
            optimizer.step(closure)


def expand(index, inner):
    return [c * inner + i for c in index for i in range(inner)]


class Masked:
    """The reference: a full-size model whose removed channels are zero and stay so.

    Written without the library: folds by loops over channels, gradients masked by hooks. `index` says which
    entries of each tensor survive, dimension by dimension.
    """

    def __init__(self, model, groups, plans):
        self.model = copy.deepcopy(model)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.index = {name: [list(range(s)) for s in t.shape] for name, t in tensors.items()}
        with torch.no_grad():
            for g, plan in zip(groups, plans, strict=True):
                for consumer, fold in zip(g.consumers, plan.folds, strict=True):
                    self._fold(tensors, consumer, plan.keep.tolist(), fold)
                for slot in [*g.producers, *g.passthrough, *(c.weight for c in g.consumers)]:
                    self.index[slot.tensor][slot.dim] = expand(plan.keep.tolist(), slot.inner)
            self.mask = {}
            for name, tensor in tensors.items():
                self.mask[name] = torch.zeros_like(tensor)
                if tensor.ndim:
                    self.mask[name][self._grid(name)] = 1
                    tensor.mul_(self.mask[name])
        for name, p in self.model.named_parameters():
            p.register_hook(lambda grad, mask=self.mask[name]: grad * mask)

    def _grid(self, name):
        return torch.meshgrid(*(torch.tensor(i) for i in self.index[name]), indexing="ij")

    @staticmethod
    def _fold(tensors, consumer, keep, fold):
        weight, slot = tensors[consumer.weight.tensor], consumer.weight
        weight = weight.movedim(slot.dim, 0)  # a view: (n * inner, ...)
        old = weight.clone()
        for j, survivor in enumerate(keep):
            for i in range(slot.inner):
                weight[survivor * slot.inner + i] = sum(
                    fold.coeffs[c, j] * old[c * slot.inner + i] for c in range(len(fold.coeffs))
                )
        if fold.shift is not None:
            for c, constant in enumerate(fold.shift.tolist()):
                for i in range(slot.inner):
                    row = old[c * slot.inner + i]
                    tensors[consumer.bias] += constant * row.flatten(1).sum(1) if row.ndim > 1 else constant * row

    def cut(self, name, tensor):
        """The surviving entries of a full-size tensor; dimensions of size 1 (Adafactor) stay."""
        if tensor.ndim != len(self.index[name]):
            return tensor
        sizes = [i if s > 1 else [0] for i, s in zip(self.index[name], tensor.shape, strict=True)]
        return tensor[torch.meshgrid(*(torch.tensor(i) for i in sizes), indexing="ij")] if tensor.ndim else tensor

    def optimizers(self, build, originals):
        """Optimizers of the masked model, with the masked state of `originals`."""
        built = build(self.model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for mine, theirs in zip(built, originals, strict=True):
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
            for p, state in mine.state.items():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape and p.ndim:
                        value.mul_(self.mask[names[id(p)]])
        return built

    def assert_equal(self, model, **tolerance):
        theirs = dict(self.model.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, self.cut(name, theirs[name]), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def fold_all(model, optimizers, groups, plans, followers=()):
    with Surgery(model, optimizers, followers) as surgery:
        return [surgery.fold_(g, plan) for g, plan in zip(groups, plans, strict=True)]


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.05),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, dampening=0.1),
    "SGD nesterov": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01),
    "Adam amsgrad": lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True, weight_decay=0.01),
    "Adam foreach": lambda ps: torch.optim.Adam(ps, 0.01, foreach=True),
    "Adam fused": lambda ps: torch.optim.Adam(ps, 0.01, fused=True, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, 0.01, foreach=True, amsgrad=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, 0.01, fused=True),
    "AdamW tensor lr": lambda ps: torch.optim.AdamW(ps, torch.tensor(0.01)),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.05),
    "Adagrad fused": lambda ps: torch.optim.Adagrad(ps, 0.05, fused=True),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, 1.0),
    "NAdam": lambda ps: torch.optim.NAdam(ps, 0.01, decoupled_weight_decay=True, weight_decay=0.01),
    "RAdam": lambda ps: torch.optim.RAdam(ps, 0.01),
    "Adamax": lambda ps: torch.optim.Adamax(ps, 0.01),
    "ASGD": lambda ps: torch.optim.ASGD(ps, 0.01),
    "Rprop": lambda ps: torch.optim.Rprop(ps, 0.01),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, 0.1, max_iter=3),
}
ARCHITECTURES = {"mlp": (mlp, mlp_groups, (32, 6)), "cnn": (cnn, cnn_groups, (16, 3, 8, 8))}


def test_every_optimizer_of_torch_is_tested():
    tested = {name.split()[0] for name in OPTIMIZERS} | {"Adafactor", "Muon"}
    exist = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert exist - {"Optimizer", "SparseAdam"} == tested


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_a_masked_model(name, architecture):
    build, find_groups, shape = ARCHITECTURES[architecture]
    model, groups = build(), find_groups()
    optimize = lambda m: [OPTIMIZERS[name](list(m.parameters()))]
    optimizers, plans = optimize(model), plans_for(groups, shift=True)
    train(model, optimizers, batches(shape, 4))

    masked = Masked(model, groups, plans)
    if name == "LBFGS":  # its history is dropped: the reference starts afresh
        reference = optimize(masked.model)
    else:
        reference = masked.optimizers(optimize, optimizers)
    groups = fold_all(model, optimizers, groups, plans)
    assert [g.width for g in groups] == [len(p.keep) for p in plans]
    masked.assert_equal(model)

    more = batches(shape, 5, seed=4)
    train(model, optimizers, more)
    train(masked.model, reference, more)
    masked.assert_equal(model, rtol=1e-9, atol=1e-9)
    model.eval(), masked.model.eval()
    torch.testing.assert_close(model(more[0]), masked.model(more[0]), rtol=1e-9, atol=1e-9)


def test_adafactor_goes_on_as_a_small_model_with_the_cut_state():
    """Its clipping and its factors are means over whole tensors, so that a masked model is no reference.

    The reference is a model built small, with a new optimizer and the state cut by hand.
    """
    model, groups = mlp(), mlp_groups()
    plans = plans_for(groups)
    optimizer = torch.optim.Adafactor(model.parameters(), 0.05)
    train(model, [optimizer], batches((32, 6), 4))
    masked = Masked(model, groups, plans)
    small = nn.Sequential(
        nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    small.load_state_dict({n: masked.cut(n, t) for n, t in masked.model.state_dict().items()})
    reference, state = torch.optim.Adafactor(small.parameters(), 0.05), copy.deepcopy(optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    for i, values in state["state"].items():
        values.update({k: masked.cut(names[i], v) for k, v in values.items() if k != "step"})
    reference.load_state_dict(state)

    fold_all(model, [optimizer], groups, plans)
    train(model, [optimizer], batches((32, 6), 5, seed=4))
    train(small, [reference], batches((32, 6), 5, seed=4))
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_goes_on_as_a_masked_model_with_the_learning_rates_of_the_small_shapes(adjust):
    """Muon scales its rate by the shape of the matrix and iterates in bfloat16; the rest is exact."""

    def factor(rows, columns):
        if adjust == "original":
            return max(1.0, rows / columns) ** 0.5
        return 0.2 * max(rows, columns) ** 0.5

    def build(m, small=None):
        rates = [1.0] * 3
        if small is not None:
            rates = [factor(*p.shape) / factor(*q.shape) for p, q in zip(small, m.parameters(), strict=True)]
        ps = [{"params": [p], "lr": 0.02 * r} for p, r in zip(m.parameters(), rates, strict=True)]
        return [torch.optim.Muon(ps, weight_decay=0.0, adjust_lr_fn=adjust)]

    model, groups = mlp(bias=False, norm=False), mlp_groups(bias=False, norm=False)
    plans, optimizers = plans_for(groups), build(model)
    train(model, optimizers, batches((32, 6), 4))
    masked = Masked(model, groups, plans)
    state = copy.deepcopy(optimizers)
    fold_all(model, optimizers, groups, plans)
    reference = build(masked.model, list(model.parameters()))
    rates = [g["lr"] for g in reference[0].param_groups]
    reference = masked.optimizers(lambda m: reference, state)
    for g, rate in zip(reference[0].param_groups, rates, strict=True):
        g["lr"] = rate
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizers, batches((32, 6), 5, seed=4))
    train(masked.model, reference, batches((32, 6), 5, seed=4))
    moved = max((p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))
    masked.assert_equal(model, rtol=0, atol=0.02 * moved)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_output_is_the_folded_one(architecture, dtype):
    """The model after surgery equals the model before, with the consumers' inputs replaced by their regression."""
    build, find_groups, shape = ARCHITECTURES[architecture]
    model, groups = build(), find_groups()
    train(model, [torch.optim.SGD(model.parameters(), 0.1)], batches(shape, 3))
    model = model.to(dtype).eval()
    reference = copy.deepcopy(model).double()
    g = groups[-1]
    plan, consumer = plan_for(g, KEEP[g.width]), g.consumers[0].weight

    def replace(_, inputs):
        x = inputs[0].unflatten(1, (g.width, consumer.inner))
        x = torch.einsum("nk,bki->bni", plan.folds[0].coeffs, x[:, plan.keep])
        return (x + plan.folds[0].shift[:, None]).flatten(1)

    reference.get_submodule(consumer.tensor.rpartition(".")[0]).register_forward_pre_hook(replace)
    fold_all(model, [], [g], [plan])
    x = batches(shape, 1)[0]
    tolerance = {F64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(model(x.to(dtype)).double(), reference(x), rtol=tolerance, atol=tolerance)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_valid_convolution_takes_the_constant_of_a_fold_over_all_taps():
    model, g = cnn().eval(), cnn_groups()[0]
    plan = plan_for(g, KEEP[8])
    fold, x = plan.folds[0], batches((4, 3, 8, 8), 1)[0]
    a = model[:4](x)
    a = torch.einsum("nk,bkhw->bnhw", fold.coeffs, a[:, plan.keep]) + fold.shift[:, None, None]
    expected = model[4:](a)
    fold_all(model, [], [g], [plan])
    torch.testing.assert_close(model(x), expected)


def test_transposed_convolution_consumes_in_dimension_0_and_produces_in_dimension_1():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2, padding=1)).double()
    g = group("0", 6, [("0.weight", 1), ("0.bias", 0)], [(("2.weight", 0), None)])
    plan, x = plan_for(g, KEEP[6]), batches((4, 3, 5, 5), 1)[0]
    expected = model[2](torch.einsum("nk,bkhw->bnhw", plan.folds[0].coeffs, model[:2](x)[:, plan.keep]))
    fold_all(model, [], [g], [plan])
    torch.testing.assert_close(model(x), expected)
    assert (model[0].out_channels, model[2].in_channels) == (3, 3)
    # Border pixels see fewer taps, so that a constant is exact for a 1 x 1 kernel only.
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 1), nn.ConvTranspose2d(6, 2, 1)).double()
    g = group("0", 6, [("0.weight", 1), ("0.bias", 0)], [(("1.weight", 0), "1.bias")])
    fold = (plan := plan_for(g, KEEP[6])).folds[0]
    a = torch.einsum("nk,bkhw->bnhw", fold.coeffs, model[0](x)[:, plan.keep]) + fold.shift[:, None, None]
    expected = model[1](a)
    fold_all(model, [], [g], [plan])
    torch.testing.assert_close(model(x), expected)


def test_depthwise_convolution_keeps_one_group_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1)).double()
    g = group(
        "0", 8, [("0.weight", 0), ("0.bias", 0)], [(("2.weight", 1, 2), "2.bias")],
        [("1.weight", 0, 2), ("1.bias", 0, 2)],
    )  # fmt: skip
    plan, x = selection(g, KEEP[8]), batches((4, 3, 5, 5), 1)[0]
    a = model[:2](x)
    mask = torch.zeros(16, dtype=F64)
    mask[expand(KEEP[8], 2)] = 1
    expected = model[2](a * mask[:, None, None])
    fold_all(model, [], [g], [plan])
    torch.testing.assert_close(model(x), expected)
    assert (model[1].in_channels, model[1].out_channels, model[1].groups, model[2].in_channels) == (
        5,
        10,
        5,
        10,
    )


def test_selection_is_exact_to_the_bit():
    model, groups = cnn(torch.float32), cnn_groups()
    full = copy.deepcopy(model.state_dict())
    fold_all(model, [], groups, [selection(g, KEEP[g.width]) for g in groups])
    a, b = KEEP[8], KEEP[6]
    assert torch.equal(model[4].weight, full["4.weight"][b][:, a])
    assert torch.equal(model[7].weight, full["7.weight"][:, expand(b, 4)])
    assert torch.equal(model[1].running_var, full["1.running_var"][a])


def test_untouched_survivors_stay_bitwise_and_folds_are_rounded_once():
    """A fold that only adds to one survivor leaves the columns of the others alone."""
    model, g = mlp(torch.float32), mlp_groups()[0]
    plan = selection(g, KEEP[12])
    plan.folds[0].coeffs[1, 0] = 0.25
    w = model[3].weight.detach().clone()
    fold_all(model, [], [g], [plan])
    assert torch.equal(model[3].weight[:, 1:], w[:, KEEP[12][1:]])
    assert torch.equal(model[3].weight[:, 0], (w[:, 0].double() + 0.25 * w[:, 1].double()).float())


def test_identity_hooks_ties_flags_and_memory_format_are_kept():
    model = cnn(torch.float32).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    parameters, calls = list(model.parameters()), []
    model[4].weight.register_hook(lambda grad: calls.append(("grad", tuple(grad.shape))))
    model[4].weight.register_post_accumulate_grad_hook(lambda p: calls.append(("post", tuple(p.grad.shape))))
    model[4].register_forward_hook(lambda *_: calls.append("forward"))
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    fold_all(model, [], groups := cnn_groups(), plans_for(groups))
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(p.is_leaf for p in parameters)
    for i in (0, 4):
        assert model[i].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[i].weight.is_contiguous()
    loss_of(model, batches((4, 3, 8, 8), 1, torch.float32)[0]).backward()
    assert calls == ["forward", ("grad", (3, 5, 3, 3)), ("post", (3, 5, 3, 3))]
    assert (model[0].out_channels, model[1].num_features, model[2].num_parameters) == (5, 5, 5)
    assert (model[4].in_channels, model[4].out_channels, model[7].in_features) == (5, 3, 12)


def test_tied_parameters_are_cut_once_and_stay_tied():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.a(x).relu() + self.b(x).relu())

    model = Tied().double()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, [optimizer], batches((16, 6), 2))
    producers = [("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0)]
    g = group("a", 8, producers, [(("head.weight", 1), "head.bias")])
    expected = model.a.weight[KEEP[8]].detach().clone()
    fold_all(model, [optimizer], [g], [plan_for(g, KEEP[8])])
    assert model.b.weight is model.a.weight
    assert torch.equal(model.a.weight, expected)
    assert (model.a.out_features, model.b.out_features) == (5, 5)
    train(model, [optimizer], batches((16, 6), 2))
    assert optimizer.state[model.a.weight]["exp_avg"].shape == (5, 6)


def test_live_loss_and_output_do_not_break_the_next_backward():
    model, groups, optimizer = mlp(), mlp_groups(), None
    optimizer = torch.optim.AdamW(model.parameters())
    x = batches((32, 6), 1)[0]
    output = model(x)
    loss = output.square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    fold_all(model, [optimizer], groups, plans_for(groups))
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    assert output.grad_fn is not None
    assert loss.grad_fn is not None


def test_surgery_inside_inference_mode_leaves_a_trainable_model():
    model, groups = mlp(), mlp_groups()
    with torch.inference_mode():
        fold_all(model, [], groups, plans_for(groups))
    loss_of(model, batches((32, 6), 1)[0]).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_gradients_accumulated_before_are_cut():
    model, groups = mlp(), mlp_groups()
    plans, (x, y) = plans_for(groups), batches((32, 6), 2)
    optimize = lambda m: [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)]
    optimizers = optimize(model)
    loss_of(model, x).backward()
    masked = Masked(model, groups, plans)
    for name, p in model.named_parameters():
        dict(masked.model.named_parameters())[name].grad = p.grad * masked.mask[name]
    fold_all(model, optimizers, groups, plans)
    for m, opts in ((model, optimizers), (masked.model, optimize(masked.model))):
        loss_of(m, y).backward()
        nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        opts[0].step()
    masked.assert_equal(model)


def test_scaler_autocast_clipping_and_schedule_go_on():
    """bfloat16 rounds sums differently at another width: equal to bfloat16's own accuracy."""
    model, groups = mlp(torch.float32), mlp_groups()
    plans, xs = plans_for(groups), batches((32, 6), 8, torch.float32)

    def tools(m):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)

    def run(m, optimizer, schedule, scaler, xs):
        for x in xs:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(m, x)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

    mine = tools(model)
    run(model, *mine, xs[:3])
    masked = Masked(model, groups, plans)
    theirs = tools(masked.model)
    masked.optimizers(lambda m: [theirs[0]], [mine[0]])
    theirs[1].load_state_dict(mine[1].state_dict())
    theirs[2].load_state_dict(mine[2].state_dict())
    fold_all(model, [mine[0]], groups, plans)
    run(model, *mine, xs[3:])
    run(masked.model, *theirs, xs[3:])
    masked.assert_equal(model, rtol=0.02, atol=0.01)
    assert mine[2].get_scale() == theirs[2].get_scale() > 64
    assert mine[0].param_groups[0]["lr"] == theirs[0].param_groups[0]["lr"]


def test_several_optimizers_and_parameter_groups():
    model, groups = mlp(), mlp_groups()
    plans = plans_for(groups)

    def build(m):
        ps = [
            {"params": [m[3].weight]},
            {"params": [m[3].bias, m[1].weight], "lr": 0.02, "weight_decay": 0.0},
        ]
        return [
            torch.optim.AdamW(ps),
            torch.optim.SGD([m[0].weight, m[1].bias, m[5].weight], 0.1, momentum=0.9),
        ]

    optimizers = build(model)
    train(model, optimizers, batches((32, 6), 3))
    masked = Masked(model, groups, plans)
    reference = masked.optimizers(build, optimizers)
    before = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    fold_all(model, optimizers, groups, plans)
    after = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    assert before == after
    train(model, optimizers, batches((32, 6), 5, seed=4))
    train(masked.model, reference, batches((32, 6), 5, seed=4))
    masked.assert_equal(model, rtol=1e-10, atol=1e-10)


def test_followers_keep_the_same_channels_and_fold_their_own_weights():
    model, groups = mlp(), mlp_groups()
    plans, teacher = plans_for(groups), mlp()
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in batches((32, 6), 3):
        train(model, [optimizer], [x])
        averaged.update_parameters(model)
    expected = [Masked(m, groups, plans) for m in (model, averaged.module, teacher)]
    fold_all(model, [optimizer], groups, plans, [averaged, teacher])
    for masked, m in zip(expected, (model, averaged.module, teacher), strict=True):
        masked.assert_equal(m)
        assert (m[0].out_features, m[3].in_features) == (7, 7)
    train(model, [optimizer], batches((32, 6), 1))
    averaged.update_parameters(model)
    assert averaged(batches((4, 6), 1)[0]).shape == (4, 3)


def test_follower_that_shares_tensors_is_cut_once():
    model, groups = mlp(), mlp_groups()
    teacher = copy.deepcopy(model)
    teacher[0] = model[0]
    fold_all(model, [], groups, plans_for(groups), [teacher, model])
    x = batches((4, 6), 1)[0]
    assert teacher[0].weight.shape == (7, 6)
    torch.testing.assert_close(teacher.eval()(x), model.eval()(x))


@pytest.mark.parametrize("follower", [nn.Linear(2, 2), cnn()])
def test_follower_that_does_not_fit(follower):
    with pytest.raises(SurgeryError, match=r"`followers\[0\]` must have the tensors of the model"):
        Surgery(mlp(), followers=[follower])


def parametrized(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 3))).double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, [optimizer], batches((32, 6), 20))
    return model, optimizer


def test_weight_norm():
    model, optimizer = parametrized(weight_norm)
    originals = [(f"0.parametrizations.weight.original{i}", 0) for i in range(2)]
    g = group("0", 8, [*originals, ("0.bias", 0)], [(("2.weight", 1), "2.bias")])
    plan, x = plan_for(g, KEEP[8]), batches((32, 6), 1)[0]
    fold, chain = plan.folds[0], model[2].parametrizations.weight
    expected = model[2](model[:2](x)[:, plan.keep] @ fold.coeffs.T + fold.shift)
    state = copy.deepcopy([optimizer.state[chain.original0], optimizer.state[chain.original1]])
    fold_all(model, [optimizer], [g], [plan])
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(chain.original0[:, 0], model[2].weight.norm(dim=1))
    assert torch.equal(optimizer.state[chain.original0]["exp_avg"], state[0]["exp_avg"])
    assert torch.equal(optimizer.state[chain.original1]["exp_avg"], state[1]["exp_avg"][:, KEEP[8]])
    assert (model[0].out_features, model[2].in_features) == (5, 5)
    train(model, [optimizer], batches((32, 6), 3))


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("consumer", ["2.weight", "2.parametrizations.weight.original"])
def test_spectral_norm_is_exact_up_to_the_new_norm(vectors, consumer):
    """Both layers' weights have norm 1 again, which rescales them; nothing else is inexact."""
    model, optimizer = parametrized(spectral_norm)
    model.eval()
    path = "parametrizations.weight"
    through = [(f"0.{path}.0._u", 0), (f"2.{path}.0._v", 0)] if vectors else []
    g = group("0", 8, [(f"0.{path}.original", 0), ("0.bias", 0)], [((consumer, 1), "2.bias")], through)
    plan = plan_for(g, KEEP[8])
    fold = plan.folds[0]
    first, second, bias = (
        model[0].weight[plan.keep],
        model[2].weight @ fold.coeffs,
        model[2].bias.detach().clone(),
    )
    bias += model[2].weight @ fold.shift
    size = model[2].parametrizations.weight.original.norm() / model[2].weight.norm()
    fold_all(model, [optimizer], [g], [plan])
    torch.testing.assert_close(model[0].weight, first / torch.linalg.matrix_norm(first, 2))
    torch.testing.assert_close(model[2].weight, second / torch.linalg.matrix_norm(second, 2))
    torch.testing.assert_close(model[2].bias, bias)
    torch.testing.assert_close(model[2].parametrizations.weight.original, second * size)
    assert model[0].parametrizations.weight[0]._u.shape == (5,)
    assert model[2].parametrizations.weight[0]._v.shape == (5,)
    model.train()
    train(model, [optimizer], batches((32, 6), 3))


def test_parametrization_without_an_inverse_is_refused():
    class Positive(nn.Module):
        def forward(self, x):
            return x.exp()

    model = mlp(norm=False)
    nn.utils.parametrize.register_parametrization(model[3], "weight", Positive(), unsafe=True)
    with pytest.raises(SurgeryError, match="parametrized attribute with right_inverse"):
        fold_all(model, [], [g := mlp_groups(norm=False)[0]], [plan_for(g, KEEP[12])])


def bits(value):
    """Everything about `value` that must be put back, in comparable form."""
    if isinstance(value, torch.Tensor):
        pattern = value.detach().contiguous().view(torch.uint8) if value.ndim else value.detach()
        return (
            value.dtype,
            tuple(value.shape),
            value.stride(),
            value.data_ptr(),
            tuple(pattern.flatten().tolist()),
        )
    if isinstance(value, dict):
        return {k if not isinstance(k, torch.Tensor) else id(k): bits(v) for k, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


def snapshot(networks, optimizers):
    tensors = [t for n in networks for t in [*n.parameters(), *n.buffers()]]
    plain = (int, float, str, bool, tuple, type(None))
    return [
        [(id(t), bits(t), t.requires_grad, None if t.grad is None else (id(t.grad), bits(t.grad))) for t in tensors],
        [(id(o.state), [id(s) for s in o.state.values()], bits(dict(o.state))) for o in optimizers],
        [bits([dict(g) for g in o.param_groups]) for o in optimizers],
        [getattr(o, "_numel_cache", None) for o in optimizers],
        [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for n in networks for m in n.modules()],
        torch.get_rng_state().tolist(),
    ]


def patient():
    """A model with everything: convolution, norms, ties, parametrizations, two optimizers, a follower, gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), weight_norm(nn.Linear(8 * 4, 6)), nn.ReLU(),
        spectral_norm(nn.Linear(6, 3)),
    ).to(torch.float32, memory_format=torch.channels_last)  # fmt: skip
    path = "parametrizations.weight.original"
    through = [(f"1.{t}", 0) for t in ("weight", "bias", "running_mean", "running_var")] + [("2.weight", 0)]
    made = [(f"4.{path}0", 0), (f"4.{path}1", 0), ("4.bias", 0)]
    groups = [
        group("0", 8, [("0.weight", 0), ("0.bias", 0)], [(("4.weight", 1, 4), "4.bias")], through),
        group("4", 6, made, [(("6.weight", 1), "6.bias")]),
    ]
    optimizers = [
        torch.optim.AdamW(model[:3].parameters()),
        torch.optim.LBFGS(model[3:].parameters(), 0.01, 2),
    ]
    follower = AveragedModel(model)
    train(model, optimizers, batches((8, 3, 4, 4), 2, torch.float32))
    return model, optimizers, follower, groups


def test_undo_puts_everything_back_bit_for_bit():
    model, optimizers, follower, groups = patient()
    before = snapshot([model, follower], optimizers)
    with Surgery(model, optimizers, [follower]) as surgery:
        for g, plan in zip(groups, plans_for(groups), strict=True):
            surgery.fold_(g, plan)
        assert snapshot([model, follower], optimizers) != before
        surgery.undo_()
        assert snapshot([model, follower], optimizers) == before
        surgery.undo_()  # again: nothing to do
        for g, plan in zip(groups, plans_for(groups), strict=True):
            surgery.fold_(g, plan)  # and the transaction can be used again
    assert model[0].out_channels == 5
    train(model, optimizers, batches((8, 3, 4, 4), 2, torch.float32))


def test_a_plan_without_folds_lets_channels_go_as_if_they_were_zero():
    (one, optimizers, _, groups), (other, *_) = patient(), patient()
    plans = [selection(g, KEEP[g.width]) for g in groups]
    fold_all(one, optimizers, groups, [replace(plan, folds=()) for plan in plans])
    fold_all(other, [], groups, plans)
    assert [tuple(p.shape) for p in one.parameters()] == [tuple(p.shape) for p in other.parameters()]
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(one.eval()(x), other.eval()(x))


STAGES = [
    "_set_tensor", "_set_state", "_set_attribute", "cut", "cut_of", "folded", "constant_of", "effective",
    "right_inverse", "narrowed_state", "attributes", "like", "normalize", "target_of", "is_known_state",
    "plan_problems", "slot_problems",
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_failure_at_any_call_of_any_stage_puts_everything_back(stage, late, monkeypatch):
    model, optimizers, follower, groups = patient()
    before, plans = snapshot([model, follower], optimizers), plans_for(groups)
    module = transaction if hasattr(transaction, stage) else problems
    original = getattr(module, stage)
    for failing in range(1000):
        calls = iter(range(10**9))

        def fail(*args, calls=calls, failing=failing, **options):
            now = next(calls) == failing
            if now and not late:
                raise KeyboardInterrupt
            result = original(*args, **options)
            if now:
                raise MemoryError
            return result

        monkeypatch.setattr(module, stage, fail)
        try:
            fold_all(model, optimizers, groups, plans, [follower])
        except (KeyboardInterrupt, MemoryError):
            assert snapshot([model, follower], optimizers) == before
        else:
            break
    assert failing >= 2  # the stage was reached
    monkeypatch.undo()
    train(model, optimizers, batches((8, 3, 4, 4), 2, torch.float32))


def test_exception_in_the_block_undoes_and_the_end_commits():
    model, optimizers, follower, groups = patient()
    before, plan = snapshot([model, follower], optimizers), plan_for(groups[0], KEEP[8])
    with pytest.raises(ZeroDivisionError), Surgery(model, optimizers, [follower]) as surgery:
        surgery.fold_(groups[0], plan)
        raise ZeroDivisionError
    assert snapshot([model, follower], optimizers) == before
    with Surgery(model, optimizers, [follower]) as surgery:
        surgery.fold_(groups[0], plan)
    with pytest.raises(SurgeryError, match="before the transaction ends"):
        surgery.undo_()
    with pytest.raises(SurgeryError, match="before its transaction ends"):
        surgery.fold_(groups[1], plan_for(groups[1], KEEP[6]))


def test_old_tensors_are_let_go_at_the_end():
    model, groups = mlp(), mlp_groups()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, [optimizer], batches((32, 6), 2))
    old = weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    with Surgery(model, [optimizer]) as surgery:
        surgery.fold_(groups[0], plan_for(groups[0], KEEP[12]))
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


class Factored(torch.optim.SGD):
    """An optimizer with state that nothing is known of."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["row"] = torch.zeros(5, 2)


def broken_plans():
    g = mlp_groups()[0]
    plan = selection(g, KEEP[12])
    nan = torch.full((12, 7), float("nan"), dtype=F64)
    field = lambda **changes: FoldPlan(**{**vars(plan), **changes})
    return {
        "another group": (g, field(group="3"), "must be for 0"),
        "pinned": (ChannelGroup(**{**vars(g), "prunable": False, "reason": "it is"}), plan, "be prunable"),
        "unsorted": (g, field(keep=torch.tensor([3, 2, 0, 7, 8, 10, 11])), "sorted distinct"),
        "doubled": (g, field(keep=torch.tensor([0, 0, 2, 3, 7, 8, 10])), "sorted distinct"),
        "out of range": (g, field(keep=torch.tensor([0, 1, 2, 3, 4, 5, 12])), "below 12"),
        "empty": (g, field(keep=torch.tensor([], dtype=torch.long)), "sorted distinct"),
        "a fold too many": (g, field(folds=plan.folds * 2), "one a consumer"),
        "wrong shape": (g, field(folds=(Fold(nan[:, :3]),)), "12 x 7"),
        "not finite": (g, field(folds=(Fold(nan),)), "must be finite"),
        "no bias": (
            group("0", 12, [("0.weight", 0)], [(("3.weight", 1), None)]),
            field(folds=(Fold(plan.folds[0].coeffs, torch.ones(12)),)),
            "without a bias",
        ),
        "wrong width": (group("0", 12, [("3.weight", 0)], [(("3.weight", 1), None)]), plan, "12 x 1 entries"),
        "wrong inner": (
            group("0", 12, [("0.weight", 0, 2)], [(("3.weight", 1), None)]),
            plan,
            "12 x 2 entries",
        ),
        "unknown name": (
            group("0", 12, [("9.weight", 0)], [(("3.weight", 1), None)]),
            plan,
            "`9.weight` must be",
        ),
        "unknown bias": (
            group("0", 12, [("0.weight", 0)], [(("3.weight", 1), "3.b")]),
            plan,
            "`3.b` must be",
        ),
        "conflict": (group("0", 12, [("3.weight", 1)], [(("3.weight", 1), None)]), plan, "cut in one way"),
        "integers": (group("0", 12, [("count", 0)], [(("3.weight", 1), None)]), plan, "floating point"),
    }


@pytest.mark.parametrize("case", broken_plans())
def test_plan_that_does_not_fit(case):
    g, plan, message = broken_plans()[case]
    model = mlp()
    model.register_buffer("count", torch.zeros(12, dtype=torch.long))
    before = snapshot([model], [])
    with pytest.raises(SurgeryError, match=message):
        fold_all(model, [], [g], [plan])
    assert snapshot([model], []) == before


def test_unknown_optimizer_state_is_refused_before_any_change(monkeypatch):
    model, groups = mlp(), mlp_groups()
    optimizer = Factored(model.parameters(), 0.1)
    train(model, [optimizer], batches((32, 6), 1))
    monkeypatch.setattr(transaction, "_set_tensor", None)
    with pytest.raises(SurgeryError, match=r"Factored.state.*'row'.*got \(5, 2\) \(0.weight, \(12, 6\)\)"):
        fold_all(model, [optimizer], groups[:1], [plan_for(groups[0], KEEP[12])])


def test_narrow_takes_the_first_entries_everywhere():
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, [optimizer], batches((16, 3, 8, 8), 1))
    small = cnn()
    fold_all(small, [], cnn_groups(), [selection(g, list(range(4))) for g in cnn_groups()])
    first, state = (
        model[4].weight.detach()[:4, :4].clone(),
        optimizer.state[model[4].weight]["exp_avg"][:4, :4],
    )
    narrow_(model, {n: tuple(t.shape) for n, t in small.state_dict().items()}, [optimizer])
    assert torch.equal(model[4].weight, first)
    assert torch.equal(optimizer.state[model[4].weight]["exp_avg"], state)
    assert [attributes(m) for m in model.modules()] == [attributes(m) for m in small.modules()]
    train(model, [optimizer], batches((16, 3, 8, 8), 1))


def test_narrow_accepts_optimizer_state_of_the_new_shape():
    """The optimizer's state was loaded before the model was narrowed."""
    small = mlp()
    fold_all(small, [], groups := mlp_groups(), plans_for(groups))
    theirs = torch.optim.AdamW(small.parameters())
    train(small, [theirs], batches((32, 6), 2))
    model = mlp()
    mine = torch.optim.AdamW(model.parameters())
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    narrow_(model, {n: tuple(t.shape) for n, t in small.state_dict().items()}, [mine])
    model.load_state_dict(small.state_dict())
    for m, optimizer in ((model, mine), (small, theirs)):
        train(m, [optimizer], batches((32, 6), 3, seed=4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small.parameters(), strict=True))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"9.weight": (2, 2)}, "`9.weight` must be a parameter or buffer"),
        ({"0.weight": (13, 6)}, r"narrowed from \(12, 6\)"),
        ({"0.weight": (0, 6)}, r"got \(0, 6\)"),
        ({"0.weight": (12,)}, r"got \(12,\)"),
        ({"3.bias": (3,), "0.weight": (3, 7)}, r"got \(3, 7\)"),
    ],
)
def test_narrow_refuses(shapes, message):
    model = mlp()
    before = snapshot([model], [])
    with pytest.raises(SurgeryError, match=message):
        narrow_(model, shapes)
    assert snapshot([model], []) == before


class Joined(nn.Module):
    """Two layers side by side; the second one's channels lie behind the first one's, or between them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(12, 3)
        self.between = between

    def forward(self, x, masks=(1.0, 1.0)):
        a, b = self.a(x).tanh() * masks[0], self.b(x).tanh() * masks[1]
        if self.between and a.shape == b.shape:
            return self.last(torch.stack([a, b], -1).flatten(-2))
        return self.last(torch.cat([a, b], -1))


def joined_groups(between):
    places = [tuple(range(0, 12, 2)), tuple(range(1, 12, 2))] if between else [None, tuple(range(6, 12))]
    made = lambda name: (Slot(f"{name}.weight", 0), Slot(f"{name}.bias", 0))
    return [
        ChannelGroup(name, 6, 6, "tanh", made(name), (), (Consumer(Slot("last.weight", 1, 1, positions), "last.bias"),))
        for name, positions in zip("ab", places, strict=True)
    ]


@pytest.mark.parametrize("between", [False, True])
def test_explicit_positions_are_those_of_a_masked_model(between):
    """Both groups lose the same number, one after the other; the second one's places have moved by then."""
    torch.manual_seed(0)
    model, groups, x = Joined(between).double(), joined_groups(between), torch.randn(7, 5, dtype=F64)
    full, keeps = copy.deepcopy(model), {"a": [0, 3, 4], "b": [1, 2, 5]}
    masks = [torch.tensor([float(c in keep) for c in range(6)], dtype=F64) for keep in keeps.values()]
    with Surgery(model) as surgery:
        left = surgery.fold_all_(groups, [selection(g, keeps[g.name]) for g in groups])
    torch.testing.assert_close(model(x), full(x, masks), rtol=1e-12, atol=1e-12)
    assert left == narrowed(groups, {"a": 3, "b": 3})
    held = [c.weight.index(g.width).flatten().tolist() for g in left for c in g.consumers]
    assert held == ([[0, 2, 4], [1, 3, 5]] if between else [[0, 1, 2], [3, 4, 5]])
    assert narrowed(groups, {"a": 6, "b": 6}) == groups
