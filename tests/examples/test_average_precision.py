"""Average precision with junk: by hand, and against scikit-learn's precision-recall curve."""

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

from evaluators.retrieval.average_precision import average_precision, positions, precision_at


def test_a_list_with_junk_by_hand():
    # Without the junk 5 and 1 the ranking is 2 9 7 3: precision 1 before and after 2, 1/2 before and 2/3 after 7.
    places = positions(np.array([5, 2, 9, 1, 7, 3]), np.array([7, 2]), np.array([1, 5, 8]))
    assert places.tolist() == [0, 2]
    assert average_precision(places) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert precision_at(places, 1) == 1
    assert precision_at(places, 2) == 1 / 2
    assert precision_at(places, 10) == 2 / 3  # nothing is wanted after the third image


@pytest.mark.parametrize(("places", "ap"), [([0], 1), ([0, 1, 2], 1), ([1], 1 / 4), ([3], 1 / 8)])
def test_single_hits(places, ap):
    assert average_precision(np.array(places)) == pytest.approx(ap)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_area_under_scikit_learns_curve(seed):
    """The same curve, by trapezoids; scikit-learn's own sum of right-hand rectangles is larger or equal."""
    rng = np.random.default_rng(seed)
    images = rng.integers(5, 60)
    relation = rng.choice(["positive", "negative", "junk"], images, p=[0.3, 0.5, 0.2])
    relation[rng.integers(images)] = "positive"
    scores = rng.permutation(images) / images
    kept = relation != "junk"
    wanted = relation[kept] == "positive"
    places = positions(np.argsort(-scores), np.flatnonzero(relation == "positive"), np.flatnonzero(~kept))
    precision, recall, _ = precision_recall_curve(wanted, scores[kept])
    assert average_precision(places) == pytest.approx(auc(recall, precision), abs=1e-12)
    assert average_precision(places) <= average_precision_score(wanted, scores[kept])
    best = wanted[np.argsort(-scores[kept])]
    for k in (1, 5):
        assert precision_at(places, k) == best[: min(k, np.flatnonzero(best)[-1] + 1)].mean()
