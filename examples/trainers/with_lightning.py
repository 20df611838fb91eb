"""Neuron apoptosis in Lightning: one callback; --devices=2: on two ranks."""

import argparse

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apoptorch import Policy
from apoptorch.integrations.lightning import ApoptosisCallback


class Net(pl.LightningModule):
    def __init__(self, width: int = 256):
        super().__init__()
        self.loss_fn = nn.CrossEntropyLoss()
        self.layers = nn.Sequential(
            nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss_fn(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    devices = parser.parse_known_args()[0].devices
    pl.seed_everything(0)
    x = torch.randn(12_800, 20)
    data = DataLoader(TensorDataset(x, (x[:, 0] > x[:, 1]).long()), batch_size=64, shuffle=True)
    callback = ApoptosisCallback(
        policy=Policy(payback=0, full_run=1, first_step=30)
    )  # else so short a run is left alone
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback], accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), data)
    if trainer.is_global_zero:
        print(f"{trainer.world_size} ranks\n{callback.apoptosis.explain()}")


if __name__ == "__main__":
    main()
