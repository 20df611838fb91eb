"""Choose learning rate and weight decay of the dense networks, on a tenth of the training data held out.

Every setting tried is a JSON line in benchmarks/results/tuning.jsonl and is not tried again, so an interrupted search
goes on. A task whose settings have all been tried has the best of them written to benchmarks/recipes.json.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from comparison import Contender, train
from datasets import validation

from benchmarks import suite
from benchmarks.core import ROOT, THREADS, append, conditions, records

RESULTS = ROOT / "benchmarks" / "results" / "tuning.jsonl"
RATES = (1 / 3, 1.0, 3.0)  # times the recipe's learning rate
DECAYS = (0.1, 10.0)  # times its weight decay
FIXED = ("optimizer", "batch", "epochs", "examples")


def grid(name: str, done: Mapping[tuple[Any, ...], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The settings to try, around where the recipe began: the rates, then, at the best of them, the decays.

    The decays are asked for when the rates are among those `done`.
    """
    recipe = suite.recipe(name)
    start = (recipe["tuned"] or {}).get("around", recipe)

    def settings(rate: float, decay: float) -> dict[str, Any]:
        lr, weight_decay = start["lr"] * rate, start["weight_decay"] * decay
        return recipe | {"lr": float(f"{lr:.2g}"), "weight_decay": float(f"{weight_decay:.2g}")}

    yield from (settings(rate, 1.0) for rate in RATES)
    best = max(RATES, key=lambda rate: done[key(name, settings(rate, 1.0))]["validation"])
    yield from (settings(best, decay) for decay in DECAYS)


def key(name: str, settings: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a trial the same trial."""
    return (name, *(settings[part] for part in (*FIXED, "lr", "weight_decay")))


def choose(name: str, tried: list[dict[str, Any]]) -> None:
    """Write the best of the tried settings to the recipe."""
    best = max(tried, key=lambda trial: trial["validation"])
    recipes = json.loads(suite.RECIPES.read_text())
    start = (recipes[name]["tuned"] or {}).get("around") or {k: recipes[name][k] for k in ("lr", "weight_decay")}
    recipes[name] |= {k: best["settings"][k] for k in ("lr", "weight_decay")}
    recipes[name]["tuned"] = {"settings": len(tried), "validation": round(best["validation"], 5), "around": start}
    lines = [f" {json.dumps(task)}: {json.dumps(recipe)}" for task, recipe in recipes.items()]
    suite.RECIPES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, benchmark in suite.BENCHMARKS.items() if not benchmark.full_size]
    parser.add_argument("--tasks", nargs="+", choices=list(suite.BENCHMARKS), default=names)
    parser.add_argument("--hours", type=float, default=8, help="begin no trial after so long")
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 3600 * args.hours
    for name in args.tasks:
        done = {key(trial["task"], trial["settings"]): trial for trial in records(RESULTS)}
        data = None
        for settings in grid(name, done):
            if key(name, settings) in done:
                continue
            if time.monotonic() > deadline:
                print("time is up; call again to go on", flush=True)
                return
            data = data or validation(suite.load(name, settings))
            summary, _ = train(suite.task(name, settings), data, Contender())
            trial = {"task": name, "settings": settings, "validation": summary["metric"], **conditions()}
            append(trial, RESULTS)
            done[key(name, settings)] = trial
            print(name, settings["lr"], settings["weight_decay"], round(summary["metric"], 5), flush=True)
        choose(name, [done[key(name, settings)] for settings in grid(name, done)])


if __name__ == "__main__":
    main()
