"""What fine-tuning makes of images and labels: batches, mixing, erasing, soft targets."""

import random

import numpy as np
import pytest
import torch

from evaluators.finetune.samples import (
    FinetuneDataset,
    FinetuneTransform,
    erase_rectangle,
    mix,
    sample_batches,
    soft_targets,
)
from finetune_fixtures import photos


def test_soft_targets_by_hand():
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    assert torch.allclose(soft_targets(torch.tensor([2, 0]), 4, 0.2), expected)


def test_mixup_blends_images_and_targets_alike():
    images, targets = torch.randn(5, 3, 8, 8), torch.eye(5)
    shares = []
    for seed in range(200):
        mixed, mixed_targets = mix(images, targets, random.Random(seed), mixup=0.8, cutmix=0)
        share = mixed_targets[0, 0].item()
        assert torch.allclose(mixed_targets[0], torch.tensor([share, 0, 0, 0, 1 - share]))
        assert torch.allclose(mixed[1], share * images[1] + (1 - share) * images[3], atol=1e-5)
        assert torch.allclose(mixed[2], images[2], atol=1e-5)  # its own partner
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), rel=0.25)  # of Beta(0.8, 0.8)


def test_cutmix_pastes_what_the_targets_say():
    images, targets = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 20, 30), torch.eye(4)
    shares = []
    for seed in range(200):
        mixed, mixed_targets = mix(images, targets, random.Random(seed), mixup=0, cutmix=1.0)
        own = mixed[0, 0] == 0
        share = own.float().mean().item()
        assert torch.equal(mixed[0, 0][~own], torch.full(((~own).sum(),), 3.0))
        assert mixed_targets[0].tolist() == pytest.approx([share, 0, 0, 1 - share], abs=1e-6)
        rows, columns = (~own).any(dim=1), (~own).any(dim=0)
        assert (~own).sum() == rows.sum() * columns.sum()  # a rectangle
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.95
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))  # not changed


def test_mixing_takes_either_or_none():
    images, targets = torch.randn(2, 3, 8, 8), torch.eye(2)
    assert mix(images, targets, random.Random(0), mixup=0, cutmix=0) == (images, targets)
    pasted = [
        bool((mixed == images).any() and (mixed != images).any())
        for mixed, _ in (mix(images, targets, random.Random(seed), mixup=0.8, cutmix=1.0) for seed in range(200))
    ]
    assert 60 < sum(pasted) < 140


def test_erased_rectangles():
    areas = []
    for seed in range(100):
        image = erase_rectangle(torch.full((3, 40, 60), 9.0), random.Random(seed))
        erased = (image != 9).all(dim=0)
        rows, columns = erased.any(dim=1).sum(), erased.any(dim=0).sum()
        assert erased.sum() == rows * columns
        assert 0.25 < rows / columns < 4
        areas.append(erased.float().mean().item())
        assert abs(image[:, erased].mean()) < 0.5
        assert 0.5 < image[:, erased].std() < 1.5
    assert 0.015 < min(areas) < 0.06
    assert 0.25 < max(areas) < 0.35
    assert torch.equal(
        erase_rectangle(torch.zeros(3, 40, 60), random.Random(7)),
        erase_rectangle(torch.zeros(3, 40, 60), random.Random(7)),
    )


def test_samples_depend_on_their_numbers_alone():
    images = photos("train", 6)
    dataset = FinetuneDataset(images, FinetuneTransform(16), seed=3)
    tensors = []
    for sample in [(0, 2, 0), (0, 2, 1), (0, 5, 0), (1, 2, 0)]:
        tensor, label = dataset[sample]
        assert label == images.labels[sample[1]]
        assert torch.equal(tensor, FinetuneDataset(images, FinetuneTransform(16), seed=3)[sample][0])
        assert tensor.shape == (3, 16, 16)
        tensors.append(tensor)
    tensors.append(FinetuneDataset(images, FinetuneTransform(16), seed=4)[0, 2, 0][0])
    assert not any(torch.equal(a, b) for index, a in enumerate(tensors) for b in tensors[:index])


def test_batches_of_all_epochs():
    plain = list(sample_batches(23, 6, 2, seed=0))
    assert [len(batch) for batch in plain] == [6] * 6
    seen = [{index for batch in plain[first : first + 3] for _, index, _ in batch} for first in (0, 3)]
    assert [len(indices) for indices in seen] == [18, 18]  # none twice in an epoch
    assert seen[0] != seen[1]
    assert [{epoch for epoch, _, _ in batch} for batch in plain] == [{0}] * 3 + [{1}] * 3
    assert plain == list(sample_batches(23, 6, 2, seed=0))
    repeated = list(sample_batches(24, 6, 1, seed=0, repeats=3))
    assert len(repeated) == 4  # as many as without
    assert all([repetition for _, _, repetition in batch] == [0, 1, 2] * 2 for batch in repeated)
    assert len({index for batch in repeated for _, index, _ in batch}) == 8
