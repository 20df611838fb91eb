"""Train a wide network on Fashion-MNIST twice, dense and with apoptosis, and compare."""

import argparse

import datasets
import torch
from comparison import Meter, Task, accuracy, batches, mlp, ratio, sgd, warm_up
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import apoptorch


def train(contender: str, task: Task, data: datasets.Split, seed: int) -> dict:
    """One run, "dense" or "apoptosis"; returns what it cost and reached."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    total_steps = task.epochs * (len(data.train_x) // task.batch)
    example = data.train_x[: task.batch]
    meter = Meter(task, data)

    model = task.model()
    optimizer = task.optimizer(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, total_steps)
    if contender == "apoptosis":
        # ---- apoptorch, line 1 of 2 ----
        apoptosis = apoptorch.Apoptosis(
            model, optimizer, example_inputs=example, loss_fn=cross_entropy, total_steps=total_steps
        )

    for epoch in range(task.epochs):
        for x, y in batches(data, task.batch, order):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if contender == "apoptosis":
                # ---- apoptorch, line 2 of 2 ----
                apoptosis.step(x, targets=y)
            meter.step(model)
        test = meter.evaluate(model)
        print(f"{contender}: epoch {epoch + 1}, loss {loss.item():.3f}, test accuracy {test:.4f}, {meter.wall_s:.1f} s")
    return meter.summary(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--data", help="directory with the four .gz files, see examples/datasets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = datasets.fashion_mnist(args.data)
    task = Task(
        model=lambda: mlp(784, args.width, args.width, args.width, 10),
        optimizer=sgd,
        loss_fn=cross_entropy,
        metric=accuracy,
        batch=128,
        epochs=args.epochs,
    )
    warm_up(task, data)
    dense, ours = (train(contender, task, data, args.seed) for contender in ("dense", "apoptosis"))
    gain = ratio(dense, ours)
    print(f"\n{'':16}{'dense':>14}{'apoptosis':>14}{'ratio':>10}")
    for key, form in (("wall_s", ".1f"), ("train_flops", ".3g"), ("parameters", ",")):
        print(f"{key:16}{dense[key]:>14{form}}{ours[key]:>14{form}}{gain[key]:>9.2f}x")
    print(f"{'test accuracy':16}{dense['metric']:>14.4f}{ours['metric']:>14.4f}{gain['metric']:>+10.4f}")
    print(f"widths: {dense['widths']} -> {ours['widths']}")


if __name__ == "__main__":
    main()
