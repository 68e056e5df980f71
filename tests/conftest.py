"""What every test of this folder relies on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    torch.manual_seed(0)
