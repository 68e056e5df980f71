"""J and F of masks whose values are known, and against a dilation by a disk."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from skimage.morphology import disk

from evaluators.dense.video.metrics import boundary, boundary_accuracy, region_similarity, summarize


def square(row, column, side=20, shape=(100, 200)):
    mask = np.zeros(shape, bool)
    mask[row : row + side, column : column + side] = True
    return mask


EMPTY, FULL = np.zeros((100, 200), bool), np.ones((100, 200), bool)


@pytest.mark.parametrize(
    ("mask", "truth", "j", "f"),
    [
        (square(10, 10), square(10, 10), 1, 1),
        (square(10, 11), square(10, 10), 380 / 420, 1),  # the tolerance is ceil(0.008 * 223.6) = 2 px
        (square(10, 12), square(10, 10), 360 / 440, 1),
        (square(10, 60), square(10, 10), 0, 0),
        (EMPTY, square(10, 10), 0, 0),
        (square(10, 10), EMPTY, 0, 0),
        (EMPTY, EMPTY, 1, 1),
        (FULL, FULL, 1, 1),
        # Half of the truth's two squares is found: precision 1, recall 1/2.
        (square(10, 10), square(10, 10) | square(60, 120), 1 / 2, 2 / 3),
    ],
)
def test_known_masks(mask, truth, j, f):
    assert region_similarity(mask, truth) == pytest.approx(j)
    assert boundary_accuracy(mask, truth) == pytest.approx(f)


def test_the_boundary_lies_before_the_change():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:4] = True
    assert np.argwhere(boundary(mask)).tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 3], [2, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize("tolerance", [0.008, 0.03])
def test_f_is_that_of_dilated_boundaries(tolerance):
    rng = np.random.default_rng(1)
    for _ in range(5):
        mask, truth = (binary_dilation(rng.random((70, 110)) < 0.002, disk(6)) for _ in range(2))
        radius = int(np.ceil(tolerance * np.sqrt(70**2 + 110**2)))
        near = [binary_dilation(boundary(m), disk(radius)) for m in (mask, truth)]
        precision, recall = near[1][boundary(mask)].mean(), near[0][boundary(truth)].mean()
        assert 0 < precision != recall > 0
        f = boundary_accuracy(mask, truth, tolerance=tolerance)
        assert f == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12)


def test_summary_of_two_objects_by_hand():
    long = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [1.0] * 9])
    short = np.array([[0.6], [0.2]])
    values = summarize([long, short])
    assert values == pytest.approx(
        {
            "J-Mean": (0.5 + 0.6) / 2,
            "J-Recall": (4 / 9 + 1) / 2,
            "J-Decay": (0.8 - 0.2) / 2,  # quarters of nine frames: 1 2 3, 3 4 5, 5 6 7, 7 8 9
            "F-Mean": (1 + 0.2) / 2,
            "F-Recall": 1 / 2,
            "F-Decay": 0,
            "J&F-Mean": (0.55 + 0.6) / 2,
        }
    )
