"""Transfer to small data sets against scikit-learn's own cross-validation, and what it may and may not train on."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score

from evaluators.protocol import Evaluation, Features
from evaluators.transfer import Search, TransferOptions, folds, path, per_class, search, top1, transfer

SIZES = (60, 25, 12)
"""Images of the three classes, so that top-1 and the mean per class differ."""


def blobs(seed, sizes=SIZES, dim=6):
    centers = np.random.default_rng(98).normal(size=(3, dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1, 2], sizes))
    x = centers[labels] + 1.3 * rng.normal(size=(len(labels), dim))
    return Features(x.astype(np.float32), labels, ["a", "b", "c"])


SPLITS = {"train": blobs(0), "val": blobs(1), "test": blobs(2)}


def evaluation(splits=SPLITS, split="test"):
    def features(name):
        if name not in splits:
            raise FileNotFoundError(f"no split {name}")
        return splits[name]

    return Evaluation(None, features, split, None, None, Path())


def joined(*names):
    return (np.concatenate([getattr(SPLITS[name], field) for name in names]) for field in ("x", "labels"))


@pytest.mark.parametrize("metric", ["top1", "per_class"])
def test_strengths_are_scored_as_by_scikit_learn(metric):
    train = SPLITS["train"]
    strengths = [1e-1, 1e3, 1.0, 30.0, 1e2]
    found = search(train, folds(train, 5), strengths, {"top1": top1, "per_class": per_class}[metric], max_iter=1000)
    assert list(found.scores) == sorted(strengths, reverse=True)
    assert found.cut_short == 0
    for strength, score in found.scores.items():
        classifier = LogisticRegression(C=1 / strength, tol=1e-6, max_iter=5000)  # each from scratch
        parts = StratifiedKFold(5, shuffle=True, random_state=0)
        scoring = {"top1": "accuracy", "per_class": "balanced_accuracy"}[metric]
        expected = cross_val_score(classifier, train.x.astype(np.float64), train.labels, cv=parts, scoring=scoring)
        assert score == pytest.approx(expected.mean(), abs=1e-9)
    assert len(set(found.scores.values())) > 2


@pytest.mark.parametrize("metric", ["top1", "per_class"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_the_best_strength_is_trained_on_all_that_is_not_reported(metric, split):
    reported, mean = transfer(evaluation(split=split), TransferOptions(metric=metric, strengths=12))
    notes = reported.options
    assert notes["trained_on"] == {"val": "train", "test": "train+val"}[split]
    assert notes["selected_by"] == f"{metric}, 5 folds"
    x, labels = joined("train") if split == "val" else joined("train", "val")
    parts = StratifiedKFold(5, shuffle=True, random_state=0)
    scoring = {"top1": "accuracy", "per_class": "balanced_accuracy"}[metric]
    scores = {
        strength: cross_val_score(LogisticRegression(C=1 / strength), x, labels, cv=parts, scoring=scoring).mean()
        for strength in np.logspace(5, -6, 12)[:8]  # weaker ones need more iterations than by default
    }
    assert notes["strength"] == max(scores, key=scores.get)
    predicted = LogisticRegression(C=1 / notes["strength"]).fit(x, labels).predict(SPLITS[split].x)
    assert np.array_equal(reported.predictions, predicted)
    assert (reported.name, reported.value) == ("top1", pytest.approx(np.mean(predicted == SPLITS[split].labels)))
    assert mean.name == "per_class"
    assert mean.value == pytest.approx(balanced_accuracy_score(SPLITS[split].labels, predicted))
    assert notes["converged"] is True


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_solvers_end_at_the_minimum(kind):
    """scikit-learn keeps float32, in which rounding ends L-BFGS with a gradient a hundred times as large."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 1000)
    x = (rng.normal(size=(20, 32))[labels] + 2 * rng.normal(size=(1000, 32))).astype(kind)
    for strength, classifier in path(x, labels, [1e3, 1e2, 1.0], max_iter=1000):
        error = classifier.predict_proba(x.astype(np.float64)) - np.eye(20)[labels]
        gradient = error.T @ x.astype(np.float64) + strength * classifier.coef_
        assert np.abs(gradient).max() < 1.1e-4


def test_strengths_of_the_paper():
    (metric, _) = transfer(evaluation(split="val"), TransferOptions(folds=2, max_iter=5))
    strengths = [float(strength) for strength in metric.options["score_by_strength"]]
    assert len(strengths) == 45
    assert (strengths[0], strengths[-1]) == (1e5, 1e-6)
    assert np.allclose(np.diff(np.log10(strengths)), -11 / 44, atol=0.01)
    assert 0 < metric.options["cut_short"] < 2 * 45  # weak ones need more than five iterations, strong ones do not


def test_strength_chosen_on_val():
    (metric, _) = transfer(evaluation(), TransferOptions(selection="val", strengths=8))
    strengths = np.logspace(5, -6, 8)[:6]
    scores = {}
    for strength in strengths:
        classifier = LogisticRegression(C=1 / strength).fit(SPLITS["train"].x, SPLITS["train"].labels)
        scores[strength] = classifier.score(SPLITS["val"].x, SPLITS["val"].labels)
    assert metric.options["strength"] == max(scores, key=scores.get)
    assert metric.options["selected_by"] == "top1, val"
    x, labels = joined("train", "val")
    classifier = LogisticRegression(C=1 / metric.options["strength"]).fit(x, labels)
    assert np.array_equal(metric.predictions, classifier.predict(SPLITS["test"].x))


def test_reported_labels_do_not_matter():
    shuffled = SPLITS["test"]._replace(labels=np.random.default_rng(0).permutation(SPLITS["test"].labels))
    (metric, _), (other, _) = (
        transfer(evaluation(splits), TransferOptions(strengths=5)) for splits in (SPLITS, {**SPLITS, "test": shuffled})
    )
    assert np.array_equal(metric.predictions, other.predictions)
    assert metric.value > other.value


def test_no_val_split_is_needed():
    only = {name: SPLITS[name] for name in ("train", "test")}
    (metric, _) = transfer(evaluation(only), TransferOptions(strengths=5))
    assert metric.options["trained_on"] == "train"
    for splits, split in [(only, "test"), (SPLITS, "val")]:
        with pytest.raises(ValueError, match=r"`selection` \(='val'\) must be 'folds' where there is no val split"):
            list(transfer(evaluation(splits, split), TransferOptions(selection="val")))


def test_the_strongest_of_equals_is_chosen():
    assert Search({1e3: 0.5, 10.0: 0.8, 1e-3: 0.8, 1e-6: 0.7}, 0).best() == 10


def test_per_class_leaves_absent_classes_out():
    labels, predicted = np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2])
    assert per_class(labels, predicted) == pytest.approx((2 / 3 + 1) / 2)
    assert top1(labels, predicted) == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TransferOptions(folds=1), r"`folds` \(=1\) must be at least 2"),
        (TransferOptions(strengths=0), r"`strengths` \(=0\) must be at least 1"),
        (TransferOptions(max_iter=0), r"`max_iter` \(=0\) must be at least 1"),
        (TransferOptions(folds=25), r"`folds` \(=25\) must be at most 24, the number of training images of 'c'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        list(transfer(evaluation(), options))
