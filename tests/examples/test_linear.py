"""Linear classification: logistic regression against scikit-learn, SGD against PyTorch and a convex optimum."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data.images import Images
from evaluators.linear import linear as module
from evaluators.linear.linear import LRS, LinearOptions, linear
from evaluators.linear.logistic_probe import logistic_probe
from evaluators.linear.sgd_probe import LinearProbes, Schedule, predict, stored_epochs, train_probes
from evaluators.protocol import Evaluation, NotApplicable
from feature_blobs import blobs

SPLITS = {"train": blobs(0), "val": blobs(1, 45), "test": blobs(2, 50)}


def evaluation(split, splits=SPLITS):
    return Evaluation(None, lambda name, kind="cls": splits[name], split, None, None, Path())


def probe(split, splits=SPLITS, **options):
    return logistic_probe(splits["train"], splits["val"], splits[split], **options)


@pytest.mark.parametrize("split", ["val", "test"])
def test_logistic_regression_is_scikit_learns_with_c_from_val(split):
    metric = probe(split, cs=(1.0, 1e-4, 1e-2))
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


def test_logistic_regression_ends_its_sweep_when_it_gets_worse():
    # Ten noisy dimensions for every telling one: weak regularisation overfits.
    rng = np.random.default_rng(0)
    noisy = {name: f._replace(x=np.hstack([f.x, rng.normal(size=(len(f.x), 50))])) for name, f in SPLITS.items()}
    metric = probe("test", noisy, cs=(1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0))
    sweep = list(metric.options["val_top1_by_C"].values())
    best = sweep.index(max(sweep))
    assert 3 <= len(sweep) < 7
    assert max(sweep[-2:]) < max(sweep)
    assert max(sweep[-3:-1]) == max(sweep)
    assert metric.options["C"] == 10.0 ** (best - 3)


def test_logistic_regression_says_when_it_did_not_converge():
    assert probe("val", cs=(100.0,), max_iter=2).options["converged"] is False


def test_logistic_regression_does_not_stop_early_with_many_classes():
    """Their gradients are small from the start: a tolerance of 1e-3 ends 1.5 % away from the accuracy at C = 0.01."""
    splits = {name: blobs(seed, 200 * n, 200, 40, 1.8) for seed, (name, n) in enumerate([("train", 12), ("val", 10)])}
    found = probe("val", splits, cs=(1e-3, 1e-2, 0.1)).options["val_top1_by_C"]
    scaler = StandardScaler().fit(splits["train"].x)
    x, val_x = (scaler.transform(splits[name].x).astype(np.float64) for name in ("train", "val"))
    for c, top1 in found.items():
        ended = LogisticRegression(C=float(c), max_iter=1000, tol=1e-6).fit(x, splits["train"].labels)
        assert top1 == pytest.approx(ended.score(val_x, splits["val"].labels), abs=0.004)


def test_logistic_regression_standardises():
    scaled = {split: features._replace(x=features.x * [1, 1e4, 1e-4, 3, 7] + 5) for split, features in SPLITS.items()}
    assert probe("test", scaled).value == probe("test").value
    assert StandardScaler().fit(scaled["train"].x).scale_.max() > 1e3


def by_hand(features, weight, lr, schedule):
    """DINO's protocol for one learning rate in float64, with the gradient of softmax regression written out."""
    bias, velocity, velocity_bias = np.zeros(len(weight)), np.zeros_like(weight), np.zeros(len(weight))
    for epoch in range(schedule.epochs):
        rate = lr * schedule.batch_size / 256 * (1 + np.cos(np.pi * epoch / schedule.epochs)) / 2
        order = np.random.default_rng([schedule.seed, epoch]).permutation(len(features.x))
        for first in range(0, len(order), schedule.batch_size):
            rows = order[first : first + schedule.batch_size]
            x, targets = features.x[rows].astype(np.float64), np.eye(len(weight))[features.labels[rows]]
            logits = x @ weight.T + bias
            softmax = np.exp(logits - logits.max(1, keepdims=True))
            error = (softmax / softmax.sum(1, keepdims=True) - targets) / len(rows)
            velocity, velocity_bias = 0.9 * velocity + error.T @ x, 0.9 * velocity_bias + error.sum(0)
            weight, bias = weight - rate * velocity, bias - rate * velocity_bias
    return weight, bias


@pytest.mark.parametrize("rows", [np.arange(60), np.arange(7, 60, 2)])
def test_every_learning_rate_is_trained_as_if_it_were_alone(rows):
    schedule = Schedule(lrs=(0.01, 0.3, 2.0), epochs=7, batch_size=16, seed=3)  # last batches of epochs are smaller
    train = SPLITS["train"]
    stack = train_probes(stored_epochs({"cls": train}, rows, schedule), {"cls": 5}, 3, schedule)["cls"]
    torch.manual_seed(3)
    initial = LinearProbes(5, 3, 3)
    some = train._replace(x=train.x[rows], labels=train.labels[rows])
    for lr, layer, start in zip(schedule.lrs, stack.layers, initial.layers, strict=True):
        weight, bias = by_hand(some, start.weight.detach().double().numpy(), lr, schedule)
        np.testing.assert_allclose(layer.weight.detach().cpu().numpy(), weight, atol=1e-5)
        np.testing.assert_allclose(layer.bias.detach().cpu().numpy(), bias, atol=1e-5)
    weights = np.concatenate([layer.weight.detach().numpy().ravel() for layer in initial.layers])
    assert 0.006 < weights.std() < 0.014  # DINO's 0.01
    assert not torch.cat([layer.bias for layer in initial.layers]).any()


def test_sgd_ends_where_unpenalised_logistic_regression_does():
    train, test = SPLITS["train"], SPLITS["test"]
    schedule = Schedule(lrs=(2.0,), epochs=1000, batch_size=60)  # whole batches: a convex problem without noise
    stack = train_probes(stored_epochs({"cls": train}, np.arange(60), schedule), {"cls": 5}, 3, schedule)["cls"]
    expected = LogisticRegression(C=np.inf, max_iter=10_000, tol=1e-9).fit(train.x, train.labels)
    probabilities = stack(torch.from_numpy(test.x).to(stack.layers[0].weight.device))[0].softmax(1).detach().cpu()
    np.testing.assert_allclose(probabilities, expected.predict_proba(test.x), atol=2e-3)
    assert np.array_equal(predict(stack, test.x, rows=7)[0], expected.predict(test.x))


def trained(rows, schedule):
    return train_probes(stored_epochs({"cls": SPLITS["train"]}, rows, schedule), {"cls": 5}, 3, schedule)["cls"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_learning_rate_is_chosen_on_val(split):
    options = LinearOptions("sgd", lrs=(1e-6, 0.5, 50.0), epochs=5, batch_size=20)
    (metric,) = linear(evaluation(split), options)
    schedule = Schedule(options.lrs, 5, 20)
    stack = train_probes(stored_epochs({"cls": SPLITS["train"]}, np.arange(60), schedule), {"cls": 5}, 3, schedule)[
        "cls"
    ]
    sweep = (predict(stack, SPLITS["val"].x) == SPLITS["val"].labels).mean(axis=1)
    best = int(sweep.argmax())
    assert metric.name == "top1_C"
    expected = {f"{lr:g}": top1 for lr, top1 in zip(options.lrs, sweep, strict=True)}
    assert metric.options["top1_by_lr"] == pytest.approx(expected)
    assert (metric.options["lr"], metric.options["chosen_on"]) == (options.lrs[best], "val")
    predicted = predict(stack, SPLITS[split].x)[best]
    assert np.array_equal(metric.predictions, predicted)
    assert metric.value == np.mean(predicted == SPLITS[split].labels)
    assert sweep.min() < sweep.max()


def test_held_out_train_images_choose_in_place_of_val():
    wrong = SPLITS["val"]._replace(labels=(SPLITS["val"].labels + 1) % 3)
    options = LinearOptions("sgd", lrs=(1e-6, 0.5), epochs=5, batch_size=20, holdout=0.25)
    (metric,) = linear(evaluation("val", {**SPLITS, "val": wrong}), options)
    assert metric.options["chosen_on"] == "held-out train images"
    assert metric.options["lr"] == 0.5
    held_out = np.sort(np.random.default_rng(0).permutation(60)[:15])
    stack = trained(np.setdiff1d(np.arange(60), held_out), Schedule(options.lrs, 5, 20))
    top1 = (predict(stack, SPLITS["train"].x[held_out]) == SPLITS["train"].labels[held_out]).mean(axis=1)
    assert list(metric.options["top1_by_lr"].values()) == pytest.approx(list(top1))


def test_held_out_images_cannot_be_told_where_some_have_no_features(tmp_path, monkeypatch):
    """The rows of images and of features differ then, and images that are trained on would choose."""
    train = Images("folder", "train", ["a", "b", "c"], np.arange(60) % 3, [tmp_path / f"{n}.jpg" for n in range(60)])
    monkeypatch.setattr(module, "load_images", lambda *_, **__: train)
    readable = {**SPLITS, "train": SPLITS["train"]._replace(x=SPLITS["train"].x[1:], labels=SPLITS["train"].labels[1:])}
    given = dataclasses.replace(
        evaluation("val", readable), encoder=SimpleNamespace(dim=5, has_patches=True), dataset="folder"
    )
    with pytest.raises(ValueError, match=r"`holdout` \(=0.5\) with `augment` needs all train images, but 1 could not"):
        next(linear(given, LinearOptions("sgd", augment=True, holdout=0.5)))


def test_the_sweep_is_ibots():
    assert LRS == tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))


@pytest.mark.parametrize(("images", "name"), [(29, "top1"), (30, "top1_C")])
def test_large_train_sets_are_left_to_sgd(images, name, monkeypatch):
    monkeypatch.setattr(module, "LOGISTIC_LIMIT", 30)
    options = LinearOptions(lrs=(0.5,), epochs=1)
    (metric,) = linear(evaluation("val", {**SPLITS, "train": blobs(0, images)}), options)
    assert metric.name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"`epochs` \(=0\) must be at least 1"),
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be at least 1"),
        ({"lrs": (0.1, 0.0)}, r"`lrs` \(=\(0.1, 0.0\)\) must be positive"),
        ({"holdout": 1.0}, r"`holdout` \(=1.0\) must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        next(linear(evaluation("val"), LinearOptions(**options)))


def test_pixels_have_no_crops_to_encode():
    with pytest.raises(NotApplicable, match="needs a backbone and images, not raw pixels"):
        next(linear(evaluation("val"), LinearOptions(augment=True)))
