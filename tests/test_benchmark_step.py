"""The steps that `python -m benchmarks step` compares are real ones, of the same model."""

import pytest
import torch
from benchmarks import step as benchmark

SIZE = benchmark.Size("tiny", 2, {**benchmark.TINY, "hidden_size": 16, "num_hidden_layers": 1, "out_dim": 64})


def test_a_step_moves_student_and_teacher() -> None:
    losses, weights = {}, {}
    for name, options in benchmark.CONTENDERS.items():
        torch.manual_seed(0)
        step = benchmark.TrainingStep(benchmark.recipe(SIZE, options), SIZE.batch, "cpu")
        before = [parameter.clone() for parameter in step.method.teacher.parameters()]
        step()
        assert any(not torch.equal(a, b) for a, b in zip(before, step.method.teacher.parameters(), strict=True))
        with torch.no_grad():
            losses[name], _ = step.method({"crops": step.crops}, epoch=50)
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in step.method.student.parameters()])
    plain, unfused, fused = losses.values()
    torch.testing.assert_close(fused, unfused)
    torch.testing.assert_close(weights["DINO-vMF, fused loss"], weights["DINO-vMF"], rtol=1e-4, atol=1e-4)
    assert abs(plain - unfused) > 1e-6


@pytest.mark.parametrize("limit", [0, 1, 7, 16, 100])
def test_the_largest_batch_is_found_to_a_sixteenth(limit: int) -> None:
    found = benchmark.largest_batch(lambda batch: batch <= limit)
    assert found <= limit <= found + max(found // 16, 0)
