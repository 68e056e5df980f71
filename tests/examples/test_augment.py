"""Augmentations: every setting does what it says, and a sample's views depend on nothing but its seed."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.augment import EvalTransform, MultiCrop, random_box, random_resized_crop, to_tensor
from data.augmented_images import AugmentedImages

PLAIN = {"color_strength": 0, "blur_strength": 0, "solarize_prob": 0, "grayscale_prob": 0}


def photo(seed=0, size=(48, 40)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def gradient(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def grey_levels(tensor):
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return 255 * (tensor.numpy().transpose(1, 2, 0) * std + mean)


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_crops_are_those_of_pil_and_of_large_boxes_those_of_whole_pixels():
    image, scales = photo(size=(300, 240)), [(0.4, 1.0)] * 2 + [(0.05, 0.2)] * 6
    crops, _ = MultiCrop(48, 24, 6, local_scale=(0.05, 0.2), **PLAIN).crops(image, random.Random(3))
    rng, rounded, flipped = random.Random(3), 0, 0
    for scale, found in zip(scales, crops, strict=True):
        box = random_box(image, scale, rng)
        large = min(box[2] - box[0], box[3] - box[1]) >= 64
        source, box = (image.crop([round(side) for side in box]), None) if large else (image, box)
        expected = np.asarray(source.resize(found.shape[1:], Image.Resampling.BICUBIC, box=box)).astype(int)
        if flip := rng.random() < 0.5:
            expected = expected[:, ::-1]
        assert np.abs(expected - found.permute(1, 2, 0).numpy()).max() <= large  # torch rounds some pixels otherwise
        rng.random(), rng.random()  # whether it is grey, and solarised
        rounded, flipped = rounded + large, flipped + flip
    assert 2 < rounded < 8
    assert 0 < flipped < 8


def test_tensors_are_normalised_as_imagenet():
    tensor = to_tensor(Image.new("RGB", (3, 2), (255, 0, 51)))
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert torch.allclose(tensor[:, 1, 2], torch.tensor(expected), atol=1e-6)
    assert tensor.is_contiguous()


def test_views_come_global_first():
    views = MultiCrop(32, 16, 3)(photo(), random.Random(0))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert len(MultiCrop(32, 16, 0)(photo(), random.Random(0))) == 2
    views = MultiCrop(32, 16, 1, num_global=4)(photo(), random.Random(0))
    assert [view.shape[1] for view in views] == [32] * 4 + [16]


def test_without_augmentation_a_view_is_the_image_or_its_mirror():
    image = photo(size=(40, 40))
    whole = EvalTransform(32)(image)
    views = MultiCrop(32, 32, 30, global_scale=(1, 1), local_scale=(1, 1), **PLAIN)(image, random.Random(0))
    mirrored = [torch.equal(view, whole.flip(2)) for view in views]
    assert all(flip or torch.equal(view, whole) for flip, view in zip(mirrored, views, strict=True))
    assert 8 < sum(mirrored) < 24


@pytest.mark.parametrize("scale", [(0.1, 0.2), (0.4, 1.0)])
def test_crops_show_the_asked_share_of_the_image(scale):
    image, shares, ratios = gradient(240, 200), [], []
    for seed in range(200):
        crop = np.asarray(random_resized_crop(image, 64, scale, random.Random(seed))).astype(float)
        width, height = (crop[32, 48, 0] - crop[32, 16, 0]) * 2, (crop[48, 32, 1] - crop[16, 32, 1]) * 2
        shares.append(width * height / (240 * 200))
        ratios.append(width / height)
    tolerance = 0.06 * max(shares)
    assert scale[0] - tolerance < min(shares)
    assert max(shares) < scale[1] + tolerance
    assert max(shares) - min(shares) > 0.6 * (scale[1] - scale[0])
    assert 0.70 < min(ratios) < 0.85
    assert 1.18 < max(ratios) < 1.42


def test_a_crop_that_cannot_fit_becomes_a_square():
    crop = np.asarray(random_resized_crop(gradient(250, 10), 10, (1, 1), random.Random(0))).astype(int)
    assert np.array_equal(np.diff(crop[0, :, 0]), np.ones(9))  # 10 px wide, unscaled
    assert np.array_equal(crop[:, 0, 1], np.arange(10))


def test_grayscale_drops_colour():
    for view in MultiCrop(32, 16, 2, **{**PLAIN, "grayscale_prob": 1})(photo(), random.Random(0)):
        levels = grey_levels(view)
        assert np.ptp(levels, axis=-1).max() < 1e-3
        assert np.ptp(levels) > 20


def test_only_the_second_global_view_is_solarised():
    plain = MultiCrop(32, 16, 4, **PLAIN)(photo(), random.Random(1))
    solarised = MultiCrop(32, 16, 4, **{**PLAIN, "solarize_prob": 1})(photo(), random.Random(1))
    assert [torch.equal(a, b) for a, b in zip(plain, solarised, strict=True)] == [True, False, True, True, True, True]
    levels = grey_levels(plain[1]).round()
    assert np.allclose(grey_levels(solarised[1]), np.where(levels < 128, levels, 255 - levels), atol=1e-3)


def test_the_first_view_is_always_blurred_and_the_second_seldom():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = {"global_scale": (1, 1), "local_scale": (1, 1)}
    blurred = np.zeros(3)
    for seed in range(200):
        views = MultiCrop(32, 32, 1, **whole, **{**PLAIN, "blur_strength": 3})(noise, random.Random(seed))
        sharp = EvalTransform(32)(noise)
        blurred += [not (torch.equal(view, sharp) or torch.equal(view, sharp.flip(2))) for view in views]
    views = [MultiCrop(32, 32, 1, num_global=3, blur_prob=(0, 1, 0), **whole, **{**PLAIN, "blur_strength": 3})] * 20
    swapped = np.array(
        [
            [torch.equal(v, sharp) or torch.equal(v, sharp.flip(2)) for v in crop(noise, random.Random(s))]
            for s, crop in enumerate(views)
        ]
    )
    assert swapped[:, [0, 3]].all()
    assert swapped[:, 1:3].mean() < 0.2
    assert blurred[0] >= 195  # a radius close to 0 changes nothing
    assert 8 < blurred[1] < 36
    assert 75 < blurred[2] < 125


@pytest.mark.parametrize(
    "setting",
    [
        {"global_scale": (0.9, 1.0)},
        {"local_scale": (0.3, 0.4)},
        {"color_strength": 0.5},
        {"blur_strength": 2.0},
        {"solarize_prob": 1.0},
        {"grayscale_prob": 1.0},
    ],
)
def test_every_setting_has_an_effect(setting):
    default = [MultiCrop(32, 16, 2)(photo(), random.Random(seed)) for seed in range(4)]
    changed = [MultiCrop(32, 16, 2, **setting)(photo(), random.Random(seed)) for seed in range(4)]
    assert not all(same(a, b) for a, b in zip(default, changed, strict=True))


def dataset(seed=0):
    return AugmentedImages([(photo(number), number) for number in range(8)], MultiCrop(32, 16, 1), seed)


def test_a_sample_depends_only_on_seed_epoch_and_index():
    first, second = dataset(), dataset()
    forward = [first[i] for i in range(8)]
    random.seed(1)
    torch.manual_seed(1)
    backward = [second[i] for i in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(forward[3], dataset(seed=1)[3])
    assert not same(forward[3], AugmentedImages([(photo(3), 0)] * 8, MultiCrop(32, 16, 1), 0)[4])  # other index
    second.set_epoch(1)
    assert second.epoch == 1
    assert not same(forward[3], second[3])
    second.set_epoch(0)
    assert same(forward[3], second[3])


def test_workers_that_stay_alive_see_the_epoch():
    alone, shared = dataset(), dataset()
    loader = DataLoader(shared, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        for expected, batch in zip(DataLoader(alone, batch_size=4), loader, strict=True):
            assert same(expected, batch)


def test_evaluation_takes_the_centre():
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (10, 0, 30, 20))
    levels = grey_levels(EvalTransform(10)(image))
    assert np.allclose(levels[:, 1:-1], [255, 0, 0], atol=1e-3)
    assert levels[:, [0, -1], 0].min() > 200  # PIL's bicubic filter looks a little beyond the box
    strip = Image.new("RGB", (50_000, 1), (0, 0, 255))
    strip.putpixel((25_000, 0), (255, 0, 0))
    assert grey_levels(EvalTransform(100)(strip))[50, 99, 0] > 200  # without gigabytes on the way
    half = grey_levels(EvalTransform(20, keep=0.5)(gradient(20, 20)))
    assert np.allclose(half[10, :, 0], np.linspace(4.75, 14.25, 20), atol=0.6)  # the 10 px in the middle


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 0}, r"`global_size` \(=0\) must be at least 1"),
        ({"local_size": -1}, r"`local_size` \(=-1\) must be at least 1"),
        ({"num_global": 0}, r"`num_global` \(=0\) must be at least 1"),
        ({"saturation": 0.5}, r"`saturation` \(=0.5\) must be in \[0, 0.4\]"),
        ({"blur_prob": (1.0, 0.1, 1.5)}, r"`blur_prob` \(=\(1.0, 0.1, 1.5\)\) must be three probabilities"),
        ({"num_local": -1}, r"`num_local` \(=-1\) must be at least 0"),
        ({"global_scale": (0.0, 1.0)}, r"`global_scale` \(=\(0.0, 1.0\)\) must be \(low, high\)"),
        ({"local_scale": (0.5, 0.4)}, r"`local_scale` \(=\(0.5, 0.4\)\) must be \(low, high\)"),
        ({"color_strength": 3.0}, r"`color_strength` \(=3.0\) must be in \[0, 2.5\]"),
        ({"blur_strength": -1.0}, r"`blur_strength` \(=-1.0\) must be in \[0, inf\]"),
        ({"solarize_prob": 1.1}, r"`solarize_prob` \(=1.1\) must be in \[0, 1\]"),
        ({"grayscale_prob": float("nan")}, r"`grayscale_prob` \(=nan\) must be in \[0, 1\]"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)


def test_bad_evaluation_settings():
    with pytest.raises(ValueError, match=r"`size` \(=0\) must be at least 1"):
        EvalTransform(0)
    with pytest.raises(ValueError, match=r"`keep` \(=1.5\) must be in \(0, 1\]"):
        EvalTransform(8, keep=1.5)
