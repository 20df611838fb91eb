"""One thread for every test: the machines that run them are shared, and sums are then the same everywhere."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
