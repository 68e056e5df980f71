"""`compiled=True` changes no number: the elementwise work through torch.compile."""

import pytest
import torch

from cross_entropy_problems import gradients, problem, reference
from devices import DEVICES
from vmf_heads import prototype_cross_entropy


@pytest.mark.slow  # builds seven kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("same_position", [True, False])
def test_compiled_epilogues_equal_the_reference(same_position: bool, device: str) -> None:
    torch._dynamo.reset()
    arguments = problem((7, 7, 37, 5, 1), scales=same_position, device=device)
    if same_position:
        arguments["targets"] = None
    else:
        arguments |= dict.fromkeys(("student_log_normalizer", "teacher_log_normalizer", "log_center"))
    loss, log_sum, _ = prototype_cross_entropy(**arguments, chunk_rows=6, compiled=True)  # 6, 3, 2 and 1 rows at a time
    expected, expected_log_sum, _ = reference(arguments)
    torch.testing.assert_close((loss, log_sum), (expected, expected_log_sum))
    torch.testing.assert_close(gradients(loss, arguments), gradients(expected, arguments))
