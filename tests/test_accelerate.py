"""Apoptosis in accelerate's loop: accumulation, bf16, averaged weights, save_state and load_state, two processes."""

import os

import pytest
import torch
from ranks import run
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from trainers import POLICY, data, loss_fn, network, prepare_torchvision, run_example, same

prepare_torchvision()
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402

from apoptorch.integrations.accelerate import AcceleratedApoptosis  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A loop of accelerate over 30 batches; `accumulate` of them make an optimizer step."""

    def __init__(self, accumulate=1, precision="no"):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(TensorDataset(*data(960)), batch_size=32)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.net = self.accelerator.unwrap_model(self.model)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.steps = AcceleratedApoptosis(
            self.accelerator, self.model, self.optimizer, example_inputs=data(32)[0], loss_fn=loss_fn,
            total_steps=30 // accumulate, policy=POLICY, followers=[self.average.module],
        )  # fmt: skip
        self.accelerator.register_for_checkpointing(self.average)

    def train(self, first=0, last=30):
        for i, (x, y) in enumerate(self.loader):
            if not first <= i < last:
                continue
            with self.accelerator.accumulate(self.model):
                loss = loss_fn(self.model(x), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.steps.step(x, targets=y)
            self.average.update_parameters(self.net)
        return self

    @property
    def widths(self):
        return [layer.out_features for layer in self.net[::2]]


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_a_loop_shrinks_the_model(accumulate, precision):
    done = Run(accumulate, precision).train()
    assert done.steps.state_dict()["step"] == 30 // accumulate
    assert max(done.widths[:2]) < 48
    assert [group.width for group in done.steps.apoptosis.groups] == done.widths
    assert done.model(data(8)[0]).dtype == torch.float32
    assert [layer.out_features for layer in done.average.module[::2]] == done.widths


def test_save_state_and_load_state_resume_the_run(tmp_path):
    whole = Run().train()
    half = Run().train(0, 15)
    half.accelerator.save_state(tmp_path)
    resumed = Run()
    resumed.accelerator.load_state(tmp_path)
    assert resumed.widths == half.widths
    assert max(half.widths[:2]) < 48
    assert same(resumed.net, half.net)
    resumed.train(15, 30)
    assert same(resumed.net, whole.net)
    assert same(resumed.average, whole.average)


def in_ddp(rank):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    done = Run().train(0, 15)
    wrapped = type(done.model).__name__
    return wrapped, PartialState().num_processes, done.widths, [p.detach() for p in done.net.parameters()]


def test_two_processes_end_with_one_narrow_network():
    first, second = run(2, in_ddp)
    assert first[:2] == second[:2] == ("DistributedDataParallel", 2)
    assert first[2] == second[2]
    assert max(first[2][:2]) < 48
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))


def test_the_example_runs(capsys):
    shown = run_example("with_accelerate.py", capsys)
    assert " channels, last at step " in shown
