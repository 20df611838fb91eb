"""Measure every contender on every task, one JSON line per run in benchmarks/results/full.jsonl.

A run that the file already holds for the same commit is skipped, and none is begun after --hours: what was interrupted
goes on when called again. --quick: small shares of the data, few epochs, into runs/bench-quick, in ten minutes.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from comparison import Task, train, warm_up
from datasets import Split
from torch import nn

from benchmarks import suite
from benchmarks.contenders import CONTENDERS, REFERENCE, SAME_TIME, SEARCH
from benchmarks.contenders.channels import final_widths
from benchmarks.core import MEASURED, ROOT, THREADS, append, conditions, records
from benchmarks.search import search

RESULTS = ROOT / "benchmarks" / "results" / "full.jsonl"
QUICK_RESULTS = ROOT / "runs" / "bench-quick" / "quick.jsonl"
ALSO_MEASURED = ["benchmarks/contenders", "benchmarks/models.py", "benchmarks/search.py", "benchmarks/full.py"]
QUICK = {"higgs-relu": (40_000, 4), "lenet-300-100": (20_000, 4), "lenet-5": (4_000, 3), "char-transformer": (600, 2)}
EVALUATIONS = 4  # points of the metric's curve per epoch
SEEDS = 3


def settings(name: str, quick: bool) -> dict[str, Any]:
    """The task's recipe; for --quick with few examples and epochs."""
    recipe = suite.recipe(name)
    return recipe | dict(zip(("examples", "epochs"), QUICK[name], strict=True)) if quick else recipe


def plan(tasks: list[str], contenders: list[str], seeds: int) -> Iterator[tuple[int, str, str]]:
    """(seed, task, contender): one seed of everything before the next; of each task the reference early."""
    ordered = sorted(contenders, key=lambda name: (name not in ("dense", REFERENCE), list(CONTENDERS).index(name)))
    for seed in range(seeds):
        for task in tasks:
            for contender in ordered:
                yield seed, task, contender


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a run the same run."""
    return (*(run[name] for name in ("task", "contender", "seed", "commit")), str(run["recipe"]))


def measure(name: str, task: Task, data: Split, seed: int, reference: dict[str, Any] | None) -> dict[str, Any]:
    """One run of one contender; `reference`: the seed's run with apoptosis, None while that is to be measured, with the
    dense one as `dense`.

    Adds `inference_s`, seconds for 1,000 test examples, and `peak_memory_mb`, the process's largest resident set
    during the run (its data included).
    """
    warm_up(task, data)
    reset_peak_memory()
    if name == SAME_TIME and reference is not None:
        longer = reference["dense"]["wall_s"] / reference["wall_s"]
        task = replace(task, epochs=max(task.epochs, int(0.95 * task.epochs * longer)))
    if name == SEARCH and reference is not None:
        summary, model = search(task, data, final_widths(reference), reference["wall_s"], seed, EVALUATIONS)
    else:
        summary, model = train(task, data, CONTENDERS[name].make(reference or {}), seed, EVALUATIONS)
    memory = {"peak_memory_mb": peak_memory_mb()}
    return summary | memory | {"inference_s": inference_seconds(model, data, task.batch)}


def attempt(name: str, task: Task, data: Split, seed: int, reference: dict[str, Any] | None) -> dict[str, Any]:
    """`measure`; a contender that can't do the task must not end the benchmark: its record says `error` instead."""
    if reference is None and CONTENDERS[name].follows:
        return {"error": f"no run of {REFERENCE} to follow"}
    try:
        return measure(name, task, data, seed, reference)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


@torch.no_grad()
def inference_seconds(model: nn.Module, data: Split, batch: int) -> float:
    """Seconds for 1,000 test examples in batches of the training's size: the median of five passes."""
    parts = data.test_x[:1000].split(batch)
    count, passes = sum(len(part) for part in parts), []
    model.eval()
    for _ in range(6):
        start = time.perf_counter()
        for part in parts:
            model(part)
        passes.append(time.perf_counter() - start)
    return median(passes[1:]) * 1000 / count


def reset_peak_memory() -> None:
    """On Linux the process's peak starts anew; elsewhere it stays what it was."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float | None:
    """The largest resident set since `reset_peak_memory`; None where the system doesn't say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


@cache
def loaded(name: str, quick: bool) -> Split:
    """The task's data, read once."""
    return suite.load(name, settings(name, quick))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = [name for name, benchmark in suite.BENCHMARKS.items() if not benchmark.full_size]
    parser.add_argument(
        "--tasks", nargs="+", choices=list(suite.BENCHMARKS), help="default: all but the full-size ones"
    )
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, help=f"how many, {SEEDS} by default (1 with --quick)")
    parser.add_argument("--hours", type=float, help="begin no run after so long (8; with --quick 1/6)")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--quick", action="store_true", help="ten minutes: four tasks, small shares of the data")
    args = parser.parse_args()
    args.tasks = args.tasks or (list(QUICK) if args.quick else sizes)
    args.seeds = args.seeds or (1 if args.quick else SEEDS)
    args.hours = args.hours or (1 / 6 if args.quick else 8)
    if args.quick and set(args.tasks) - set(QUICK):
        parser.error(f"with --quick, --tasks must be among {', '.join(QUICK)}")
    if REFERENCE not in args.contenders:
        parser.error(f"--contenders must include {REFERENCE}: the peers get its size, its steps or its time")
    if SAME_TIME in args.contenders and "dense" not in args.contenders:
        parser.error(f"--contenders must include dense: {SAME_TIME} gets its time")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    results, about = QUICK_RESULTS if args.quick else RESULTS, conditions([*MEASURED, *ALSO_MEASURED])
    done = {key(run): run for run in records(results)}
    deadline = time.monotonic() + 3600 * args.hours
    references: dict[tuple[str, int], dict[str, Any]] = {}
    for seed, name, contender in plan(args.tasks, args.contenders, args.seeds):
        chosen = settings(name, args.quick)
        run = {"task": name, "contender": contender, "seed": seed, "recipe": chosen, **about}
        if key(run) not in done:
            if time.monotonic() > deadline:
                print("time is up; call again to go on", flush=True)
                return
            data = loaded(name, args.quick)
            run["examples"] = len(data.train_x)
            run |= attempt(contender, suite.task(name, chosen), data, seed, references.get((name, seed)))
            append(run, results)
            done[key(run)] = run
            shown = [f"{k} {run[k]:.5g}" for k in ("wall_s", "metric", "parameters") if k in run]
            print(f"{name}, {contender}, seed {seed}: {run.get('error') or ', '.join(shown)}", flush=True)
        if contender == REFERENCE and "error" not in done[key(run)]:
            references[name, seed] = done[key(run)] | {"dense": done.get(key(run | {"contender": "dense"}), {})}


if __name__ == "__main__":
    main()
