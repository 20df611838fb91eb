"""One removal: planted redundancy goes, nothing else changes, and whatever fails leaves everything bit for bit."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from apoptorch import Apoptosis, Policy, apoptosis, network, planning, removal
from apoptorch.batches import Batch
from apoptorch.budget import flops
from apoptorch.calibrate import measure
from apoptorch.errors import ArgumentError
from apoptorch.graph import trace
from apoptorch.network import Network
from apoptorch.plan import Event, FoldPlan
from apoptorch.policy import POLICIES
from apoptorch.redundancy import select_blocks
from apoptorch.surgery import Surgery

POLICY = Policy(multiple=1, floor=1, rebalance=False)


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copy_rows(module, sources, targets):
    """Makes output channels `targets` of a layer, or of a norm, the same as `sources`."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.ndim:
                tensor[targets] = tensor[sources]


def mlp():
    """64 and 40 channels, of which 24 and 16 are copies, dead, or constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 5))
    copy_rows(model[0], range(16), range(40, 56))
    copy_rows(model[2], range(8), range(24, 32))
    with torch.no_grad():
        model[0].bias[56:60] = -100.0  # dead
        model[0].weight[60:] = 0.0  # constant, some of them at 0
        model[2].weight[32:] = 0.0
    return model, data(512, 10), {"0": 40, "2": 24}


def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 24),
        nn.Tanh(), nn.Linear(24, 5),
    )  # fmt: skip
    for _ in range(5):
        model(data(64, 1, 8, 8))
    copy_rows(model[0], range(6), range(10, 16)), copy_rows(model[1], range(6), range(10, 16))
    copy_rows(model[4], range(4), range(8, 12)), copy_rows(model[5], range(4), range(8, 12))
    copy_rows(model[8], range(8), range(16, 24))
    return model, data(256, 1, 8, 8, seed=1), {"0": 10, "4": 8, "8": 16}


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Linear(10, 32)), nn.ReLU(), weight_norm(nn.Linear(32, 24)), nn.Tanh(), nn.Linear(24, 5)
    )
    for layer, kept in ((model[0], 20), (model[2], 14)):
        parameters = [*layer.parametrizations.weight.parameters(), layer.bias]
        with torch.no_grad():
            for parameter in parameters:
                parameter[kept:] = parameter[: len(parameter) - kept]
    return model, data(512, 10), {"0": 20, "2": 14}


PLANTED = {"mlp": mlp, "cnn": cnn, "weight norm": normed}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("name", PLANTED)
def test_all_planted_redundancy_goes_and_the_output_stays(name, loss, training):
    model, x, widths = PLANTED[name]()
    y = torch.arange(len(x)) % 5
    model.train(training)
    apoptosis = Apoptosis(model, example_inputs=x[:4], loss_fn=F.cross_entropy if loss else None, policy=POLICY)
    before = copy.deepcopy(model).eval()(x)
    event = apoptosis.apoptose(x, targets=y if loss else None, budget=1e-6)
    assert event.reason is None
    assert not event.rolled_back
    found = {group.name: group.width for group in apoptosis.groups if group.prunable}
    assert found == widths
    assert {change.group: change.after for change in event.changes} == widths
    assert -1e-8 <= event.predicted <= 1e-6  # float32
    assert model.training == training
    after = model.eval()(x)
    assert (after - before).norm() <= 1e-4 * before.norm()
    assert all(change.error <= 1e-6 for change in event.changes)
    assert event.parameters_after == sum(p.numel() for p in model.parameters()) < event.parameters_before
    assert event.flops_after < event.flops_before


def test_widths_are_rounded_to_the_multiple_and_stay_above_the_floor():
    model, x, _ = mlp()
    apoptosis = Apoptosis(model, example_inputs=x, policy=Policy(multiple=16, floor=32))
    apoptosis.apoptose(x, budget=1e-6)
    assert [group.width for group in apoptosis.groups] == [48, 32, 5]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_without_a_multiple_widths_are_what_the_hardware_takes_at_a_time(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 96), nn.ReLU(),
        nn.Linear(96, 2),
    )  # fmt: skip
    x = data(64, 1, 6, 6)
    for layer, distinct in ((0, 33), (2, 17), (5, 41)):
        width = len(model[layer].weight)
        copy_rows(model[layer], [i % distinct for i in range(width)], range(width))
    apoptosis = Apoptosis(model, example_inputs=x, policy=Policy(rebalance=False))
    apoptosis.apoptose(x, budget=1e-6)
    wide = {"AVX2": 40, "AVX512": 48}[capability]  # the narrower one, and what is no convolution, don't gain by 16
    assert [group.width for group in apoptosis.groups if group.prunable] == [wide, 24, 48]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_prediction_is_within_a_factor_of_three_of_what_is_measured(share):
    """Least squares with noise in the targets: its loss is exactly of second order in the outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 8))
    x = data(4096, 10)
    y = model(x).detach() + 0.3 * data(4096, 8, seed=1)
    apoptosis = Apoptosis(model, example_inputs=x[:4], loss_fn=F.mse_loss, policy=POLICY)
    before = model(x)
    event = apoptosis.apoptose(x, targets=y, budget=share * before.square().mean().item())
    assert event.changes[0].after < 64
    second_order = (model(x) - before).square().mean().item()  # the loss has curvature 2, and E noise = 0
    assert second_order / 3 < event.predicted < 3 * second_order
    assert event.measured == pytest.approx(second_order, rel=0.5)


def test_prediction_is_within_a_factor_of_three_for_cross_entropy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 8))
    x = data(4096, 10)
    y = torch.distributions.Categorical(logits=model(x).detach()).sample()  # calibrated: gradients average out
    apoptosis = Apoptosis(model, example_inputs=x[:4], loss_fn=F.cross_entropy, policy=POLICY)
    before = model(x).detach()
    event = apoptosis.apoptose(x, targets=y, budget=1e-3)
    assert event.changes[0].after < 64
    divergence = F.kl_div(model(x).log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    second_order = sum(change.predicted - change.first_order for change in event.changes)
    assert divergence.item() / 3 < second_order < 3 * divergence.item()


def unfinished(seed, loss_fn, outputs):
    """A network after a few steps of training, and data of the same kind: to calibrate, and much more of it."""
    torch.manual_seed(seed)
    model, teacher = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, outputs)), torch.randn(10, 8)
    x = data(20_000, 10, seed=seed)
    y = (x @ teacher).tanh() @ torch.randn(8, outputs)
    if loss_fn is F.cross_entropy:
        y = y.argmax(1)
    if loss_fn is ranking:
        y = y[:, 0].sign()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for i in range(40):
        rows = slice(128 * i, 128 * i + 128)
        loss = loss_fn(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, (x[:6000], y[:6000]), (x[6000:], y[6000:])


def ranking(output, target):
    return F.margin_ranking_loss(output[:, 0], output[:, 1], target, margin=0.5)


def test_first_order_predicts_what_an_unfinished_training_loses():
    total, second_order, policy = [], [], Policy(multiple=1, floor=1, damping=0.0)
    for seed in range(6):
        model, (x, y), (new_x, new_y) = unfinished(seed, F.cross_entropy, 5)
        before = F.cross_entropy(model(new_x), new_y)
        apoptosis = Apoptosis(model, example_inputs=x[:4], loss_fn=F.cross_entropy, policy=policy)
        event = apoptosis.apoptose(x, targets=y, budget=0.005 * float(before))
        increase = float(F.cross_entropy(model(new_x), new_y) - before)
        total.append(increase / event.predicted)
        second_order.append(increase / (event.predicted - sum(change.first_order for change in event.changes)))
    assert all(0.5 <= ratio <= 2 for ratio in total), total
    misses = [sum(abs(math.log(ratio)) for ratio in ratios) for ratios in (total, second_order)]
    assert misses[0] < misses[1]


class TwoReaders(nn.Module):
    """One layer's channels, read by two others: through a ReLU and through a tanh."""

    def __init__(self):
        super().__init__()
        self.shared, self.one, self.two = nn.Linear(6, 24), nn.Linear(24, 3), nn.Linear(24, 3)

    def forward(self, x):
        x = self.shared(x)
        return self.one(x.relu()) + self.two(x.tanh())


def test_first_order_is_summed_over_what_each_consumer_reads():
    """Against autograd: the derivative of the mean loss along the change of each consumer's weight and bias."""
    torch.manual_seed(0)
    model = TwoReaders().double()
    x, y = data(200, 6).double(), data(200, 3, seed=1).double()
    groups, costs = trace(model, (x,), {})
    network = Network(model, (), (), groups, costs)
    moments = {
        name: dataclasses.replace(m, noise=0.0)
        for name, m in measure(model, groups, [Batch((x,), {}, y)], F.mse_loss, 0.0).items()
    }
    plans, *_ = planning.plan(network, network.prunable(1), moments, POLICY, 0.1, math.inf)
    F.mse_loss(model(x), y).backward()
    expected = 0.0
    (item,), (group,) = plans, [group for group in groups if group.name == plans[0].group]
    assert len(item.keep) < 24
    assert len(group.consumers) == 2
    for consumer, fold in zip(group.consumers, item.folds, strict=True):
        layer = model.get_submodule(consumer.weight.tensor.rpartition(".")[0])
        weight = layer.weight.detach()
        change = -weight.clone()
        change[:, item.keep] += weight @ fold.coeffs
        expected += (layer.weight.grad * change).sum() + layer.bias.grad @ (weight @ fold.shift)
    assert item.first_order == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("first", "noise", "expected"),
    [(3.0, 0.0, 3.0), (-3.0, 0.0, -3.0), (0.0, 2.0, 1.0), (3.0, 2.0, 2.5), (0.0, 1e9, 2.0), (-9.0, 2.0, 0.0)],
)
def test_first_order_is_shrunk_to_the_second_order_by_its_noise(first, noise, expected):
    """Two groups of second-order increase 2 in all: the mean of N(2, 2^2) given `first`, of variance 2 noise."""
    keep, parts = torch.arange(2), ((0.25 * first, 0.5), (0.75 * first, 1.5))
    plans = [FoldPlan("a", keep, (), predicted=f + s, first_order=f, cautious=f + 2 * s) for f, s in parts]
    found = planning._without_noise(plans, noise)
    assert sum(item.first_order for item in found) == pytest.approx(expected, rel=1e-6)
    for (f, s), item in zip(parts, found, strict=True):
        assert item.predicted == pytest.approx(s + item.first_order)
        assert item.cautious >= 2 * s + max(f, item.first_order)


def test_guard_goes_by_what_the_search_predicted():
    certificate = removal.Certificate(100, 1.0, 1.5, None, None, 0.95)
    policy = dataclasses.replace(POLICY, guard=2.0, tolerance=0.0)
    assert removal.judge(certificate, policy, 0.1, 1.0, cautious=0.1) is not None
    assert removal.judge(certificate, policy, 0.1, 1.0, cautious=0.3) is None
    assert removal.judge(certificate, policy, 0.3, 1.0, cautious=0.1) is not None


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss, ranking])
def test_no_event_exceeds_a_limit_that_was_asked_for(loss_fn):
    outcomes = []
    for seed, share in enumerate((0.002, 0.01, 0.05, 0.2)):
        model, (x, y), (new_x, new_y) = unfinished(seed, loss_fn, 5)
        before, old = loss_fn(model(new_x), new_y), model(new_x).argmax(1)
        limits = {"max_loss_increase": 0.05 * float(before)}
        if loss_fn is F.cross_entropy:
            limits["max_changed_predictions"] = 0.05
        policy = Policy(multiple=1, floor=1, guard=1e9, confidence=0.95, **limits)
        apoptosis = Apoptosis(model, example_inputs=x[:4], loss_fn=loss_fn, policy=policy)
        event = apoptosis.apoptose(x, targets=y, budget=share * float(before))
        certificate = event.certificate
        assert (certificate.changed_upper is not None) == (loss_fn is F.cross_entropy)
        within = certificate.loss_upper <= limits["max_loss_increase"]
        within &= loss_fn is not F.cross_entropy or certificate.changed_upper <= 0.05
        assert event.rolled_back == (not within)
        assert within or "can't be shown at confidence 0.95" in event.reason
        assert float(loss_fn(model(new_x), new_y) - before) <= limits["max_loss_increase"]
        assert loss_fn is not F.cross_entropy or float((model(new_x).argmax(1) != old).double().mean()) <= 0.05
        outcomes.append(within)
    assert {True, False} == set(outcomes)  # small removals can be shown, large ones can't


def most_breaches(events, share):
    """How many of the events may break a limit that each breaks with at most that probability, but for one run in
    a thousand."""
    chances = [math.comb(events, k) * share**k * (1 - share) ** (events - k) for k in range(events + 1)]
    return next(k for k in range(events + 1) if math.fsum(chances[: k + 1]) >= 0.999)


@pytest.mark.parametrize(
    ("loss_fn", "limit", "most", "samples"),
    [
        (F.cross_entropy, "max_changed_predictions", 0.05, 400),
        (F.cross_entropy, "max_loss_increase", 0.03, 1200),
        (F.mse_loss, "max_loss_increase", 0.1, 800),
    ],
)
def test_limits_hold_in_the_events_of_training_runs(loss_fn, limit, most, samples):
    """Statements 17 and 18: on 20,000 new inputs, events break their limit no more often than the confidence says;
    one that can't show it changes nothing."""
    done, undone, breaches = 0, 0, 0
    for seed in range(3):
        torch.manual_seed(seed)
        teacher = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)

        def draw(count, teacher=teacher):
            x = torch.randn(count, 10)
            y = 4 * teacher(x) + 0.3 * torch.randn(count, 4)
            return x, y if loss_fn is F.mse_loss else y.argmax(1)

        model = nn.Sequential(nn.Linear(10, 48), nn.Tanh(), nn.Linear(48, 4))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        policy = Policy(
            multiple=1, floor=1, guard=1e9, tolerance=1e9, samples=samples, rebalance=False, **{limit: most}
        )
        apoptosis = Apoptosis(model, optimizer, example_inputs=draw(4)[0], loss_fn=loss_fn, policy=policy)
        new_x, new_y = draw(20_000)
        for look in range(20):
            for _ in range(20):
                x, y = draw(64)
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            before, state = model(new_x).detach(), copy.deepcopy(model.state_dict())
            x, y = draw(2 * samples)
            event = apoptosis.apoptose(x, targets=y, budget=(0.002, 0.005, 0.015, 0.06)[look % 4])
            if event.certificate is None:  # nothing could go within the budget
                continue
            counts = limit == "max_changed_predictions"
            upper = event.certificate.changed_upper if counts else event.certificate.loss_upper
            assert event.rolled_back == (upper > most)
            if event.rolled_back:
                undone += 1
                assert f"can't be shown at confidence {policy.confidence:g}" in event.reason
                assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
                continue
            after, done = model(new_x).detach(), done + 1
            flips = (after.argmax(1) != before.argmax(1)).double().mean()
            breaches += float(flips if counts else loss_fn(after, new_y) - loss_fn(before, new_y)) > most
    assert done + undone >= 30
    assert min(done, undone) >= 5, "the limit decides nothing"
    assert breaches <= most_breaches(done + undone, 1 - policy.confidence)


def test_without_classes_no_share_of_changed_predictions_can_be_shown():
    model, (x, y), _ = unfinished(0, F.mse_loss, 5)
    policy = Policy(multiple=1, floor=1, max_changed_predictions=0.5)
    event = Apoptosis(model, example_inputs=x[:4], loss_fn=F.mse_loss, policy=policy).apoptose(
        x, targets=y, budget=0.01
    )
    assert event.rolled_back
    assert "there are no classes" in event.reason


def test_more_budget_removes_more_and_none_removes_nothing():
    sizes = []
    for budget in (0.0, 1e-6, 1e-3, 1e-1, 10.0):
        model, x, _ = mlp()
        apoptosis = Apoptosis(model, example_inputs=x, policy=POLICY)
        event = apoptosis.apoptose(x, budget=budget)
        sizes.append(event.parameters_after if not event.rolled_back else math.nan)
        assert (event.predicted or 0.0) <= budget + 1e-16  # rounding, of a relative change of the output
    assert sizes[0] >= sizes[1] > sizes[2] > sizes[3]
    assert sizes == sorted(sizes, reverse=True)


def test_a_model_without_anything_to_remove():
    model, x = nn.Linear(10, 5), data(64, 10)
    state = copy.deepcopy(model.state_dict())
    apoptosis = Apoptosis(model, example_inputs=x, loss_fn=F.cross_entropy)
    event = apoptosis.apoptose(x, targets=torch.arange(64) % 5, budget=1.0)
    assert event.reason
    assert not event.changes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_before_the_first_step_the_price_is_nothing():
    model, x, _ = mlp()
    apoptosis = Apoptosis(model, example_inputs=x, loss_fn=F.cross_entropy, total_steps=100)
    event = apoptosis.apoptose(x, targets=torch.arange(512) % 5)
    assert event.parameters_after <= event.parameters_before


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_few_inputs_under_batch_norm(n):
    model, x, _ = cnn()
    apoptosis = Apoptosis(model.train(), example_inputs=x, policy=POLICY)
    event = apoptosis.apoptose(x[:n], budget=1e-9)
    assert event.certificate is None or event.certificate.samples >= min(n, 2)


def test_auxiliary_head_that_only_trains_keeps_its_width():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = nn.Linear(10, 32), nn.Linear(32, 3), nn.Linear(10, 16), nn.Linear(16, 3)
            copy_rows(self.a, range(8), range(24, 32))

        def forward(self, x):
            output = self.b(self.a(x).tanh())
            return output + self.d(self.c(x).tanh()) if self.training else output

    model, x = Auxiliary(), data(256, 10)
    apoptosis = Apoptosis(model, example_inputs=x, policy=POLICY)
    apoptosis.apoptose(x, budget=1e-6)
    groups = {group.name: group for group in apoptosis.groups}
    assert (groups["a"].width, groups["c"].width) == (24, 16)
    assert "in training mode only" in (groups["c"].reason or "")
    model.train()(x).sum().backward()


def test_constant_activations_everywhere():
    """Nothing varies: all the second moments are of rank 1 or 0."""
    model, _, _ = mlp()
    x = torch.zeros(64, 10)
    apoptosis = Apoptosis(model, example_inputs=x, policy=POLICY)
    before = model(x)
    event = apoptosis.apoptose(x, budget=1e-6)
    assert not event.rolled_back
    assert [group.width for group in apoptosis.groups][:2] == [1, 1]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


# The guard, and failures: everything is as before


def bits(value):
    """A comparable image of any state, exact to the bit."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), tuple(value.stride()), raw.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return repr(value)


class Patient:
    """A model in the middle of training, with all that hangs on it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32),
            nn.Dropout(0.2), nn.ReLU(), weight_norm(nn.Linear(32, 24)), nn.Tanh(), nn.Linear(24, 5),
        ).to(memory_format=torch.channels_last)  # fmt: skip
        self.ema = AveragedModel(self.model, use_buffers=True)
        first, last = [*self.model[:2].parameters()], [*self.model[2:].parameters()]
        self.optimizers = [torch.optim.SGD(first, 0.05, momentum=0.9), torch.optim.AdamW(last, 0.01, amsgrad=True)]
        self.model.train()[1].eval()
        self.x, self.y = data(96, 1, 6, 6), torch.arange(96) % 5
        for _ in range(3):
            self.train()
        copy_rows(self.model[0], range(6), range(10, 16)), copy_rows(self.model[1], range(6), range(10, 16))
        copy_rows(self.model[4], range(8), range(24, 32)), copy_rows(self.model[7], range(8), range(16, 24))
        copy_rows(self.model[7].parametrizations.weight, range(8), range(16, 24))
        F.cross_entropy(self.model(self.x), self.y).backward()  # gradients that an event must keep
        self.parameters = dict(self.model.named_parameters())
        self.groups = None

    def train(self):
        loss = F.cross_entropy(self.model(self.x), self.y)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update_parameters(self.model)
        return loss

    def image(self):
        networks = [self.model, self.ema]
        tensors = [(n, t) for net in networks for n, t in [*net.named_parameters(), *net.named_buffers()]]
        modules = [module for net in networks for module in net.modules()]
        return {
            "tensors": [(name, id(t), bits(t), bits(t.grad), t.requires_grad) for name, t in tensors],
            "optimizers": [bits(optimizer.state_dict()) for optimizer in self.optimizers],
            "modes": [module.training for module in modules],
            "sizes": [
                {k: v for k, v in vars(m).items() if isinstance(v, int | tuple) and not k.startswith("_")}
                for m in modules
            ],
            "rng": bits(torch.get_rng_state()),
        }

    def apoptosis(self, loss_fn=F.cross_entropy, **policy):
        return Apoptosis(
            self.model, self.optimizers, example_inputs=self.x, loss_fn=loss_fn, followers=[self.ema],
            policy=Policy(**{"multiple": 1, "floor": 1, **policy}),
        )  # fmt: skip


class Rising:
    """Cross-entropy, but once channels are gone it is worse by one."""

    def __init__(self, model):
        self.model, self.full, self.broken = model, sum(p.numel() for p in model.parameters()), 1.0

    def __call__(self, output, targets):
        shrunk = sum(p.numel() for p in self.model.parameters()) < self.full
        return F.cross_entropy(output, targets) + (self.broken if shrunk else 0.0)


@pytest.mark.parametrize(
    ("broken", "policy", "reason"),
    [
        (1.0, {}, "the loss on held-out data rose by"),
        (math.nan, {}, "no longer finite"),
        (math.inf, {}, "no longer finite"),
        (0.0, {"max_loss_increase": -1.0}, "a loss increase within -1 can't be shown"),
        (0.0, {"max_changed_predictions": 0.0}, "a share of changed predictions within 0 can't be shown"),
    ],
)
def test_a_removal_that_breaks_a_limit_is_undone_bit_for_bit(broken, policy, reason):
    patient = Patient()
    loss_fn = Rising(patient.model)
    loss_fn.broken = broken
    apoptosis = patient.apoptosis(loss_fn, **policy)
    before, groups = patient.image(), apoptosis.groups
    event = apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert event.rolled_back
    assert reason in event.reason
    assert event.changes
    assert event.widths_after == event.widths_before
    assert event.parameters_after == event.parameters_before
    assert apoptosis.groups == groups
    assert patient.image() == before
    assert apoptosis.history == [event]
    assert Event.from_json(event.to_json()).reason == event.reason
    changed = event.changes[0].group
    line = next(line for line in apoptosis.explain().splitlines() if line.startswith(f"{changed}:"))
    assert reason in line
    assert math.isfinite(patient.train().item())


def test_without_a_loss_the_guard_watches_the_output():
    patient = Patient()
    apoptosis = patient.apoptosis(None, guard=1e-9, tolerance=0.0)
    before = patient.image()
    event = apoptosis.apoptose(patient.x, budget=1e-4)
    assert event.rolled_back
    assert patient.image() == before


def test_after_an_undone_event_less_is_paid():
    patient = Patient()
    apoptosis = patient.apoptosis(Rising(patient.model))
    price = apoptosis._price()
    apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert apoptosis._price() < price


class Injected(Exception):
    pass


def fails_at(function, call):
    """`function`, but its call number `call` raises after it ran."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        result = function(*args, **kwargs)
        if count == call:
            raise Injected
        return result

    return wrapped


# Stage -> (owner, name, number of calls in one event of the patient, where 3 groups shrink)
STAGES = {
    "merge": (removal, "merged", 2),
    "evaluate": (removal, "evaluate", 2),
    "measure": (removal, "measure", 1),
    "select": (planning, "select_blocks", 3),
    "spend": (planning, "spend", 1),
    "fold": (planning, "fold_blocks", 3),
    "unexplained": (planning, "unexplained", 3),
    "surgery": (Surgery, "fold_", 3),
    "judge": (removal, "judge", 1),
    "certify": (removal, "certify", 1),
    "limit": (removal, "clopper_pearson_upper", 1),
    "cost": (network, "flops", 2),
}


@pytest.mark.parametrize(("stage", "call"), [(name, i + 1) for name, (*_, n) in STAGES.items() for i in range(n)])
def test_failure_at_every_stage_leaves_everything_as_it_was(stage, call, monkeypatch):
    patient = Patient()
    apoptosis = patient.apoptosis()
    before, groups, state = patient.image(), apoptosis.groups, bits(apoptosis.state_dict())
    owner, name, _ = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails_at(getattr(owner, name), call))
        with pytest.raises(Injected):
            apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert patient.image() == before
    assert apoptosis.groups == groups
    assert bits(apoptosis.state_dict()) == state
    patient.train()
    assert apoptosis.step(patient.x, targets=patient.y) is None
    event = apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert len(event.changes) == 3
    assert not event.rolled_back
    assert math.isfinite(patient.train().item())


def test_every_stage_is_called_as_often_as_failures_are_injected(monkeypatch):
    patient = Patient()
    apoptosis, counts = patient.apoptosis(), dict.fromkeys(STAGES, 0)

    def counted(stage, function):
        def wrapped(*args, **kwargs):
            counts[stage] += 1
            return function(*args, **kwargs)

        return wrapped

    for stage, (owner, name, _) in STAGES.items():
        monkeypatch.setattr(owner, name, counted(stage, getattr(owner, name)))
    assert len(apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4).changes) == 3
    assert all(counts[stage] >= n for stage, (*_, n) in STAGES.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_between_two_groups(error, monkeypatch):
    patient = Patient()
    apoptosis = patient.apoptosis()
    before, done = patient.image(), []
    whole = Surgery.fold_

    def fold_(self, group, plan):
        if done:
            raise error
        done.append(group)
        return whole(self, group, plan)

    monkeypatch.setattr(Surgery, "fold_", fold_)
    with pytest.raises(error):
        apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert done
    assert patient.image() == before


def test_an_event_keeps_identity_gradients_modes_and_random_state():
    patient = Patient()
    apoptosis = patient.apoptosis()
    before = patient.image()
    event = apoptosis.apoptose(patient.x, targets=patient.y, budget=1e-4)
    assert event.parameters_after < event.parameters_before
    after = patient.image()
    assert [(t[0], t[1], t[4]) for t in after["tensors"]] == [(t[0], t[1], t[4]) for t in before["tensors"]]
    assert after["modes"] == before["modes"]
    assert after["rng"] == before["rng"]
    assert {p.shape for p in patient.model.parameters()} == {p.shape for p in patient.ema.module.parameters()}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in patient.model.parameters())
    for optimizer in patient.optimizers:
        for parameter, values in optimizer.state.items():
            assert all(v.shape == parameter.shape for v in values.values() if torch.is_tensor(v) and v.ndim)
    assert patient.model[0].weight.is_contiguous(memory_format=torch.channels_last)


# Pieces


def test_shares_of_cost_sum_to_one_at_full_width():
    model, x, _ = cnn()
    groups, costs = trace(model, (x,), {})
    network = Network(model, (), (), groups, costs)
    full = {group.name: group.width for group in groups}
    for chosen in (groups, groups[:1], groups[1:3], []):
        terms, widths = network.open_costs(chosen), {group.name: full[group.name] for group in chosen}
        assert flops(terms, widths) == pytest.approx(1.0)
    assert network.flops() == flops(costs, full)


class Deep(nn.Module):
    """Many groups, each a small part of the cost."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)) for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("depth", "shrunk"), [(2, 1), (2, 16), (30, 1)])
def test_what_is_left_of_a_network_is_searched_as_finely_as_it_is_worth(depth, shrunk, monkeypatch):
    """The widths that a price buys are those of the whole error curves, also when little of the cost is left, or each
    group is a small part of it."""
    torch.manual_seed(0)
    model, x = Deep(depth), data(1024, 16)
    groups, costs = trace(model, (x,), {})
    groups = [dataclasses.replace(group, full_width=shrunk * group.width) for group in groups]
    network, policy = Network(model, (), (), groups, costs), Policy(room=0, multiple=1, floor=1)
    groups = network.prunable(1)
    moments = measure(model, groups, [Batch((x,), {})], None, 1.0)
    prices, found = [10.0 ** (exponent / 2) for exponent in range(-4, 3)], []
    for search in (select_blocks, lambda *args, **kwargs: select_blocks(*args, **kwargs | {"stop": 0.0})):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "select_blocks", search)
            plans = [planning.plan(network, groups, moments, policy, 1.0, price)[0] for price in prices]
            found.append([sum(48 - len(item.keep) for item in each) for each in plans])
    assert found[0] == pytest.approx(found[1], abs=depth)
    assert any(0.2 < gone / (48 * depth) < 0.8 for gone in found[1])  # prices that buy something, but not all


def test_an_event_foresees_what_twice_the_price_would_take():
    torch.manual_seed(0)
    model, x = Deep(3), data(1024, 16)
    network = Network(model, (), (), *trace(model, (x,), {}))
    groups, policy = network.prunable(1), Policy(room=0, multiple=1, floor=1)
    moments = measure(model, groups, [Batch((x,), {})], None, 1.0)

    def left(price, budget):
        plans, _, foreseen, _ = planning.plan(network, groups, moments, policy, budget, price)
        return flops(network.costs, network.widths | {item.group: len(item.keep) for item in plans}), foreseen

    for price in (0.03, 0.1, 0.3):
        now, foreseen = left(price, 0.1)
        later, _ = left(2 * price, 0.2)
        assert foreseen == pytest.approx(1 - later / now, abs=0.02)
        assert foreseen > 0.03


def test_more_is_foreseen_where_only_the_steepest_step_of_a_look_was_in_the_way():
    torch.manual_seed(0)
    model, x = Deep(3), data(1024, 16)
    network = Network(model, (), (), *trace(model, (x,), {}))
    groups = network.prunable(1)
    moments = measure(model, groups, [Batch((x,), {})], None, 1.0)
    found = {}
    for policy in (
        Policy(room=0, multiple=1, floor=1, steepest=2.0),
        Policy(room=0, multiple=1, floor=24, steepest=2.0),
    ):
        plans, _, foreseen, _ = planning.plan(network, groups, moments, policy, 1e6, 1e6)
        assert {len(item.keep) for item in plans} == {24}
        found[policy.floor] = foreseen
    assert found[1] > 0.4
    assert found[24] == 0.0


def effective_rank(rows, centred):
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0) if centred else rows.T @ rows).double()
    return float(values.sum() ** 2 / values.square().sum())


@pytest.mark.parametrize("room", [0.05, 0.2, 100.0])
def test_a_look_leaves_room_for_the_directions_in_which_readers_learn(room):
    """Statement 22, from hooks; a removal that is asked for by its budget is not held back."""
    torch.manual_seed(0)
    model, x, y = Deep(2), data(1024, 16), data(1024, 16, seed=1)
    read = []
    hooks = [block[3].register_forward_pre_hook(lambda _, args: read.append(args[0])) for block in model.blocks]
    loss = F.mse_loss(model(x), y)
    gradients = torch.autograd.grad(loss, read)
    for hook in hooks:
        hook.remove()
    pairs = zip(read, gradients, strict=True)
    found = [effective_rank(a.detach(), centred=True) * effective_rank(u, centred=False) for a, u in pairs]
    network = Network(model, (), (), *trace(model, (x,), {}))
    batch = Batch((x,), {}, y)
    policy = Policy(room=room, multiple=1, floor=1, steepest=1e6, guard=1e9, tolerance=1e9, rebalance=False)
    event = removal.remove_(network, [batch], [batch], F.mse_loss, policy, price=1e6, first_loss=2 * float(loss))
    expected = [min(48, math.ceil(room * each)) for each in found]
    assert [event.widths_after[f"blocks.{i}.1"] for i in range(2)] == pytest.approx(expected, abs=1)
    if room == 100:
        assert list(event.notes) == ["blocks.0.1", "blocks.1.1"]
        assert all("Policy(room=0)" in note for note in event.notes.values())
    event = removal.remove_(network, [batch], [batch], F.mse_loss, policy, budget=1e6)
    assert max(event.widths_after[f"blocks.{i}.1"] for i in range(2)) == 1


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm])
def test_readers_that_are_parametrized_have_room(parametrization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), parametrization(nn.Linear(48, 16)))
    x, y, policy = data(1024, 16), data(1024, 16, seed=1), Policy(room=1e9, multiple=1, floor=1)
    network = Network(model, (), (), *trace(model, (x,), {}))
    event = removal.remove_(network, [Batch((x,), {}, y)], [Batch((x,), {}, y)], F.mse_loss, policy, price=1e6)
    assert event.changes == ()
    assert "directions" in event.notes["0"]


def test_what_costs_nothing_needs_no_room():
    model, x, expected = mlp()
    network = Network(model, (), (), *trace(model, (x,), {}))
    moments = measure(model, network.prunable(1), [Batch((x,), {})], None, 1.0)
    policy = dataclasses.replace(POLICY, room=1e9)
    plans, *_ = planning.plan(network, network.prunable(1), moments, policy, 0.1, 1e-3)
    assert {item.group: len(item.keep) for item in plans} == expected


def test_convolutions_have_no_room():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x, found = data(256, 1, 8, 8), []
    network = Network(model, (), (), *trace(model, (x,), {}))
    groups = network.prunable(1)
    moments = measure(model, groups, [Batch((x,), {})], None, 1.0)
    for room in (0.0, 1e9):
        policy = dataclasses.replace(POLICY, room=room, steepest=4.0)
        plans = planning.plan(network, groups, moments, policy, 1e6, 1e6)
        found.append(({item.group: len(item.keep) for item in plans.folds}, list(plans.kept)))
    assert found == [({"0": 4, "2": 1}, []), ({"0": 4}, ["2"])]


def test_certificate_counts_changed_predictions():
    evaluations = [
        removal.Evaluation(4, loss, torch.full((4,), loss), torch.tensor(classes), ())
        for loss, classes in ((1.0, [0, 1, 2, 0]), (1.5, [0, 1, 0, 0]))
    ]
    certificate = removal.certify(*evaluations, 0.95, 1.0)
    assert certificate.loss_upper == pytest.approx(0.5 + 7 * 2.0 * math.log(40) / 9)  # empirical Bernstein, variance 0
    assert (certificate.samples, certificate.changed_predictions) == (4, 1)
    assert (certificate.loss_before, certificate.loss_after) == (1.0, 1.5)
    # P(at most 1 of 4) = (1 - p)^4 + 4 p (1 - p)^3 must be 0.05 at the limit
    p = certificate.changed_upper
    assert (1 - p) ** 4 + 4 * p * (1 - p) ** 3 == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("layers", "scaled"),
    [
        ([nn.Linear(10, 32), nn.ReLU()], ("0.weight", "0.bias")),
        ([nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU()], ("1.weight", "1.bias")),
        ([nn.Linear(10, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU()], ()),
        ([nn.Linear(10, 32), nn.Tanh()], ()),
        ([weight_norm(nn.Linear(10, 32)), nn.ReLU()], ()),
    ],
    ids=["relu", "norm", "norm, not affine", "tanh", "weight norm"],
)
def test_survivors_are_rescaled_only_where_it_changes_nothing(layers, scaled, optimizer):
    torch.manual_seed(0)
    model, x = nn.Sequential(*copy.deepcopy(layers), nn.Linear(32, 5)), data(512, 10)
    if len(scaled) or optimizer is torch.optim.SGD:
        copy_rows(model[0], range(8), range(24, 32)) if not hasattr(model[0], "parametrizations") else None
    if len(layers) == 3:
        model(x)
        copy_rows(model[1], range(8), range(24, 32))
    optimizers = (optimizer(model.parameters(), 0.1),)
    groups, costs = trace(model, (x,), {})
    network = Network(model, optimizers, (), groups, costs)
    found = planning.pacemakers(network, groups[0])
    assert found == (scaled if optimizer is torch.optim.SGD else ())
    before = copy.deepcopy(model).eval()(x)
    policy = Policy(multiple=1, floor=1)
    removal.remove_(network, [Batch((x,), {})], [Batch((x,), {})], None, policy, 1e-6)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-3, atol=1e-4)


def test_named_policies_differ_in_price_only_and_in_order():
    prices = [POLICIES[name].price for name in ("conservative", "normal", "aggressive")]
    assert prices == sorted(set(prices))


@pytest.mark.parametrize(
    "wrong",
    [{"price": 0}, {"gap": 1.0}, {"stop": 0.0}, {"samples": 1}, {"confidence": 1.0}, {"cost": "euros"}, {"multiple": 0},
     {"floor": 0}, {"payback": -1}, {"start": 1.0}, {"first_step": 0}, {"full_run": 0}, {"guard": 0},
     {"tolerance": -0.1}],
    ids=str,
)  # fmt: skip
def test_policy_out_of_range(wrong):
    with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}` must"):
        Policy(**wrong)
    with pytest.raises(ArgumentError) as error:
        Policy(**wrong, damping=-1.0)
    assert len(error.value.problems) == 2


def test_a_batch_is_split_into_three_quarters_and_a_quarter():
    batch = Batch((data(10, 3),), {"m": data(10)}, torch.arange(10))
    calibration, held_out = apoptosis.split(batch)
    assert (calibration.size, held_out.size) == (8, 2)
    assert torch.equal(torch.cat([calibration.targets, held_out.targets]), batch.targets)
    for whole in (
        Batch((data(7, 3),), {}),
        Batch((data(8, 3), torch.tensor(1.0)), {}),
        Batch((data(8, 3),), {}, data(9)),
    ):
        assert apoptosis.split(whole) == (whole, whole)
