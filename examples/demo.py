"""Train an over-provisioned network on collision events twice, dense and with apoptosis, and compare.

Writes runs/demo: summary.json, history.json and widths.png.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import datasets
import torch.nn.functional as F
from comparison import Apoptosis, Contender, Meter, Task, auc, mlp, ratio, train, warm_up, widths
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import nn
from torch.optim import AdamW

from apoptorch.report.figures import save_comparison
from apoptorch.report.terminal import history_table


class Progress:
    """Shows a run while it trains: a table that stays in place, or a line now and then if there is no terminal."""

    def __init__(self, console: Console, total_steps: int):
        self.console, self.total_steps = console, total_steps
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.pause = 0.25 if self.live else 5.0
        self.rows: dict[str, tuple[str, ...]] = {}
        self.dense_wall_s: list[float] = []
        self.shown = 0.0

    def __call__(self, contender: str, model: nn.Module, loss: float, meter: Meter) -> None:
        """Note one training step; drawn only every `pause` seconds."""
        if contender == "dense":
            self.dense_wall_s.append(meter.wall_s)
        if time.perf_counter() - self.shown < self.pause and meter.steps < self.total_steps:
            return
        self.shown = time.perf_counter()
        saved = self.dense_wall_s[meter.steps - 1] - meter.wall_s
        self.rows[contender] = (
            contender,
            f"{meter.steps:,} / {self.total_steps:,}",
            f"{loss:.3f}",
            f"{meter.curve[-1][1]:.4f}" if meter.curve else "-",
            " ".join(map(str, widths(model))),
            f"{meter.wall_s:.1f} s",
            "-" if contender == "dense" else f"{saved:.1f} s",
        )
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            print(
                "{}: step {}, loss {}, AUC {}, widths {}, {}, saved {}".format(*self.rows[contender]),
                flush=True,
            )

    def table(self) -> Table:
        """Both runs as they stand."""
        table = Table("run", "step", "loss", "test AUC", "widths", "time", "saved so far")
        for row in self.rows.values():
            table.add_row(*row)
        return table

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()


def result_table(summary: dict[str, dict[str, float]]) -> Table:
    """dense, apoptosis and their ratio, number by number."""
    table = Table("", "dense", "apoptosis", "dense / apoptosis", title="what was gained")
    dense, ours, gain = summary["dense"], summary["apoptosis"], summary["ratio"]
    for key, label, form in (
        ("wall_s", "wall seconds", "{:.1f}"),
        ("train_flops", "training FLOPs", "{:.3g}"),
        ("parameters", "parameters", "{:,}"),
    ):
        table.add_row(label, form.format(dense[key]), form.format(ours[key]), f"{gain[key]:.2f}x")
    table.add_row("test AUC", f"{dense['metric']:.4f}", f"{ours['metric']:.4f}", f"{gain['metric']:+.4f}")
    return table


def recipe(width: int, epochs: int) -> Task:
    """Three hidden layers, far wider than the task needs."""
    return Task(
        model=lambda: mlp(28, width, width, width, 1),
        optimizer=partial(AdamW, lr=3e-3),
        loss_fn=F.binary_cross_entropy_with_logits,
        metric=auc,
        batch=512,
        epochs=epochs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="as in examples/datasets; the bundled higgs-sim sample by default")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    data = datasets.higgs(args.data)
    task = recipe(args.width, args.epochs)
    total_steps = task.epochs * (len(data.train_x) // task.batch)
    console, runs = Console(), {}
    contenders = {"dense": Contender(), "apoptosis": Apoptosis()}
    warm_up(task, data)
    with Progress(console, total_steps) as progress:
        for name, contender in contenders.items():
            runs[name], _ = train(task, data, contender, args.seed, 2, partial(progress, name))
    history = contenders["apoptosis"].history
    keys = ("wall_s", "train_flops", "parameters", "metric")
    summary = {name: {key: run[key] for key in keys} for name, run in runs.items()}
    summary["ratio"] = ratio(runs["dense"], runs["apoptosis"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    (args.out / "history.json").write_text(json.dumps([event.to_json() for event in history], indent=1))
    curves = {name: run["curve"] for name, run in runs.items()}
    save_comparison(args.out / "widths.png", history, curves, "test AUC", total_steps)
    console.print(history_table(history), result_table(summary))
    console.print(f"written: {args.out}/summary.json, history.json, widths.png")


if __name__ == "__main__":
    main()
