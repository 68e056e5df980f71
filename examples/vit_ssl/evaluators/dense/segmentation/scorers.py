"""How likely each class is in every patch: by its nearest neighbours among labelled patches, or by a linear head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from evaluators.dense.segmentation.bank import Bank
from evaluators.knn import nearest_neighbours
from runtime.shares import gather, share

ROWS = 1024
"""Patches whose cosines with a part of the bank are in memory at once."""

Scorer: TypeAlias = Callable[[Tensor], Tensor]
"""Features of patches (B, h, w, D) -> scores of the classes of a bank (B, h, w, K)."""


def neighbour_scores(tokens: Tensor, bank: Bank, *, k: int = 30, temperature: float = 0.02) -> Tensor:
    """Return the mean label shares of the k patches of the bank with the largest cosine, weighted by softmax(cosine /
    temperature): tokens (B, h, w, D) -> (B, h, w, K).

    This is the cross-attention by which Balazevic et al. (2023) label patches, with their settings, over all of the
    bank instead of approximate neighbours. A bank with fewer than k patches is taken whole.
    """
    flat = tokens.flatten(0, 2).cpu().numpy()
    chunks = [flat[first : first + ROWS] for first in range(0, len(flat), ROWS)]
    shares = torch.from_numpy(bank.shares)
    scores = []
    for cosine, nearest in nearest_neighbours(bank.x, chunks, k):
        weight = (cosine / temperature).softmax(dim=1).cpu()
        scores.append(torch.einsum("nk,nkc->nc", weight, shares[nearest.cpu()]))
    return torch.cat(scores).unflatten(0, tokens.shape[:3]).to(tokens.device)


@dataclass(frozen=True)
class LinearHead:
    """Logits of the classes of a bank: `tokens @ weight.T + bias`."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    converged: bool

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, h, w, K) of tokens (B, h, w, D)."""
        return tokens @ self.weight.to(tokens.device).T + self.bias.to(tokens.device)


def fit_heads(bank: Bank, cs: Sequence[float], *, max_iter: int = 1000) -> dict[float, LinearHead]:
    """Return a multinomial logistic regression for each C, scikit-learn's inverse strength of the L2 penalty.

    It minimises C times the cross-entropy of the patches' label shares, summed over patches, plus ||W||^2 / 2, on
    standardised features. The ranks divide the values of C.
    """
    scaler = StandardScaler().fit(bank.x)
    # A patch with several labels is a row for each of them, with its share as the weight.
    patch, column = bank.shares.nonzero()
    inputs, weight = scaler.transform(bank.x)[patch], bank.shares[patch, column]
    tol = 1e-3 * min(1, 14 / len(bank.classes))  # more classes make smaller gradients

    def fit(c: float) -> LinearHead:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = LogisticRegression(C=c, max_iter=max_iter, tol=tol).fit(inputs, column, sample_weight=weight)
        coefficients, intercept = found.coef_, found.intercept_
        if len(bank.classes) == 2:  # scikit-learn has one vector, the difference of the logits
            coefficients, intercept = (np.stack([-x[0] / 2, x[0] / 2]) for x in (coefficients, intercept))
        # The scaler becomes part of the head.
        coefficients = coefficients / scaler.scale_
        intercept = intercept - coefficients @ scaler.mean_
        as_tensors = (torch.from_numpy(x.astype(np.float32)) for x in (coefficients, intercept))
        return LinearHead(*as_tensors, bool(found.n_iter_.max() < max_iter))

    return dict(zip(cs, gather([fit(c) for c in share(cs)]), strict=True))
