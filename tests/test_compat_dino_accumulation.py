"""compat.dino with gradient accumulation: micro-batches give the gradients and the one centre update of their batch."""

import pytest
import torch

from dino_models import BATCH, NCROPS, crops, dino_loss, models


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_micro_batches_equal_one_batch(centering, fused):
    student, teacher = models()
    results, x = [], crops()
    for parts in ((slice(0, 5),), (slice(0, 2), slice(2, 5))):
        loss = dino_loss(centering=centering, fused=fused)
        student.head.release()
        teacher.head.release()
        loss.attach(student, teacher)
        student.zero_grad()
        for images in parts:
            part = x.unflatten(0, (NCROPS, BATCH))[:, images].flatten(0, 1)
            share = (images.stop - images.start) / BATCH
            value = loss(student(part), teacher(part[: len(part) // 2]), 0, commit=images.stop == BATCH)
            (share * value).backward()
        results.append(({n: p.grad.clone() for n, p in student.named_parameters()}, dict(loss.state_dict())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
