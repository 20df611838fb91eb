"""The peers of the benchmark, each against its published behaviour on a small case."""

import pytest
import torch
import torch.nn.functional as F
from comparison import Apoptosis, Contender, Meter, Run, Task, accuracy, mlp, train, widths
from datasets import Split
from torch import nn

from apoptorch import Policy
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.contenders.channels import Narrow, columns, final_widths, groups_of, removals, rows
from benchmarks.contenders.dead_neurons import DeadNeurons
from benchmarks.contenders.group_lasso import GroupLasso
from benchmarks.contenders.merging import Merging, merged
from benchmarks.contenders.torch_pruning_loop import TorchPruning
from benchmarks.contenders.weights_only import WeightsOnly, event_steps


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2560, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return Split(x[:2048], y[:2048], x[2048:], y[2048:])


def sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def task(model=lambda: mlp(6, 64, 64, 2), optimizer=sgd, epochs=4):
    return Task(model, optimizer, F.cross_entropy, accuracy, batch=64, epochs=epochs)


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 2),
    )  # fmt: skip


def begun(contender, recipe, data, steps=40):
    """The contender before its first step; the model is in eval mode."""
    torch.manual_seed(0)
    model = recipe.model()
    run = Run(recipe, data, model, recipe.optimizer(model.parameters()), steps, Meter(recipe, data))
    contender.begin(run)
    return run


def event(step, names, widths_, parameters):
    return {
        "step": step,
        "widths_after": dict(zip(names, widths_, strict=True)),
        "parameters_after": parameters,
        "rolled_back": False,
    }


def test_every_contender_trains_a_network_and_its_record_is_of_json_types(data):
    reference, _ = train(task(), data, Apoptosis(), evaluations=1)
    reference["events"] = [event(5, ["1", "3"], (16, 24), 6 * 16 + 16 + 16 * 24 + 24 + 50)]
    for name, entry in CONTENDERS.items():
        record, model = train(task(epochs=1), data, entry.make(reference))
        assert record["metric"] > 0.3, name
        assert record["parameters"] == sum(p.numel() for p in model.parameters())
        assert model(data.test_x).isfinite().all()


def test_rows_fold_batch_norm_in_and_columns_are_all_outgoing_weights(data):
    model = cnn().eval()
    model[2].running_mean.normal_()
    model[2].running_var.uniform_(0.5, 2)
    model[2].weight.data.normal_()
    group = groups_of(model, data.train_x[:8])["1"]
    patches = F.unfold(data.train_x[:4].view(4, 1, 2, 3), 3, padding=1)
    expected = model[2](model[1](data.train_x[:4].view(4, 1, 2, 3))).flatten(2)
    found = rows(model, group)
    torch.testing.assert_close(found[:, :-1] @ patches + found[:, -1:], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(columns(model, group), model[4].weight.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("model", [lambda: mlp(6, 64, 64, 2), cnn])
def test_hindsight_is_the_small_network_drawn_anew_and_train_able(data, model):
    names = list(groups_of(model(), data.train_x[:8]))
    small = dict(zip(names, (8, 12, 16), strict=False))
    recipe = task(model, epochs=1)
    run = begun(Narrow(small), recipe, data)
    assert widths(run.model) == list(small.values())
    for layer in run.model.modules():
        if isinstance(layer, nn.Linear):  # drawn for its own fan-in, not cut from the wide one
            limit = layer.in_features**-0.5
            assert 0.8 * limit < layer.weight.abs().max() <= limit
    assert run.meter.wall_s < 0.2  # tracing is not counted
    record, _ = train(recipe, data, Narrow(small))
    assert record["widths"] == list(small.values())


def test_merging_of_scaled_duplicates_is_exact_and_pruning_alone_is_not(data):
    torch.manual_seed(0)
    model = mlp(6, 8, 2).eval()
    with torch.no_grad():
        for i in range(4):
            model[1].weight[4 + i] = 0.5 * model[1].weight[i]
            model[1].bias[4 + i] = 0.5 * model[1].bias[i]
    before = model(data.test_x)
    keep, coeffs = merged(rows(model, groups_of(model, data.train_x[:8])["1"]), 4, 0.45)
    assert keep.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(coeffs, torch.cat([torch.eye(4), 0.5 * torch.eye(4)]))
    for cosine, exact in ((0.45, True), (1.0, False)):
        recipe = task(lambda: model_copy(model))
        contender = Merging({"events": [event(1, ["1"], (4,), 0)]}, cosine)
        run = begun(contender, recipe, data)
        contender.step(data.train_x, data.train_y)
        assert widths(run.model) == [4]
        assert torch.allclose(run.model(data.test_x), before, atol=1e-5) == exact


def model_copy(model):
    copy = mlp(6, 8, 2)
    copy.load_state_dict(model.state_dict())
    return copy


def test_merging_disturbs_a_trained_network_less_than_pruning_by_norm_does(data):
    """Kim et al. 2020, table 1: on LeNet-300-100, half of whose neurons go, without training on."""
    _, trained = train(task(), data, Contender())
    with torch.no_grad():
        before, changes = trained(data.test_x), []
        for cosine in (0.45, 1.0):
            copy = mlp(6, 64, 64, 2)
            copy.load_state_dict(trained.state_dict())
            contender = Merging({"events": [event(1, ["1", "3"], (32, 32), 0)]}, cosine)
            begun(contender, task(lambda copy=copy: copy), data)
            contender.step(data.train_x, data.train_y)
            changes.append(float((copy(data.test_x) - before).norm()))
    assert changes[0] < 0.9 * changes[1]


def test_weights_only_merges_planted_duplicates_and_finds_nothing_in_an_ordinary_network(data):
    contender = WeightsOnly()
    run = begun(contender, task(), data, steps=2000)
    x = data.test_x
    with torch.no_grad():
        for layer in (run.model[1], run.model[3]):
            layer.weight[32:] = 2 * layer.weight[:32]
            layer.bias[32:] = 2 * layer.bias[:32]
        before = run.model(x)
    contender.steps = min(contender.at) - 1
    assert contender.step(x, data.test_y) == {"1": 32, "3": 32}
    torch.testing.assert_close(run.model(x), before, atol=1e-5, rtol=1e-4)
    ordinary = WeightsOnly(share=0.01)
    begun(ordinary, task(lambda: mlp(32, 64, 64, 2)), wide_inputs(data), steps=2000)
    ordinary.steps = min(ordinary.at) - 1
    assert ordinary.step(x, data.test_y) is None
    assert event_steps(5000)[0] == Policy().start * 5000


def wide_inputs(data):
    return data._replace(train_x=torch.randn(64, 32), train_y=data.train_y[:64])


def test_group_lasso_starts_at_the_asked_ratio_and_ends_sparse_without_changing_the_output_by_removals(data):
    """Lym et al. 2019, eq. 3: the ratio of the penalty; figure 4: channels reach zero and stay there."""
    contender = GroupLasso(ratio=0.25)
    run = begun(contender, task(), data)
    loss = F.cross_entropy(run.model(data.train_x[:64]), data.train_y[:64]).item()
    penalty = contender.strength * float(sum(norms.sum() for norms in contender.norms()))
    assert penalty / (penalty + loss) == pytest.approx(0.25, rel=1e-4)

    class Watched(GroupLasso):
        changes = ()

        def remove_(self, keep, coeffs=None):
            before = self.run.model(data.test_x)
            found = super().remove_(keep, coeffs)
            self.changes = [*self.changes, float((self.run.model(data.test_x) - before).abs().max())]
            return found

    watched = Watched(ratio=0.5)
    record, _ = train(task(epochs=30), data, watched)
    assert record["parameters"] < 0.5 * sum(p.numel() for p in mlp(6, 64, 64, 2).parameters())
    assert record["metric"] > 0.9
    assert max(watched.changes) < 1e-3
    dense, _ = train(task(epochs=30), data, Contender())
    assert record["metric"] > dense["metric"] - 0.03


def test_dead_neurons_multiply_under_decay_and_their_removal_changes_nothing_on_the_data(data):
    """Dufort-Labbe et al. 2024: decay and noise raise the share of dead neurons, which go for free."""

    class Watched(DeadNeurons):
        changes = ()

        def calibration(self):
            return data.train_x, data.train_y

        def remove_(self, keep, coeffs=None):
            before = self.run.model.eval()(data.train_x)
            found = super().remove_(keep, coeffs)
            self.changes = [*self.changes, float((self.run.model(data.train_x) - before).abs().max())]
            self.run.model.train()
            return found

    watched = Watched()
    pushed, _ = train(task(epochs=20), data, watched)
    left_alone, _ = train(task(epochs=20), data, DeadNeurons(peak=0.0, noise=0.0))
    full = sum(p.numel() for p in mlp(6, 64, 64, 2).parameters())
    assert full - pushed["parameters"] > 2 * (full - left_alone["parameters"])
    assert pushed["metric"] > 0.9
    assert max(watched.changes) < 1e-4


def test_noise_moves_living_neurons_only(data):
    contender = DeadNeurons(peak=0.0, noise=1e-2)
    run = begun(contender, task(), data)
    with torch.no_grad():
        run.model[1].bias[:5] = -100  # dead
    run.model(data.train_x)
    before = run.model[1].weight.clone()
    contender.step(data.train_x, data.train_y)
    moved = (run.model[1].weight != before).any(1)
    assert not moved[:5].any()
    assert moved[5:].sum() > 50


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("model", [lambda: mlp(6, 64, 64, 2), cnn])
def test_torch_pruning_reaches_the_parameters_and_its_momentum_follows_the_weights(data, importance, model):
    target = sum(p.numel() for p in model().parameters()) // 2
    contender = TorchPruning({"events": [event(1, [], (), target)]}, importance)
    run = begun(contender, task(model), data)
    for parameter in run.model.parameters():  # a marked state: momentum equal to the weights
        run.optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    assert contender.step(data.train_x[:64], data.train_y[:64])
    left = list(run.model.parameters())
    assert 0.8 * target < sum(p.numel() for p in left) <= target
    assert [id(p) for group in run.optimizer.param_groups for p in group["params"]] == [id(p) for p in left]
    assert set(run.optimizer.state) == set(left)
    for parameter in left:
        assert torch.equal(run.optimizer.state[parameter]["momentum_buffer"], parameter)
    F.cross_entropy(run.model(data.train_x[:64]), data.train_y[:64]).backward()
    run.optimizer.step()
    assert widths(run.model)[-1] > 0


def test_torch_pruning_by_magnitude_removes_the_neurons_that_were_made_small(data):
    contender = TorchPruning({"events": [event(1, [], (), 6 * 32 + 32 + 32 * 64 + 64 + 130)]}, "magnitude")
    run = begun(contender, task(), data)
    with torch.no_grad():
        run.model[1].weight[::2] *= 1e-3
        run.model[3].weight[:, ::2] *= 1e-3
    large = run.model[1].weight[1::2].clone()
    contender.step(data.train_x, data.train_y)
    assert torch.equal(run.model[1].weight, large)


def test_the_reference_leaves_what_the_peers_follow():
    record = {"events": [event(3, ["a"], (9,), 5), {**event(7, ["a"], (4,), 2), "rolled_back": True}]}
    assert [e["step"] for e in removals(record)] == [3]
    assert final_widths(record) == {"a": 9}
    assert final_widths({"events": []}) == {}
    assert REFERENCE in CONTENDERS
