"""What all tests share. One thread: the machines that run them are shared, and sums are then the same everywhere."""

import os
import socket

import pytest
import torch
from hypothesis import settings

# The same cases on every machine and in every run; `pytest --hypothesis-profile=random` looks for new ones.
settings.register_profile("random", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def data():
    from datasets.split import Split  # lies in examples/, which only the benchmarks' tests need

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return Split(x[:200], y[:200], x[200:], y[200:])


@pytest.fixture
def port():
    """A port that nothing else will take: the system hands out those above 32,767, each worker looks at its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 1_000 * worker + os.getpid() % 900
    for number in range(first, first + 100):
        with socket.socket() as listener:
            if listener.connect_ex(("localhost", number)):
                return number
    raise RuntimeError(f"ports {first} to {first + 99} are all taken")
