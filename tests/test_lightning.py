"""The Lightning callback in real fits: accumulation, bf16, weight averaging, resume, two processes."""

import os

import pytest
import torch
from ranks import run
from torch.utils.data import DataLoader, TensorDataset
from trainers import POLICY, data, loss_fn, network, prepare_torchvision, run_example, same

from apoptorch import ArgumentError
from apoptorch.integrations import narrow_on_load

prepare_torchvision()
import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402

from apoptorch.integrations.lightning import ApoptosisCallback, inputs_and_targets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(*callbacks, steps=30, checkpoint=None, **settings):
    """30 steps of 32 inputs in two epochs of 15 batches (fewer with accumulation); the module and the trainer."""
    net, loader = Net(), DataLoader(TensorDataset(*data(480)), batch_size=32)
    settings = {"devices": 1, "max_steps": steps, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(net, loader, ckpt_path=checkpoint, weights_only=checkpoint is not None)
    return net, trainer


def widths(net):
    return [layer.out_features for layer in net.layers[::2]]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str)
def test_a_fit_shrinks_the_module(settings):
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    net, trainer = fit(callback, **settings)
    assert trainer.global_step == 30
    assert callback.apoptosis.total_steps == 30
    assert max(widths(net)[:2]) < 48
    assert [group.width for group in callback.apoptosis.groups] == widths(net)
    assert all(event.measured is not None for event in callback.apoptosis.history)


def test_the_loss_is_found_in_the_module():
    callback = ApoptosisCallback(policy=POLICY)
    Net.loss_fn = staticmethod(loss_fn)
    try:
        fit(callback, steps=2)
    finally:
        del Net.loss_fn
    assert callback.apoptosis.loss_fn is loss_fn


def test_a_further_fit_goes_on_and_another_module_begins_anew():
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    net, trainer = fit(callback, steps=8)
    reached, events = widths(net), len(callback.apoptosis.history)
    assert events
    trainer.fit_loop.epoch_loop.max_steps = 30
    trainer.fit(net, DataLoader(TensorDataset(*data(480)), batch_size=32))
    assert callback.apoptosis.state_dict()["step"] == 30
    assert len(callback.apoptosis.history) > events
    assert callback.apoptosis.groups[0].full_width == 48
    assert sum(widths(net)) < sum(reached)
    other, _ = fit(callback, steps=2)
    assert callback.apoptosis.model is other
    assert widths(other) == [48, 48, 2]
    assert callback.apoptosis.history == []


def test_accumulated_gradients_make_one_step():
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    net, _ = fit(callback, steps=14, accumulate_grad_batches=2)
    assert callback.apoptosis.state_dict()["step"] == 14
    assert callback.apoptosis.total_steps == 14
    assert max(widths(net)[:2]) < 48


def test_averaged_weights_shrink_alike():
    average = EMAWeightAveraging(decay=0.9)
    net, _ = fit(average, ApoptosisCallback(loss_fn, policy=POLICY))
    assert widths(average._average_model.module) == widths(net)
    assert max(widths(net)[:2]) < 48


def test_resuming_ends_where_the_whole_run_ends_and_loads_elsewhere(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=15)
    whole, _ = fit(saver, ApoptosisCallback(loss_fn, policy=POLICY), enable_checkpointing=True)
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    resumed, _ = fit(callback, checkpoint=tmp_path / "step=15.ckpt")
    assert callback.apoptosis.history[0].step < 15
    assert callback.apoptosis.groups[0].full_width == 48
    assert same(resumed, whole)
    saved = torch.load(tmp_path / "step=30.ckpt", weights_only=True)["state_dict"]
    fresh = narrow_on_load(Net())
    fresh.load_state_dict(saved)
    assert widths(fresh) == widths(whole)
    assert same(fresh, whole)


@pytest.mark.parametrize("order", [1, -1], ids=["average first", "average last"])
def test_resuming_with_averaged_weights_ends_where_the_whole_run_ends(tmp_path, order):
    """The checkpoint holds the average as the module's weights, and the trained ones beside it: both are narrow."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=15)
    averages = [EMAWeightAveraging(decay=0.9) for _ in range(2)]
    callbacks = [ApoptosisCallback(loss_fn, policy=POLICY) for _ in range(2)]
    whole, _ = fit(*(averages[0], callbacks[0])[::order], saver, enable_checkpointing=True)
    resumed, _ = fit(*(averages[1], callbacks[1])[::order], checkpoint=tmp_path / "step=15.ckpt")
    assert callbacks[1].apoptosis.history[0].step < 15
    assert max(widths(resumed)[:2]) < 48
    assert same(resumed, whole)
    assert same(*(average._average_model for average in averages))


def in_ddp(rank):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    net, _ = fit(callback, strategy="ddp", devices=2, steps=14)
    return widths(net), [p.detach() for p in net.parameters()]


def test_two_processes_end_with_one_narrow_network():
    (one, first), (other, second) = run(2, in_ddp)
    assert one == other
    assert max(one[:2]) < 48
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_that_say_what_they_are():
    x, y = data(4)
    assert inputs_and_targets((x, y)) == (x, y)
    assert inputs_and_targets({"a": x, "labels": y}) == ({"a": x}, y)
    assert inputs_and_targets({"a": x}) == ({"a": x}, None)
    assert inputs_and_targets(x) == (x, None)
    with pytest.raises(ArgumentError, match="function that returns"):
        inputs_and_targets((x, y, y))


def test_the_example_runs(capsys):
    shown = run_example("with_lightning.py", capsys)
    assert " channels, last at step " in shown
