"""What every test of this folder relies on: neither the tests before it nor a busy machine change what it finds."""

import os
import random
import sys

# Before torch is imported, and for the processes that tests start: their tensors are small, and threads that wait for
# each other on a busy machine make such tests many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

collect_ignore = ["data"]  # scripts that make the truth tables, which need more than the tests do


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    seed_all()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    if fixturedef.scope != "function":  # made by the first test that asks for it, whichever that is
        seed_all()


@pytest.fixture(autouse=True, scope="module")
def _no_compiled_code_of_other_files() -> None:
    if "torch._dynamo" in sys.modules:  # torch.compile gives up on a function that it has compiled eight times
        torch.compiler.reset()
