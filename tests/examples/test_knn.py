"""Weighted kNN against loops in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators import knn as module
from evaluators.knn import KNNOptions, knn, nearest_neighbours, predict
from evaluators.protocol import Evaluation, Features
from feature_blobs import blobs

SPLITS = {"train": blobs(0), "val": blobs(1, 45), "test": blobs(2, 50)}


def evaluation(split, splits=SPLITS):
    return Evaluation(None, splits.__getitem__, split, None, None, Path())


def by_loops(bank, queries, k, temperature):
    predicted = []
    for query in queries.x.astype(np.float64):
        cosines = [query @ x / (np.linalg.norm(query) * np.linalg.norm(x)) for x in bank.x.astype(np.float64)]
        votes = np.zeros(len(bank.classes))
        for index in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[bank.labels[index]] += np.exp(cosines[index] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_predictions_are_those_of_loops(temperature, rows, dtype):
    bank, queries = (SPLITS[split]._replace(x=SPLITS[split].x.astype(dtype)) for split in ("train", "test"))
    for k, labels in predict(bank, queries, (1, 5, 20, 500), temperature, rows=rows).items():
        assert np.array_equal(labels, by_loops(bank, queries, k, temperature))


@pytest.mark.parametrize("bank_rows", [1, 7, 60])
@pytest.mark.parametrize("k", [1, 8, 100])
def test_the_running_best_is_the_best_of_all(bank_rows, k):
    bank, queries = SPLITS["train"].x, [SPLITS["val"].x[:20], SPLITS["val"].x[20:]]
    found = nearest_neighbours(bank, queries, k, bank_rows=bank_rows)
    for chunk, (cosine, nearest) in zip(queries, found, strict=True):
        every = (
            chunk.astype(np.float64) @ bank.T / np.linalg.norm(chunk, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
        )
        expected = np.argsort(-every, axis=1)[:, :k]
        assert np.array_equal(nearest.cpu().numpy(), expected)
        np.testing.assert_allclose(cosine.cpu().numpy(), np.take_along_axis(every, expected, 1), atol=1e-6)


def test_near_neighbours_weigh_more():
    bank = Features(np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32), np.array([0, 1, 1]), ["a", "b"])
    query = Features(np.array([[2, 0]], np.float32), np.array([0]), ["a", "b"])
    assert predict(bank, query, (3,), 0.07)[3].tolist() == [0]
    assert predict(bank, query, (3,), 100.0)[3].tolist() == [1]  # nearly a plain majority
    assert predict(bank, query, (3,), 1e-4)[3].tolist() == [0]  # no overflow


@pytest.mark.parametrize("split", ["val", "test"])
def test_k_is_chosen_on_val(split):
    (metric,) = knn(evaluation(split), KNNOptions(ks=(1, 9, 40)))
    accuracy = {
        k: np.mean(by_loops(SPLITS["train"], SPLITS["val"], k, 0.07) == SPLITS["val"].labels) for k in (1, 9, 40)
    }
    k = metric.options["k"]
    assert accuracy[k] == max(accuracy.values()) > min(accuracy.values())
    assert metric.options["val_top1_by_k"] == pytest.approx({str(k): top1 for k, top1 in accuracy.items()})
    expected = by_loops(SPLITS["train"], SPLITS[split], k, 0.07)
    assert np.array_equal(metric.predictions, expected)
    assert metric.value == pytest.approx(np.mean(expected == SPLITS[split].labels))


@pytest.mark.parametrize(
    ("images", "ks"),
    [(3, [3]), (12, [5, 10]), (9_999, [5, 10, 20, 50]), (10_000, [5, 10, 20, 50, 100, 200])],
)
def test_large_banks_try_more_neighbours_and_small_ones_fewer(images, ks):
    splits = {"train": blobs(0, images), "val": blobs(1, 3)}
    (metric,) = knn(evaluation("val", splits))
    assert list(metric.options["val_top1_by_k"]) == [str(k) for k in ks]


def test_memory_is_bounded_by_the_chunks(monkeypatch):
    # No tensor is larger than a chunk of queries by a chunk of the bank, whatever their numbers.
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        product = matmul(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    queries = [blobs(1, 100).x for _ in range(5)]
    nearest_neighbours(blobs(0, 5000).x, queries, 5, bank_rows=64)
    assert largest == 100 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (KNNOptions(temperature=0.0), r"`temperature` \(=0.0\) must be at least 1e-05"),
        (KNNOptions(ks=(5, 1000)), r"`ks` \(=\(5, 1000\)\) must be at most \d+, the number of train images"),
        (KNNOptions(ks=(5, 0)), r"`ks` \(=\(5, 0\)\) must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        next(module.knn(evaluation("val"), options))
