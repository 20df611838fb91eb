"""Dense training against apoptosis on several hosts, at several bandwidths. Needs root (network namespaces).

One JSON line per run in benchmarks/results/scale.jsonl: step time and bytes sent over the run, events, accuracy. A run
that the file already holds for the same commit is skipped, so an interrupted benchmark goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import MEASURED, append, conditions, records
from benchmarks.scale.network import INTERFACE, end_processes, network, within
from benchmarks.tasks import TASKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scale.jsonl"
RATES = {"unlimited": None, "1gbit": 1e9, "100mbit": 1e8}  # bits per second
CONTENDERS = ("dense", "apoptosis")
TORCHRUN = Path(sys.executable).with_name("torchrun")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="fashion-mlp")
    parser.add_argument("--hosts", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds that a run may take")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts are removed
    about = conditions([*MEASURED, "benchmarks/scale/train.py"])
    done = {key(record) for record in records(RESULTS)}
    for run in runs(args.task, args.hosts, args.rates, args.seeds, args.contenders):
        run |= {"max_steps": args.steps, **about}
        if key(run) in done:
            continue
        run |= measured(run, args.timeout)
        append(run, RESULTS)
        print(f"{run['hosts']} x {run['rate']} {run['contender']}: {run['total_s']:.1f} s, metric {run['metric']:.4f}")


def runs(
    task: str, hosts: Sequence[int], rates: Sequence[str], seeds: Sequence[int], contenders: Sequence[str] = CONTENDERS
) -> list[dict[str, Any]]:
    """What identifies each run, dense and apoptosis right after each other; one host has no network."""
    return [
        {"task": task, "hosts": number, "rate": rate, "seed": seed, "contender": contender}
        for seed in seeds
        for number in hosts
        for rate in (rates if number > 1 else ["unlimited"])
        for contender in contenders
    ]


def key(record: dict[str, Any]) -> tuple:
    """What makes a run the same run."""
    return tuple(record[name] for name in ("task", "hosts", "rate", "seed", "contender", "max_steps", "commit"))


def measured(run: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The first rank's record of a run, one rank on each host."""
    with tempfile.TemporaryDirectory() as folder, network(run["hosts"], RATES[run["rate"]]) as names:
        out = Path(folder) / "record.json"
        settings = [f"--{name}={run[name]}" for name in ("task", "contender", "seed")]
        settings += [] if run["max_steps"] is None else [f"--steps={run['max_steps']}"]
        launch(names, ["-m", "benchmarks.scale.train", str(out), *settings], timeout)
        return json.loads(out.read_text())


def launch(names: Sequence[str], script: Sequence[str], timeout: float) -> None:
    """torchrun on every host, one rank each; what it prints is kept in a file until then.

    Raises:
        RuntimeError: one of them failed, or took longer than `timeout` seconds; with the end of its log.
    """
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "examples", "."))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for i, name in enumerate(names):
            options = [f"--nnodes={len(names)}", "--nproc-per-node=1", f"--node-rank={i}", "--rdzv-backend=c10d"]
            command = [str(TORCHRUN), *options, "--rdzv-endpoint=host0:29500", *script]
            with (Path(folder) / name).open("w") as log:
                process = subprocess.Popen(within(name, command), cwd=ROOT, env=environment, stdout=log, stderr=log)
            processes.append(process)
        try:
            for name, process in zip(names, processes, strict=True):
                if process.wait(max(0.0, end - time.monotonic())) != 0:
                    raise RuntimeError(f"{name} failed:\n{(Path(folder) / name).read_text()[-4000:]}")
        except subprocess.TimeoutExpired as error:
            logs = "\n".join((Path(folder) / name).read_text()[-2000:] for name in names)
            raise RuntimeError(f"a run took more than {timeout:g} seconds:\n{logs}") from error
        finally:
            for name in names:
                end_processes(name)
            for process in processes:
                process.wait()


if __name__ == "__main__":
    main()
