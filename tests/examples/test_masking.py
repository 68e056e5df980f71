"""Which patches are hidden: shares, shapes, and that nothing but the generator decides."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from config.recipe import load_recipe
from data.augmented_images import AugmentedImages
from data.masking import block_mask, kept_patches
from data.views import build_views


@pytest.mark.parametrize(("height", "width"), [(14, 14), (4, 4), (6, 11), (1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_blocks_never_hide_more_than_asked(height, width, ratio):
    for seed in range(50):
        mask = block_mask(height, width, ratio, random.Random(seed))
        assert mask.shape == (height, width)
        assert mask.dtype == torch.bool
        assert mask.sum() <= ratio * height * width


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_blocks_hide_nearly_what_is_asked_in_rectangles(ratio):
    masks = torch.stack([block_mask(14, 14, ratio, random.Random(seed)) for seed in range(200)])
    assert ratio - 0.02 < masks.float().mean() <= ratio
    # A patch is hidden whenever its neighbours on both sides are, far more often than if patches were drawn alone.
    between = masks[:, :, 2:] & masks[:, :, :-2]
    assert masks[:, :, 1:-1][between].float().mean() > 0.9
    assert masks.any(0).all()  # no place is left out, though corners are hidden seldom


def test_a_first_block_has_the_drawn_area_and_aspect_ratio():
    """With as much asked for as a ninth of the square of the shorter side, the area is certain."""
    ratios = []
    for seed in range(300):
        hidden = block_mask(12, 20, 16 / 240, random.Random(seed)).nonzero()
        height, width = (hidden.amax(0) - hidden.amin(0) + 1).tolist() if len(hidden) else (0, 0)
        if len(hidden) == height * width > 9:  # otherwise several blocks
            ratios.append(height / width)
    assert len(ratios) > 100
    assert 0.2 < min(ratios) < 0.5
    assert 2 < max(ratios) < 5
    assert abs(np.mean(np.log(ratios))) < 0.15


def test_kept_patches_are_drawn_evenly_without_repetition():
    assert kept_patches(196, 0.15, random.Random(0)).shape == (166,)  # floor(0.85 * 196), as in MSN
    counts = torch.zeros(16)
    for seed in range(2000):
        kept = kept_patches(16, 0.5, random.Random(seed))
        assert kept.tolist() == sorted(set(kept.tolist()))
        counts[kept] += 1
    assert counts.sum() == 8 * 2000
    assert (counts / 2000 - 0.5).abs().max() < 0.05
    assert torch.equal(kept_patches(16, 0.0, random.Random(0)), torch.arange(16))
    with pytest.raises(ValueError, match=r"`drop` \(=0.9\) must leave at least one of 4 patches"):
        kept_patches(4, 0.9, random.Random(0))


def images(count):
    return [(Image.fromarray(np.full((32, 32, 3), i, np.uint8)), 0) for i in range(count)]


def test_samples_of_ibot_are_crops_and_masks():
    recipe = load_recipe("photos_ibot", {"ibot.mask_probability": 0.4, "ibot.mask_ratio": [0.3, 0.5]})
    dataset = AugmentedImages(images(200), build_views(recipe), seed=3)
    batch = default_collate([dataset[i] for i in range(200)])
    assert [crop.shape for crop in batch["crops"]] == [(200, 3, 32, 32)] * 2 + [(200, 3, 16, 16)] * 2
    assert [(mask.shape, mask.dtype) for mask in batch["masks"]] == [((200, 4, 4), torch.bool)] * 2
    shares = torch.stack(batch["masks"]).float().mean((2, 3))
    assert 0.3 < (shares > 0).float().mean() < 0.5
    assert shares.max() <= 0.5
    assert shares[shares > 0].mean() > 0.3
    assert not torch.equal(batch["masks"][0], batch["masks"][1])


def test_samples_of_msn_are_crops_and_what_the_random_anchors_show():
    recipe = load_recipe("photos_msn", {"msn.rand_views": 2, "msn.patch_drop": 0.4})
    dataset = AugmentedImages(images(8), build_views(recipe))
    batch = default_collate([dataset[i] for i in range(8)])
    assert [crop.shape[-1] for crop in batch["crops"]] == [32, 32, 32, 16, 16]
    assert [keep.shape for keep in batch["keep"]] == [(8, 9)] * 2
    assert len(set(map(tuple, batch["keep"][0].tolist()))) > 4  # every image has its own


@pytest.mark.parametrize("name", ["photos_ibot", "photos_msn"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(name):
    def sample(seed=0, epoch=0, index=5):
        dataset = AugmentedImages(images(8), build_views(load_recipe(name)), seed)
        dataset.set_epoch(epoch)
        for other in (3, 4):
            dataset[other]
        return torch.cat([tensor.flatten().double() for part in dataset[index].values() for tensor in part])

    assert torch.equal(sample(), sample())
    for other in (sample(seed=1), sample(epoch=1), sample(index=6)):
        assert not torch.equal(sample(), other)
    dino = AugmentedImages(images(8), build_views(load_recipe("photos_dino")))[5]["crops"]
    crops = AugmentedImages(images(8), build_views(load_recipe(name)))[5]["crops"]
    assert all(torch.equal(a, b) for a, b in zip(dino, crops, strict=True))  # masks are drawn after them
