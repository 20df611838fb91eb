"""The commands of docs/distributed.md, as they stand there; `host0` is this machine."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
COMMANDS = re.findall(r"^    ((?:torchrun|python) .*)$", PAGE, re.MULTILINE)


def on_every_node(command, port):
    """The command of each machine, all on this one."""
    command = command.replace("host0:29500", f"localhost:{port}")
    nodes = int((re.search(r"--nnodes=(\d+)", command) or [0, 1])[1])
    return [command.replace("--node-rank=0", f"--node-rank={node}") for node in range(nodes)]


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{shlex.split(c)[0]}{i}" for i, c in enumerate(COMMANDS)])
def test_the_command_trains_and_removes_neurons_on_two_ranks(command, tmp_path, port):
    # Now and then torch aborts or hangs at exit, also without apoptorch, if Python ends before DDP's reducer has gone.
    first = "import atexit, gc\n\natexit.register(gc.collect)\n"
    if "with_ddp" not in command:  # trainers look at torchvision, whose binary may not fit this torch
        first += "import trainers\n\ntrainers.prepare_torchvision()\n"
    (tmp_path / "sitecustomize.py").write_text(first)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if command.startswith("python"):  # torchrun finds a port of its own, and keeps it
        environment["MASTER_PORT"] = str(port)
    processes = []
    for line in on_every_node(command, port):
        program, *arguments = shlex.split(line)
        program = sys.executable if program == "python" else str(Path(sys.executable).with_name(program))
        processes.append(
            subprocess.Popen(
                [program, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, start_new_session=True,
            )
        )  # fmt: skip
    found = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), found
    shown = "".join(out for out, _ in found)
    assert re.findall(r"^(\d+) ranks$", shown, re.MULTILINE) == ["2"]  # one rank of all speaks
    assert re.search(r"^(?:layers\.)?0: 256 -> \d+ channels", shown, re.MULTILINE), shown


def test_all_ways_are_there():
    assert [shlex.split(command)[0] for command in COMMANDS] == ["torchrun", "torchrun", "torchrun", "python"]
