"""Measure the core recipes, dense and with apoptosis, one JSON line per run in benchmarks/results/core.jsonl.

A run that the file already holds for the same commit is skipped, so an interrupted benchmark goes on.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from comparison import Apoptosis, Contender, train, warm_up
from datasets import Split

from benchmarks.tasks import TASKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "core.jsonl"
MEASURED = [
    "src",
    "examples/comparison.py",
    "examples/datasets",
    "benchmarks/core.py",
    "benchmarks/tasks.py",
]
CONTENDERS = {"dense": Contender, "apoptosis": Apoptosis}
THREADS = 2
EVALUATIONS = 4  # points of the metric's curve per epoch
SAME_TIME, SOONER = "fashion-mlp-same-time", "time-to-dense-accuracy"  # both stretch fashion-mlp
SOONER_EPOCHS = (6, 7)


def commit(measured: Sequence[str] = MEASURED) -> str:
    """The last commit that touched what is measured; "-dirty" if the working tree differs."""
    last = _git("log", "-1", "--format=%h", "--", *measured)
    return last + ("-dirty" if _git("status", "--porcelain", "--", *measured) else "")


def conditions(measured: Sequence[str] = MEASURED) -> dict[str, object]:
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    vectors = torch.backends.cpu.get_cpu_capability()  # a virtual machine's model name may be "AMD EPYC" for several
    machine = {"cpu": cpu, "vectors": vectors, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"commit": commit(measured), "machine": machine, **versions}


def records(results: Path | None = None) -> list[dict]:
    """All runs measured so far."""
    results = results or RESULTS
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(run: dict, results: Path) -> None:
    """Add a run to those measured."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(run) + "\n")


def plan(tasks: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    """(task, contender, seed), the two contenders of a seed right after each other."""
    for task in tasks:
        for seed in seeds:
            for contender in CONTENDERS if task in TASKS else ("apoptosis",):
                yield task, contender, seed


def schedules(task: str, seed: int, now: str) -> tuple[int, ...]:
    """For how many epochs to train: the recipe's, or derived from the fashion-mlp runs of the same seed."""
    if task in TASKS:
        return (TASKS[task][0].epochs,)
    if task == SOONER:
        return SOONER_EPOCHS
    base = {r["contender"]: r for r in records() if (r["task"], r["seed"], r["commit"]) == ("fashion-mlp", seed, now)}
    if len(base) < 2:
        raise SystemExit(f"{task} must follow fashion-mlp, got no run of seed {seed}. Add fashion-mlp to --tasks.")
    return (int(base["dense"]["epochs"] * base["dense"]["wall_s"] / base["apoptosis"]["wall_s"]),)


def key(record: dict) -> tuple:
    """What makes a run the same run."""
    return tuple(record[name] for name in ("task", "contender", "seed", "epochs", "commit"))


@cache
def loaded(load: Callable[[], Split]) -> Split:
    """The data set, read once."""
    return load()


def main() -> None:
    names = [*TASKS, SAME_TIME, SOONER]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--fresh", action="store_true", help="measure again what is there for this commit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = conditions()
    done = set() if args.fresh else {key(record) for record in records()}
    for name, contender, seed in plan(args.tasks, args.seeds):
        recipe, load = TASKS.get(name, TASKS["fashion-mlp"])
        for epochs in schedules(name, seed, about["commit"]):
            run = {"task": name, "contender": contender, "seed": seed, "epochs": epochs, **about}
            if key(run) in done:
                continue
            data = loaded(load)
            run["examples"] = len(data.train_x)
            warm_up(recipe, data)
            run |= train(replace(recipe, epochs=epochs), data, CONTENDERS[contender](), seed, EVALUATIONS)[0]
            append(run, RESULTS)
            shown = ("wall_s", "metric", "parameters", "widths")
            print(name, contender, f"seed {seed}, {epochs} epochs:", {k: run[k] for k in shown}, flush=True)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
