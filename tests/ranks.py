"""Real processes for tests: `run(world, function, ...)` calls function(rank, ...) in `world` gloo ranks."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds that a rank waits for the others
_context = multiprocessing.get_context("forkserver")  # forked from a process that has imported torch, and no more
_context.set_forkserver_preload(["torch", "torch.export._trace", "torch.distributed", "apoptorch"])


def _enter(rank, world, store, pipe, function, arguments):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    try:
        if world > 1:
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout
            )
        pipe.send_bytes(pickle.dumps((True, function(rank, *arguments))))  # plain pickle: tensors by value
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
    finally:
        pipe.close()
        if world > 1:
            dist.destroy_process_group()


def outcomes(world, function, *arguments):
    """(True, result) or (False, traceback) of every rank; None of a rank that was killed."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server that ranks are forked from
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            store = str(Path(folder) / "store")
            ranks.append(_context.Process(target=_enter, args=(rank, world, store, theirs, function, arguments)))
            ranks[-1].start()
            theirs.close()
            pipes.append(ours)
        found = []
        for pipe in pipes:
            try:
                found.append(
                    pickle.loads(pipe.recv_bytes()) if pipe.poll(4 * TIMEOUT) else (False, "no answer in time")
                )
            except EOFError:
                found.append(None)
        for rank in ranks:
            rank.join(TIMEOUT)
            rank.kill()
            rank.join()
    return found


def run(world, function, *arguments):
    """Every rank's result, by rank."""
    found = outcomes(world, function, *arguments)
    assert all(item is not None and item[0] for item in found), "\n".join(str(item) for item in found)
    return [item[1] for item in found]
