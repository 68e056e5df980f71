"""RandAugment: each operation by hand, and random pairs of them."""

import random

import numpy as np
from PIL import Image

from evaluators.finetune.rand_augment import FILL, OPERATIONS, rand_augment
from finetune_fixtures import photos


def test_augmentation_operations_by_hand():
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 220, (40, 50, 3)).astype(np.uint8)
    image, old = Image.fromarray(pixels), pixels.astype(int)
    new = {name: np.asarray(operation(image, 0.9, 1.0)).astype(int) for name, operation in OPERATIONS.items()}
    assert (new["auto-contrast"].min(), new["auto-contrast"].max()) == (0, 255)
    assert np.ptp(new["equalize"]) > np.ptp(old)
    assert np.array_equal(new["invert"], 255 - old)
    assert (new["rotate"][0, 0] == FILL).all()
    assert np.array_equal(new["posterize"], old & 128)  # one bit, of 4 - int(3.6)
    assert np.array_equal(new["solarize"], np.where(old < 26, old, 255 - old))
    assert np.array_equal(new["solarize-add"], np.where(old < 128, old + 99, old))
    assert np.ptp(new["color"], axis=2).mean() > 1.3 * np.ptp(old, axis=2).mean()
    assert new["contrast"].std() > 1.4 * old.std()
    assert np.allclose(new["brightness"], np.minimum(old * 1.81, 255), atol=1)
    assert new["sharpness"].std() > 1.1 * old.std()
    assert (new["shear-x"][-1, -10:] == FILL).all()  # the last row is shifted by 0.27 of the height
    assert np.abs(new["shear-x"][0] - old[0]).mean() < 20
    assert (new["shear-y"][-10:, -1] == FILL).all()
    for name, axis in [("shift-x", 1), ("shift-y", 0)]:
        shifted = np.asarray(OPERATIONS[name](image, 8 / 9, 1.0)).swapaxes(0, axis)  # 0.4 of the side: whole pixels
        kept = round(0.6 * len(shifted))
        assert np.array_equal(shifted[:kept], old.swapaxes(0, axis)[-kept:])
        assert (shifted[kept:] == FILL).all()
    for operation in OPERATIONS.values():
        for sign in (-1.0, 1.0):
            changed = operation(image, 1.0, sign)
            assert (changed.size, changed.mode) == (image.size, "RGB")


def test_random_augmentation_repeats_and_varies():
    image = photos("train", 1)[0][0]
    first = [np.asarray(rand_augment(image, random.Random(seed))) for seed in range(40)]
    again = [np.asarray(rand_augment(image, random.Random(seed))) for seed in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert 5 <= sum(np.array_equal(a, np.asarray(image)) for a in first) <= 15  # both operations left out: a quarter
