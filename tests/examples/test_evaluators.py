"""Evaluators against independent oracles: loops, scikit-learn, a direct minimisation, hand-worked prototypes."""

import types

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data import Images
from evaluators.features import Features, extract
from evaluators.fewshot import draw, fewshot, fit, normalize
from evaluators.knn import knn, predict
from evaluators.linear import linear
from evaluators.prototypes import count_unique, prototypes


def blobs(seed, n=60, classes=3, dim=5, spread=1.0):
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = (centers[labels] + spread * rng.normal(size=(n, dim))).astype(np.float32)
    return Features(x, labels.astype(np.int64), [f"class {number}" for number in range(classes)])


SPLITS = {"train": blobs(0), "val": blobs(1, 45), "test": blobs(2, 50)}


def knn_by_loops(bank, queries, k, temperature):
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
def test_knn_is_brute_force_knn(temperature, rows):
    predicted = predict(SPLITS["train"], SPLITS["test"], (1, 5, 20, 500), temperature, rows=rows)
    for k, labels in predicted.items():
        assert np.array_equal(labels, knn_by_loops(SPLITS["train"], SPLITS["test"], k, temperature))


def test_knn_weighs_near_neighbours_more():
    bank = Features(np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32), np.array([0, 1, 1]), ["a", "b"])
    query = Features(np.array([[2, 0]], np.float32), np.array([0]), ["a", "b"])
    assert predict(bank, query, (3,), 0.07)[3].tolist() == [0]
    assert predict(bank, query, (3,), 100.0)[3].tolist() == [1]  # nearly a plain majority
    assert predict(bank, query, (3,), 1e-4)[3].tolist() == [0]  # no overflow


@pytest.mark.parametrize("split", ["val", "test"])
def test_knn_chooses_k_on_val(split):
    (metric,) = knn(SPLITS.get, split, ks=(1, 9, 40))
    accuracy = {
        k: np.mean(knn_by_loops(SPLITS["train"], SPLITS["val"], k, 0.07) == SPLITS["val"].labels) for k in (1, 9, 40)
    }
    k = metric.options["k"]
    assert accuracy[k] == max(accuracy.values()) > min(accuracy.values())
    assert metric.options["val_top1_by_k"] == pytest.approx({str(k): top1 for k, top1 in accuracy.items()})
    expected = knn_by_loops(SPLITS["train"], SPLITS[split], k, 0.07)
    assert np.array_equal(metric.predictions, expected)
    assert metric.value == pytest.approx(np.mean(expected == SPLITS[split].labels))


@pytest.mark.parametrize("split", ["val", "test"])
def test_linear_probe_is_scikit_learns_with_c_from_val(split):
    (metric,) = linear(SPLITS.get, split, cs=(1.0, 1e-4, 1e-2))
    train, val = SPLITS["train"], SPLITS["val"]
    mean, sd = train.x.mean(axis=0), train.x.std(axis=0)
    accuracy, probes = {}, {}
    for c in (1e-4, 1e-2, 1.0):
        probes[c] = LogisticRegression(C=c, max_iter=10_000, tol=1e-8).fit((train.x - mean) / sd, train.labels)
        accuracy[c] = probes[c].score((val.x - mean) / sd, val.labels)
    assert metric.options["val_top1_by_C"] == pytest.approx({f"{c:g}": top1 for c, top1 in accuracy.items()})
    assert metric.options["C"] == max(accuracy, key=accuracy.get)
    assert metric.options["converged"] is True
    expected = probes[metric.options["C"]].predict((SPLITS[split].x - mean) / sd)
    assert np.array_equal(metric.predictions, expected)
    assert metric.value == pytest.approx(np.mean(expected == SPLITS[split].labels))


def test_linear_probe_ends_its_sweep_when_it_gets_worse():
    # Ten noisy dimensions for every telling one: weak regularisation overfits.
    rng = np.random.default_rng(0)
    noisy = {name: f._replace(x=np.hstack([f.x, rng.normal(size=(len(f.x), 50))])) for name, f in SPLITS.items()}
    (metric,) = linear(noisy.get, "test", cs=(1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0))
    sweep = list(metric.options["val_top1_by_C"].values())
    best = sweep.index(max(sweep))
    assert 3 <= len(sweep) < 7
    assert max(sweep[-2:]) < max(sweep)
    assert max(sweep[-3:-1]) == max(sweep)
    assert metric.options["C"] == 10.0 ** (best - 3)


def test_linear_probe_says_when_it_did_not_converge():
    (metric,) = linear(SPLITS.get, "val", cs=(100.0,), max_iter=2)
    assert metric.options["converged"] is False


def test_linear_probe_standardises():
    scaled = {split: features._replace(x=features.x * [1, 1e4, 1e-4, 3, 7] + 5) for split, features in SPLITS.items()}
    (metric,), (plain,) = linear(scaled.get, "test"), linear(SPLITS.get, "test")
    assert metric.value == plain.value
    assert StandardScaler().fit(scaled["train"].x).scale_.max() > 1e3


def msn_objective(weights, x, labels, classes):
    # mean cross-entropy + (0.075 / n) / 2 * |W|^2, without intercept, as msn/logistic_eval.py hands it to its solver
    logits = x @ weights.reshape(classes, -1).T
    log_z = np.log(np.exp(logits).sum(axis=1))
    return np.mean(log_z - logits[np.arange(len(x)), labels]) + 0.075 / len(x) / 2 * np.sum(weights**2)


def test_fewshot_minimises_msns_objective():
    train, test = SPLITS["train"], SPLITS["test"]
    accuracies = []
    for number in range(4):
        chosen = draw(train, 5, number)
        x = train.x[chosen].astype(np.float64)
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        assert np.allclose(normalize(train.x[chosen]), x, atol=1e-6)
        weights = minimize(msn_objective, np.zeros(15), (x, train.labels[chosen], 3), tol=1e-10).x.reshape(3, 5)
        classifier = fit(x, train.labels[chosen])
        assert np.allclose(classifier.coef_, weights, atol=0.02)
        assert not classifier.intercept_.any()
        accuracies.append(classifier.score(normalize(test.x), test.labels))
    (metric,) = fewshot(SPLITS.get, "test", shots=(5,), draws=4)
    assert metric.name == "5-shot"
    assert metric.value == pytest.approx(np.mean(accuracies), abs=0.5 / len(test.labels))
    assert metric.options["sd"] == pytest.approx(np.std(accuracies, ddof=1), abs=0.01)
    assert metric.options["draws"] == 4


def test_fewshot_draws_are_balanced_fixed_and_different():
    draws = [draw(SPLITS["train"], 5, number) for number in range(20)]
    for chosen in draws:
        assert np.bincount(SPLITS["train"].labels[chosen]).tolist() == [5, 5, 5]
        assert len(set(chosen)) == 15
    assert len({tuple(sorted(chosen)) for chosen in draws}) == 20
    assert np.array_equal(draws[7], draw(SPLITS["train"], 5, 7))


def test_fewshot_knows_nothing_of_the_labels_it_predicts():
    shuffled = {
        **SPLITS,
        "test": SPLITS["test"]._replace(labels=np.random.default_rng(0).permutation(SPLITS["test"].labels)),
    }
    one, five = fewshot(shuffled.get, "test")
    assert (one.name, five.name) == ("1-shot", "5-shot")
    assert abs(five.value - 1 / 3) < 0.15


def test_fewshot_needs_enough_images():
    few = {"train": blobs(0, 8), "test": SPLITS["test"]}
    with pytest.raises(ValueError, match="class 'class 0' has 3 train images, but 5-shot needs at least 5"):
        list(fewshot(few.get, "test"))


class Head(torch.nn.Module):
    """The scores of an attached head: inputs are y."""

    def __init__(self, weight):
        super().__init__()
        self.last_layer = torch.nn.Module()
        self.last_layer.weight = weight
        self.last_layer.weight_g = -weight.norm(dim=1, keepdim=True)  # a sign must not matter

    def forward(self, y):
        return y @ self.last_layer.weight.T


def test_prototypes_by_hand():
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [-1.0, 0.0]])
    seen = []

    def targets(scores, epoch):
        seen.append(epoch)
        return (scores - torch.tensor([0.0, 9.0, 0.0, 0.0])).softmax(dim=1)  # the centre forbids prototype 1

    run = types.SimpleNamespace(
        head=Head(weight),
        loss=types.SimpleNamespace(targets=targets),
        recipe=types.SimpleNamespace(student_temp=0.1, epochs=10),
        epoch=10,
    )
    y = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [1, 0.01]], np.float32)
    train = {"train": Features(y, np.zeros(5, np.int64), ["only"])}
    metrics = {metric.name: metric for metric in prototypes(run, train.get, rows=2)}
    value = {name: metric.value for name, metric in metrics.items()}
    assert value["prototypes"] == 4
    assert value["used_scores"] == 2  # 1 and 2
    assert value["used_targets"] == 2  # 0 and 2
    assert value["unique"] == 3  # 1 repeats 0; the opposite direction does not
    assert metrics["unique"].options == {"cosine": 0.9}
    norms = 10 * np.array([1.0, np.hypot(2, 0.1), 3.0, 1.0])
    for name, quantile in [("min", 0), ("p05", 0.05), ("p50", 0.5), ("p95", 0.95), ("max", 1)]:
        assert value[f"kappa_{name}"] == pytest.approx(np.quantile(norms, quantile), rel=1e-6)
    assert set(seen) == {9}  # the last epoch there is a teacher temperature for


@pytest.mark.parametrize("cosine", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("rows", [3, 8, 1024])
def test_unique_prototypes_are_those_of_a_loop(cosine, rows):
    weight = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = []
    for w in weight:
        if all(torch.cosine_similarity(w, other, dim=0) <= cosine for other in kept):
            kept.append(w)
    assert count_unique(weight, cosine, rows=rows) == len(kept)
    assert 1 < len(kept) < 60


def test_features_keep_the_order_of_the_images():
    items = [(torch.full((3, 4, 4), float(number)), 0) for number in range(10)]

    class Numbers(Images):
        def __getitem__(self, index):
            return items[index]

    images = Numbers("numbers", "train", ["only"], np.arange(10), items)
    features = extract(lambda batch: batch.mean(dim=(2, 3)), images, lambda image: image, batch_size=4)
    assert features.x.dtype == np.float32
    assert np.array_equal(features.x, np.repeat(np.arange(10.0)[:, None], 3, axis=1))
    assert features.labels is images.labels
