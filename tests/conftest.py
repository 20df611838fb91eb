"""One thread for every test: the machines that run them are shared, and sums are then the same everywhere."""

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
