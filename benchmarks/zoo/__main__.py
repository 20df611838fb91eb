"""Examine every model of the zoo, one JSON line per model and contender in benchmarks/results/zoo.jsonl.

Each runs in a process of its own, which is killed at the limit. What the file already holds for the same commit (and,
for Torch-Pruning, the same version of it) is skipped, so an interrupted run goes on. Then docs/coverage.md is written.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import subprocess
import time
import warnings
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .contenders import CONTENDERS
from .page import page
from .registry import ZOO, import_sources

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
MEASURED = ["src", "benchmarks/zoo", "tests/planted.py"]
SECONDS = {"apoptorch": 1800, "torch-pruning": 60}  # wall
MEMORY = 12 << 30


def records() -> list[dict[str, Any]]:
    """All that was measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def commit() -> str:
    """The last commit that touched what is measured; "-dirty" if the working tree differs."""
    last = _git("log", "-1", "--format=%h", "--", *MEASURED)
    return last + ("-dirty" if _git("status", "--porcelain", "--", *MEASURED) else "")


def examine(name: str, contender: str) -> dict[str, Any]:
    """All that one contender's stages found, and `error` if one failed or did not return in time."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, contender, theirs), daemon=True)
    process.start()
    theirs.close()
    found, end = {}, time.monotonic() + SECONDS[contender]
    while ours.poll(max(0.0, end - time.monotonic())):
        try:
            found |= ours.recv()
        except EOFError:
            break
    if process.is_alive() and time.monotonic() >= end:
        found["error"] = f"did not return within {SECONDS[contender]} s"
    process.kill()
    process.join()
    if "done" not in found and "error" not in found:
        found["error"] = f"the process died (exit code {process.exitcode})"
    return found


def _work(name: str, contender: str, pipe: Connection) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seconds = math.ceil(SECONDS[contender])  # also where nobody is left to end it
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    try:
        for found in CONTENDERS[contender](ZOO[name]):
            pipe.send(found)
        pipe.send({"done": True})
    except Exception as error:  # whatever a model, or a contender, raises: it is what is to be found out
        text = " ".join(str(error).split())[:300]
        pipe.send({"error": f"{type(error).__name__}: {text}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=ZOO, default=list(ZOO), metavar="MODEL", help="default: all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {**import_sources(), "torch": torch.__version__}
    at = {"apoptorch": commit(), "torch-pruning": version("torch-pruning")}
    done = set() if args.fresh else {(r["model"], r["contender"], r["version"]) for r in records()}
    RESULTS.parent.mkdir(exist_ok=True)
    for name in args.models:
        for contender in args.contenders:
            if (name, contender, at[contender]) in done:
                continue
            start = time.monotonic()
            run = {"model": name, "contender": contender, "version": at[contender], **examine(name, contender)}
            run |= {"wall_s": round(time.monotonic() - start, 1), "versions": versions}
            with RESULTS.open("a") as file:
                file.write(json.dumps(run) + "\n")
            keys = ("error", "prunable", "planted_problems", "halved_problems", "trace_s", "wall_s")
            print(name, contender, {key: run[key] for key in keys if run.get(key)}, flush=True)
    PAGE.write_text(page(records()))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
