"""Neuron apoptosis on several ranks: torchrun --nproc-per-node=2 with_ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptorch import Apoptosis, Policy


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    )
    optimizer, loss_fn = torch.optim.AdamW(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()
    torch.manual_seed(dist.get_rank())  # each rank has its own data
    x = torch.randn(6_400, 20)
    batches = list(zip(x.split(64), (x[:, 0] > x[:, 1]).long().split(64), strict=True))
    apoptosis = Apoptosis(
        model, optimizer, example_inputs=x[:64], loss_fn=loss_fn, total_steps=2 * len(batches),
        policy=Policy(payback=0, full_run=1, first_step=30),  # else so short a run is left alone
    )  # fmt: skip
    for inputs, targets in batches * 2:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        apoptosis.step(inputs, targets=targets)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks\n{apoptosis.explain()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
