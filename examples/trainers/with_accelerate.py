"""Neuron apoptosis in a loop that accelerate runs; torchrun --nproc-per-node=2 with_accelerate.py: on two ranks."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apoptorch import Policy
from apoptorch.integrations.accelerate import AcceleratedApoptosis


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x = torch.randn(12_800, 20)
    data = DataLoader(TensorDataset(x, (x[:, 0] > x[:, 1]).long()), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data)
    loss_fn = nn.CrossEntropyLoss()
    apoptosis = AcceleratedApoptosis(
        accelerator, model, optimizer, example_inputs=x[:64], loss_fn=loss_fn, total_steps=2 * len(data) // 2,
        policy=Policy(payback=0, full_run=1, first_step=30),  # else so short a run is left alone
    )  # fmt: skip
    for _ in range(2):
        for inputs, targets in data:
            with accelerator.accumulate(model):
                loss = loss_fn(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                apoptosis.step(inputs, targets=targets)
    accelerator.print(f"{accelerator.num_processes} ranks\n{apoptosis.apoptosis.explain()}")


if __name__ == "__main__":
    main()
