"""One network trained twice on generated data, dense and with apoptosis: what `apoptorch demo` shows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .apoptosis import Apoptosis
from .report import Recorder

BATCH, FEATURES, CLASSES = 128, 20, 4


def compare(
    out: Path, width: int, steps: int, seed: int, show: Callable[[str], Any] | None = None
) -> dict[str, dict[str, float]]:
    """Train both, write the history and the report of the second into `out`; seconds, parameters, accuracy of each."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for name in ("dense", "apoptosis"):
        summary[name] = _train(name, width, steps, seed, out, show)
    return summary


def _network(width: int) -> nn.Sequential:
    hidden = (nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), *hidden, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def _teacher(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of inputs and of the classes that a small random network sees in them."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(FEATURES, 12, generator=generator)
    second = torch.randn(12, CLASSES, generator=generator)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, FEATURES, generator=generator)
        return x, ((x @ first).relu() @ second).argmax(1)

    return batch


def _train(
    name: str, width: int, steps: int, seed: int, out: Path, show: Callable[[str], Any] | None
) -> dict[str, float]:
    batch = _teacher(seed)
    test_x, test_y = batch(4096)
    torch.manual_seed(seed)
    model = _network(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start, recorder, apoptosis = time.perf_counter(), None, None
    if name == "apoptosis":
        apoptosis = Apoptosis(
            model, optimizer, example_inputs=batch(BATCH)[0], loss_fn=cross_entropy, total_steps=steps
        )
        recorder = Recorder(apoptosis)
    for step in range(1, steps + 1):
        x, y = batch(BATCH)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if apoptosis is not None and recorder is not None:
            apoptosis.step(x, targets=y)
            recorder.step(loss=loss)
        if show is not None and step % max(1, steps // 5) == 0:
            widths = [m.out_features for m in model if isinstance(m, nn.Linear)][:-1]
            show(f"{name}: step {step} of {steps}, loss {loss.item():.3f}, widths {widths}, "
                 f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    seconds = time.perf_counter() - start
    if recorder is not None:
        recorder.write(out)
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
    return {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters()), "accuracy": accuracy}
