"""What every test of this folder relies on."""

import os

# Before torch is imported, and for the processes that tests start: their tensors are small, and threads that wait for
# each other on a busy machine make such tests many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    torch.manual_seed(0)
