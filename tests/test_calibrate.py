"""Moments, metric and energy against loops over samples and positions with explicit per-example gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from apoptorch.batches import Batch, merged
from apoptorch.calibrate import measure
from apoptorch.evaluation import evaluate, relative_changes
from apoptorch.graph import trace


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(model, x):
    return [group for group in trace(model, (x,), {})[0] if group.prunable]


def build(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for layer in layers)).double()


def mlp():
    return build(lambda: nn.Linear(4, 6), nn.Tanh, lambda: nn.Linear(6, 3))


def cnn():
    return build(lambda: nn.Conv2d(2, 6, 3), nn.ReLU, lambda: nn.Conv2d(6, 5, 2, stride=2, padding=1), nn.Tanh,
                 nn.Flatten, lambda: nn.Linear(5 * 16, 3))  # fmt: skip


def square(output, target):
    return (output - target).square().mean()


def columns(a, weight, inner):
    """Positions x channels of one example's input (or gradient), by loops."""
    if weight.ndim == 2:
        n = a.shape[-1] // inner
        rows = a.reshape(-1, a.shape[-1])
        return [[row[c * inner + j] for c in range(n)] for row in rows for j in range(inner)]
    return [[a[c, i, j] for c in range(a.shape[0])] for i in range(a.shape[1]) for j in range(a.shape[2])]


def brute(model, reader, inner, batches, loss_fn, damping=0.0):
    """Second moment, mean, metric and energy at the input of module `reader`, for a loss with diagonal curvature.

    Every example's loss is differentiated by itself with respect to what `reader` reads of that example. The
    gradients are scaled so that their mean square at the output is the trace of the loss's second derivative there.
    """
    weight, seen = reader.weight.detach(), {}

    def hook(module, args, output):
        seen["input"], seen["output"] = args[0], output
        args[0].retain_grad(), output.retain_grad()

    handle = reader.register_forward_hook(hook)
    n = weight.shape[1] // inner
    second, mean, energy = torch.zeros(n, n).double(), torch.zeros(n).double(), torch.zeros(n, n).double()
    count, examples, hessian, fisher, below = 0, torch.zeros(n, n).double(), 0.0, 0.0, 0.0
    for x, y in batches:
        for i in range(len(x)):
            output = model(x[i : i + 1])
            output.retain_grad()
            loss_fn(output, y[i : i + 1]).backward()
            a, u = (columns(t[0].detach(), weight, inner) for t in (seen["input"], seen["input"].grad))
            for row in a:
                row = torch.stack(row)
                second += torch.outer(row, row)
                mean += row
                count += 1
            for row in u:
                examples += torch.outer(torch.stack(row), torch.stack(row))
            fisher += output.grad.square().sum().item()
            below += seen["output"].grad.square().sum().item() / weight.shape[0]
            h = torch.func.hessian(lambda o, t=y[i]: loss_fn(o, t))(output.detach()[0])
            hessian += torch.trace(h.reshape(output.numel(), -1)).item()
    handle.remove()
    # The mean loss has 1/N of each example's curvature and gradient; its N gradients are averaged over N terms.
    scale = hessian / fisher / sum(len(x) for x, _ in batches)
    for c in range(n):
        for d in range(n):
            for j in range(inner):
                energy[c, d] += (weight[:, c * inner + j] * weight[:, d * inner + j]).sum()
    return second / count, mean / count, scale * (examples + damping * below * energy), energy, count


def assert_moments(moments, expected, constant=True):
    second, mean, metric, energy, count = expected
    close = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(moments.second, second, **close)
    torch.testing.assert_close(moments.metric, metric, **close)
    torch.testing.assert_close(moments.energy, energy, **close)
    assert moments.samples == count
    if constant:
        torch.testing.assert_close(moments.mean, mean, **close)
    else:
        assert moments.mean is None


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_linear(damping):
    model = mlp()
    data = [(tensor(5 + 2 * s, 4, seed=s), tensor(5 + 2 * s, 3, seed=9 + s)) for s in range(3)]
    found = measure(model, groups_of(model, data[0][0]), [Batch((x,), {}, y) for x, y in data], square, damping)
    assert set(found) == {"0"}
    assert_moments(found["0"], brute(model, model[2], 1, data, square, damping))


def test_damping_and_noise_are_apart_from_the_metric():
    """Half the damping is half-way to the undamped metric, which is the variance of the mean u.d but for the noise."""
    model, x, y = mlp(), tensor(11, 4), tensor(11, 3, seed=1)
    groups, batches = groups_of(model, x), [Batch((x[:5],), {}, y[:5]), Batch((x[5:],), {}, y[5:])]
    damped = measure(model, groups, batches, square, 0.7)["0"]
    undamped = 2 * damped.half_damped - damped.metric
    torch.testing.assert_close(undamped, brute(model, model[2], 1, [(x, y)], square)[2], rtol=1e-10, atol=1e-14)
    gradients = 2 / 3 * (model(x) - y).detach() @ model[2].weight.detach()
    expected = gradients.mT @ gradients / len(x) ** 2
    assert measure(model, groups, batches, None, 0.7)["0"].noise == 0.0
    torch.testing.assert_close(damped.noise / 2 * undamped, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_convolution_and_flatten(damping):
    model = cnn()
    data = [(tensor(3, 2, 8, 8, seed=s), tensor(3, 3, seed=9 + s)) for s in range(2)]
    found = measure(model, groups_of(model, data[0][0]), [Batch((x,), {}, y) for x, y in data], square, damping)
    assert_moments(found["0"], brute(model, model[2], 1, data, square, damping), constant=False)  # zero padding
    assert_moments(found["2"], brute(model, model[5], 16, data, square, damping))


@pytest.mark.parametrize(("make", "reader", "name"), [(mlp, 2, "0"), (cnn, 2, "0"), (cnn, 5, "2")])
def test_slope_and_cross_are_the_gradients_of_what_is_read(make, reader, name):
    """V times the gradient of V, summed over taps; and the gradient in a constant added to every channel."""
    model = make()
    x, y = (tensor(5, 4), tensor(5, 3)) if make is mlp else (tensor(5, 2, 8, 8), tensor(5, 3, seed=1))
    batches = [Batch((x[:2],), {}, y[:2]), Batch((x[2:],), {}, y[2:])]
    found = measure(model, groups_of(model, x), batches, square, 0.0)[name]
    weight, n = model[reader].weight, len(found.slope)
    added = torch.zeros(n, dtype=torch.float64, requires_grad=True)

    def add(module, args):
        shape = (-1, 1, 1) if weight.ndim == 4 else (-1,)
        repeated = added.repeat_interleave(args[0].shape[1] // n)
        return (args[0] + repeated.view(shape),)

    handle = model[reader].register_forward_pre_hook(add)
    gradient, slope = torch.autograd.grad(square(model(x), y), [weight, added])
    handle.remove()
    columns, change = (t.detach().movedim(1, 0).unflatten(0, (n, -1)).flatten(1) for t in (weight, gradient))
    torch.testing.assert_close(found.cross, columns @ change.mT)
    torch.testing.assert_close(found.slope, slope)


def pairwise_contrast(output, target):
    """Compares the inputs of a batch with each other: not a mean over inputs."""
    return (output[:, None] - output[None]).square().mean()


def with_a_branch(output, target):
    """Nothing for vmap."""
    loss = (output - target).square().mean()
    return loss if loss > 1e9 else loss + 0.0


@pytest.mark.parametrize(
    ("loss_fn", "targets", "apart"),
    [
        (F.cross_entropy, torch.arange(12) % 3, True),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()), torch.arange(12) % 3, False),
        (square, tensor(12, 3), True),
        (with_a_branch, tensor(12, 3), True),
        (lambda o, y: F.margin_ranking_loss(o[:, 0], o[:, 1], y, margin=0.5), tensor(12).sign(), True),  # given pairs
        (lambda o, y: F.triplet_margin_loss(o, y[:, 0], y[:, 1]), tensor(12, 2, 3), True),
        (pairwise_contrast, tensor(12, 3), False),
    ],
)
def test_losses_of_single_inputs(loss_fn, targets, apart):
    model, x = mlp(), tensor(12, 4)
    batches = [Batch((x[:5],), {}, targets[:5]), Batch((x[5:],), {}, targets[5:])]
    found = evaluate(model, batches, loss_fn)
    if apart:
        alone = [loss_fn(model(x[i : i + 1]), targets[i : i + 1]).item() for i in range(12)]
        assert found.units.tolist() == pytest.approx(alone, rel=1e-12)
        assert found.units.mean().item() == pytest.approx(found.loss)
    else:
        together = [loss_fn(model(*batch.args), batch.targets).item() for batch in batches]
        assert found.units.tolist() == pytest.approx(together, rel=1e-12)


def test_positions_of_a_linear_layer_count_as_samples():
    model, x = mlp(), tensor(3, 7, 4)
    y = tensor(3, 7, 3, seed=5)
    found = measure(model, groups_of(model, x), [Batch((x,), {}, y)], square, 0.0)["0"]
    assert_moments(found, brute(model, model[2], 1, [(x, y)], square))
    assert found.samples == 21


def test_labels_of_every_pixel_are_terms_of_the_loss():
    """With one label a pixel, the mean runs over pixels: their gradients are examples of their own."""
    model = build(lambda: nn.Conv2d(2, 6, 1), nn.Tanh, lambda: nn.Conv2d(6, 3, 1))
    x, y = tensor(2, 2, 3, 3), torch.randint(3, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    found = measure(model, groups_of(model, x), [Batch((x,), {}, y)], F.cross_entropy, 0.0)["0"].metric
    a = model[1](model[0](x)).detach().requires_grad_()
    output = model[2](a)
    gradients = torch.autograd.grad(F.cross_entropy(output, y, reduction="sum"), a)[0]
    rows = gradients.permute(0, 2, 3, 1).reshape(-1, 6)
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    shape = found / expected
    torch.testing.assert_close(shape, shape[0, 0].expand(6, 6), rtol=1e-8, atol=0)


def test_fisher_has_the_curvature_of_cross_entropy():
    """One factor for all entries: trace of the softmax's curvature over mean square of the gradients."""
    model, x = mlp(), tensor(400, 4)
    y = torch.randint(3, (400,), generator=torch.Generator().manual_seed(0))
    found = measure(model, groups_of(model, x), [Batch((x,), {}, y)], F.cross_entropy, 0.0)["0"].metric
    a = model[1](model[0](x)).detach()
    p = model[2](a).softmax(1).detach()
    g = p - F.one_hot(y, 3)
    fisher = (g @ model[2].weight.detach()).mT @ (g @ model[2].weight.detach()) / len(x)
    factor = (p * (1 - p)).sum(1).mean() / g.square().sum(1).mean()
    ratio = found / (factor * fisher)
    torch.testing.assert_close(ratio, torch.ones(6, 6).double(), rtol=1e-8, atol=0)


def test_without_a_loss_probes_converge_to_the_gram_matrix_of_the_jacobian():
    model, x = mlp(), tensor(6, 4)
    found = measure(model, groups_of(model, x), [Batch((x,), {})] * 600, None, 0.0)["0"].metric
    y = model(x).detach()
    jacobian = model[2].weight.detach()
    expected = 2 * len(x) * jacobian.mT @ jacobian / y.square().sum()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_prediction_without_a_loss_is_the_relative_change_of_the_output():
    model, x = mlp(), tensor(500, 4)
    found = measure(model, groups_of(model, x), [Batch((x[i : i + 5],), {}) for i in range(0, 500, 5)], None, 0.0)["0"]
    before, noise = evaluate(model, [Batch((x,), {})], None), 0.1 * tensor(500, 6, seed=3)
    second = noise.mT @ noise / 500

    class Noisy(nn.Module):
        def forward(self, x):
            return model[2](model[1](model[0](x)) + noise)

    change = relative_changes(before, evaluate(Noisy(), [Batch((x,), {})], None)).mean().item()
    predicted = 0.5 * (found.metric * second).sum().item()
    assert predicted == pytest.approx(change, rel=0.3)


class Forked(nn.Module):
    """Two layers read the same tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        h = self.below(x).tanh()
        return self.left(h) * torch.tanh(self.right(h))


@pytest.mark.parametrize("frozen", [False, True])
def test_two_readers_of_one_tensor_count_once_with_the_gradient_of_both(frozen):
    model, x, y = Forked(), tensor(5, 4), tensor(5, 3, seed=1)
    model.below.requires_grad_(not frozen)
    found = measure(model, groups_of(model, x), [Batch((x,), {}, y)], square, 0.0)["below"]
    h = model.below(x).tanh().detach().requires_grad_()
    output = model.left(h) * torch.tanh(model.right(h))
    (gradient,) = torch.autograd.grad((output - y).square().sum() / 3, h)
    above = 2 * (output - y).detach() / 3
    factor = (2 / 3 * 3 * 5) / above.square().sum()
    torch.testing.assert_close(found.metric, gradient.mT @ gradient / 5 * factor, rtol=1e-10, atol=0)
    assert found.samples == 5
    both = [w.detach().mT @ w.detach() for w in (model.left.weight, model.right.weight)]
    torch.testing.assert_close(found.energy, sum(both))


def test_frozen_parameters_change_nothing():
    model, x, y = cnn(), tensor(3, 2, 8, 8), tensor(3, 3, seed=1)
    groups = groups_of(model, x)
    free = measure(model, groups, [Batch((x,), {}, y)], square, 1.0)
    frozen = measure(model.requires_grad_(False), groups, [Batch((x,), {}, y)], square, 1.0)
    for name, moments in free.items():
        torch.testing.assert_close(frozen[name].metric, moments.metric, rtol=1e-12, atol=0)
        torch.testing.assert_close(frozen[name].second, moments.second, rtol=1e-12, atol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_nothing_is_touched():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), weight_norm(nn.Linear(6, 5)), nn.ReLU(),
        spectral_norm(nn.Linear(5, 3)),
    )  # fmt: skip
    model.train()[1].eval()
    x, y = tensor(8, 4).float(), tensor(8, 3, seed=1).float()
    groups = groups_of(model, x)
    model(x).sum().backward()
    before, generator = copy.deepcopy(model), torch.get_rng_state()
    owners = dict(model.named_buffers())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    batch = Batch((x.requires_grad_(False),), {}, y)
    for loss_fn in (square, None):
        measure(model, groups, [batch, batch], loss_fn, 1.0)
        evaluate(model, [batch], loss_fn)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(buffer is owners[name] for name, buffer in model.named_buffers())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_off_and_batch_norm_as_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x = tensor(9, 4)
    found = measure(model, groups_of(model, x), [Batch((x,), {}, tensor(9, 3, seed=1))], square, 0.0)["0"]
    h = model[0](x).detach()
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(found.second, h.mT @ h / 9)
    evaluation = evaluate(model, [Batch((x,), {}, tensor(9, 3, seed=1))], square)
    assert evaluation.loss == pytest.approx(square(model[3](h), tensor(9, 3, seed=1)).item(), rel=1e-12)


def test_same_numbers_whatever_the_state_of_the_random_generator():
    model, x = mlp(), tensor(5, 4)
    batch = Batch((x,), {}, torch.tensor([0, 1, 2, 0, 1]))
    for loss_fn in (F.cross_entropy, None):
        torch.manual_seed(1)
        first = measure(model, groups_of(model, x), [batch], loss_fn, 1.0)["0"].metric
        torch.manual_seed(2)
        assert torch.equal(measure(model, groups_of(model, x), [batch], loss_fn, 1.0)["0"].metric, first)


def test_targets_that_are_none_keywords_and_structured_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, *, features, scale):
            h = F.linear(input=features, weight=self.a.weight, bias=self.a.bias).tanh()
            return {"logits": [F.linear(input=h, weight=self.b.weight, bias=self.b.bias) * scale], "size": 3}

    model, x = Model().double(), tensor(5, 4)
    groups, _ = trace(model, (), {"features": x, "scale": 2.0})
    groups = [group for group in groups if group.prunable]
    batch = Batch((), {"features": x, "scale": 2.0}, None)
    assert batch.size == 5
    loss_fn = lambda output, targets: output["logits"][0].square().mean()
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    found = measure(model, groups, [batch], loss_fn, 0.0)["a"]
    expected = brute(plain, model.b, 1, [(x, torch.zeros(5, 3).double())], lambda o, y: (2 * o - y).square().mean())
    torch.testing.assert_close(found.second, expected[0])
    torch.testing.assert_close(found.metric, expected[2])
    evaluation = evaluate(model, [batch], loss_fn)
    assert evaluation.loss == pytest.approx((2 * plain(x)).square().mean().item())
    assert evaluation.predictions is None


def test_loss_that_is_a_part_of_the_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x).tanh()).square().mean(), None

    model, x = Model().double(), tensor(5, 4)
    found = measure(model, groups_of(model, x), [Batch((x,), {})], lambda output, _: output[0], 0.0)["a"]
    h = model.a(x).tanh().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.b(h).square().mean(), h)
    torch.testing.assert_close(found.metric, 5 * gradient.mT @ gradient)


def test_loss_without_a_second_derivative():
    model = build(lambda: nn.Linear(4, 6), nn.Tanh, lambda: nn.Linear(6, 5))
    x = tensor(2, 8, 4)

    def ctc(output, targets):
        return F.ctc_loss(output.log_softmax(-1).transpose(0, 1), targets, torch.tensor([8, 8]), torch.tensor([3, 3]))

    batch = Batch((x,), {}, torch.tensor([[1, 2, 3], [2, 2, 4]]))
    found = measure(model, groups_of(model, x), [batch], ctc, 1.0)["0"]
    assert found.metric.isfinite().all()
    assert found.metric.trace() > 0


@pytest.mark.parametrize("loss_fn", [F.l1_loss, F.smooth_l1_loss, F.mse_loss])
def test_losses_of_all_kinds_give_finite_metrics(loss_fn):
    model, x = mlp(), tensor(5, 4)
    found = measure(model, groups_of(model, x), [Batch((x,), {}, tensor(5, 3, seed=1))], loss_fn, 1.0)["0"]
    assert found.metric.isfinite().all()
    assert torch.linalg.eigvalsh(found.metric).min() > -1e-12


def test_groups_that_only_training_reads_are_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            output = self.b(self.a(x).tanh())
            return output + self.d(self.c(x).tanh()) if self.training else output

    model, x = Auxiliary().double(), tensor(5, 4)
    groups = groups_of(model, x)
    assert {group.name for group in groups} == {"a", "c"}
    assert set(measure(model, groups, [Batch((x,), {}, tensor(5, 3))], square, 1.0)) == {"a"}


def test_what_the_loss_does_not_see_has_no_metric():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(self.a(x).tanh()), self.d(self.c(x).tanh())

    model, x = Two().double(), tensor(5, 4)
    found = measure(model, groups_of(model, x), [Batch((x,), {}, tensor(5, 3))], lambda o, y: square(o[0], y), 1.0)
    assert found["a"].metric.trace() > 0
    assert not found["c"].metric.any()


def test_no_groups():
    assert measure(mlp(), [], [Batch((tensor(5, 4),), {}, tensor(5, 3))], square, 1.0) == {}


# Evaluation and batches


def test_evaluation_weighs_batches_by_their_size():
    model = mlp()
    data = [(tensor(n, 4, seed=n), torch.arange(n) % 3) for n in (2, 7)]
    found = evaluate(model, [Batch((x,), {}, y) for x, y in data], F.cross_entropy)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    assert found.samples == 9
    assert found.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)
    assert torch.equal(found.predictions, model(x).argmax(1))
    torch.testing.assert_close(torch.cat(found.outputs), model(x).detach())


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        (torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([0, 1]), [1, 0]),
        (torch.tensor([[[1.0, 5.0], [2.0, 3.0]]]), torch.tensor([[0, 1]]), [1, 0]),  # classes before positions
        (torch.tensor([[[1.0, 5.0], [4.0, 3.0], [1.0, 0.0]]]), torch.tensor([[0, 1, 1]]), [1, 0, 0]),  # and after
        (torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 1.0]), [0, 1]),
        (torch.tensor([[0.4], [0.6]]), torch.tensor([1.0, 1.0]), [0, 1]),
        (torch.tensor([0.4, 0.6]), torch.tensor([0.3, 1.7]), None),
        (torch.tensor([0.4, 0.6]), None, None),
    ],
)
def test_predicted_classes(output, targets, expected):
    class Fixed(nn.Module):
        def forward(self, x):
            return output

    found = evaluate(Fixed(), [Batch((torch.zeros(len(output)),), {}, targets)], None).predictions
    assert (found if found is None else found.tolist()) == expected
    assert math.isnan(evaluate(Fixed(), [Batch((torch.zeros(2),), {}, targets)], None).loss)


def test_merged_batches_hold_the_same_inputs():
    batches = [
        Batch((tensor(n, 4, seed=n),), {"mask": tensor(n, seed=n)}, [tensor(n, 3, seed=n)]) for n in (3, 4, 5, 6)
    ]
    found = merged(batches, size=7)
    assert [batch.size for batch in found] == [7, 11]
    for pick in (lambda b: b.args[0], lambda b: b.kwargs["mask"], lambda b: b.targets[0]):
        assert torch.equal(torch.cat([pick(b) for b in found]), torch.cat([pick(b) for b in batches]))


@pytest.mark.parametrize(
    "batches",
    [
        [Batch((tensor(2, 4),), {}, None), Batch((tensor(2, 5),), {}, None)],
        [Batch((tensor(2, 4),), {}, tensor(1)), Batch((tensor(2, 4),), {}, tensor(1))],
        [Batch((tensor(2, 4), torch.tensor(1.0)), {}, None), Batch((tensor(2, 4), torch.tensor(1.0)), {}, None)],
        [Batch((tensor(2, 4), 3), {}, None), Batch((tensor(2, 4), 4), {}, None)],
        [Batch((tensor(2, 4),), {}, None), Batch((tensor(2, 4),), {}, tensor(2))],
    ],
    ids=["shapes", "not batched", "scalars", "numbers", "structure"],
)
def test_batches_that_are_not_alike_stay_apart(batches):
    assert merged(batches) == batches


def test_size_of_a_batch():
    assert Batch((3, tensor(5, 2)), {}).size == 5
    assert Batch((), {"x": [tensor(4)]}).size == 4
    assert Batch((3,), {}).size == 0
    assert Batch((tensor(0, 3),), {}).size == 0
