"""Does everything work here? Versions, and the parts of torch that apoptosis stands on, each tried once."""

import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .apoptosis import Apoptosis
from .checkpoint import load, save

PACKAGES = (
    "apoptorch", "torch", "safetensors", "jaxtyping", "numpy", "rich", "matplotlib", "tensorboard", "lightning",
    "transformers", "accelerate", "onnx", "onnxruntime",
)  # fmt: skip
RANK = """import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
total = torch.tensor([float(sys.argv[2]) + 1])
dist.all_reduce(total)
assert total.item() == 3, f"1 + 2 became {total.item()}"
dist.destroy_process_group()"""


def diagnosis() -> dict[str, Any]:
    """Versions, devices and the outcome of every check, in JSON types; `healthy` if all of them passed."""
    checks = [
        _outcome("capture and remove", _remove),
        _outcome("save and load", _checkpoint),
        _outcome("distributed (gloo, 2 processes)", _all_reduce),
    ]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "checks": checks,
        "healthy": all(check["passed"] for check in checks),
    }


def _outcome(name: str, check: Callable[[], str]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found, passed = check(), True
    except Exception as error:  # whatever this machine does wrong is what the user wants to read
        found, passed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    return {"name": name, "passed": passed, "found": found, "seconds": round(time.perf_counter() - start, 2)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _twins() -> nn.Sequential:
    """Sixteen neurons, eight of which do what the other eight do."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[8:] = parameter[:8]
    return model


def _remove() -> str:
    model, inputs = _twins(), torch.linspace(-1, 1, 256).reshape(64, 4).sin()
    Apoptosis(model, example_inputs=inputs).apoptose(inputs, budget=1e-6)
    if len(next(model.parameters())) > 8:
        raise RuntimeError(f"8 of 16 neurons are twins, and {len(next(model.parameters()))} were kept")
    return f"{16 - len(next(model.parameters()))} of 16 neurons removed"


def _checkpoint() -> str:
    model = _twins()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        copy = _twins()
        load(copy, folder)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    if not same:
        raise RuntimeError("what was loaded is not what was saved")
    return "equal bit for bit"


def _all_reduce() -> str:
    if not dist.is_available():
        raise RuntimeError("this build of torch has no torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RANK, f"file://{folder}/store"]
        ranks = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)]
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError((told[0] or told[1]).strip().splitlines()[-1])
    return "ranks agree"
