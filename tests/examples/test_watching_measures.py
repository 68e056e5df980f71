"""Measures of features against the formulas of their papers, and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

from evaluators.protocol import Features
from watching.measures import STRENGTHS, alpha_req, feature_std, lidar, rankme, ridge_top1


def random_features(*shape: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(shape)
    return (x * np.arange(1, shape[-1] + 1) ** -0.7 + 0.3).astype(np.float32)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_rankme_is_the_formula_of_its_paper(shape: tuple[int, int]) -> None:
    x = random_features(*shape)
    sigma = np.linalg.svd(x.astype(float), compute_uv=False)
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    assert rankme(x) == pytest.approx(math.exp(-sum(share * math.log(share) for share in p)), rel=1e-9)
    assert rankme(np.outer(np.ones(9), np.arange(1.0, 6))) == pytest.approx(1, abs=1e-4)
    assert math.isnan(rankme(np.zeros((4, 3))))


def test_lidar_is_the_formula_of_its_paper() -> None:
    n, q, d = 7, 3, 4
    x = random_features(n, q, d)
    mean_of, mean = x.mean(axis=1, dtype=float), x.mean(axis=(0, 1), dtype=float)
    sb, sw = np.zeros((d, d)), 1e-4 * np.eye(d)
    for i in range(n):
        sb += np.outer(mean_of[i] - mean, mean_of[i] - mean) / n
        for k in range(q):
            sw += np.outer(x[i, k] - mean_of[i], x[i, k] - mean_of[i]) / (n * q)
    values = np.linalg.eigvals(np.linalg.inv(sw) @ sb).real  # those of Sw^-1/2 Sb Sw^-1/2
    p = values / values.sum() + 1e-7
    assert lidar(x) == pytest.approx(math.exp(-np.sum(p * np.log(p))), rel=1e-6)
    assert math.isnan(lidar(np.ones((3, 2, 4))))
    with pytest.raises(ValueError, match=r"`x` \(of shape \(3, 1, 4\)\) must be \(n, q, D\) with n and q at least 2"):
        lidar(x[:3, :1])


def test_alpha_req_finds_the_exponent_of_a_spectrum() -> None:
    rows, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 21)) - 1)
    rows, _ = np.linalg.qr(rows - rows.mean(axis=0))
    spectrum = np.arange(1, 21) ** -1.3
    x = rows[:, :20] * np.sqrt(spectrum)
    assert alpha_req(x + 5) == pytest.approx(1.3, abs=1e-6)  # the covariance does not see the mean
    spectrum[[2, 11]] *= 3.0  # no power law: the weighted fit itself, by its normal equations
    j, y = np.arange(1, 21), np.log(spectrum[np.argsort(-spectrum)])
    weights = np.diag(1 / j)
    design = np.stack([-np.log(j), np.ones(20)], axis=1)
    expected = np.linalg.solve(design.T @ weights @ design, design.T @ weights @ y)[0]
    assert alpha_req(rows[:, :20] * np.sqrt(spectrum)) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(alpha_req(np.ones((5, 3))))


def test_a_direction_without_variance_but_rounding_does_not_bend_alpha_req() -> None:
    x = random_features(200, 8)
    normed = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,)).numpy()  # each row sums to zero
    basis = np.linalg.svd(np.ones((1, 8)))[2][1:]
    assert alpha_req(normed) == pytest.approx(alpha_req(normed @ basis.T), abs=1e-4)


def test_feature_std_is_one_for_all_directions_and_zero_for_one() -> None:
    assert feature_std(np.random.default_rng(0).standard_normal((20_000, 8))) == pytest.approx(1, abs=0.02)
    assert feature_std(np.outer(np.arange(1.0, 9), np.ones(5))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dim", [12, 120])
def test_the_ridge_classifier_is_that_of_scikit_learn(dim: int) -> None:
    labels = np.random.default_rng(1).integers(0, 5, 90)
    x = random_features(90, dim) + 0.6 * np.eye(5, dim)[labels].astype(np.float32)
    bank, queries = (Features(x[rows], labels[rows], list("abcde")) for rows in (slice(0, 50), slice(50, 90)))
    scaler = StandardScaler().fit(bank.x)
    theirs = RidgeClassifierCV(alphas=STRENGTHS).fit(scaler.transform(bank.x), bank.labels)
    expected = np.mean(theirs.predict(scaler.transform(queries.x)) == queries.labels)
    assert 0.3 < expected < 0.95
    assert ridge_top1(bank, queries) == pytest.approx(expected)
    assert math.isnan(ridge_top1(bank._replace(labels=np.zeros(50, int)), queries))
