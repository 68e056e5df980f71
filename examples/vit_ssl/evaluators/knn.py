"""Weighted nearest neighbours on the sphere (Wu et al., 2018), as in DINO's evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from evaluators.features import Features, FeaturesOf, Metric

TEMPERATURE = 0.07
KS = (5, 10, 20, 50)


def knn(
    features: FeaturesOf, split: str, *, ks: Sequence[int] = KS, temperature: float = TEMPERATURE
) -> Iterator[Metric]:
    """Top-1 accuracy of weighted kNN; k is the one of `ks` with the best accuracy on val (the smallest of equals)."""
    val = features("val")
    on_val = predict(features("train"), val, ks, temperature)
    sweep = {k: float(np.mean(predicted == val.labels)) for k, predicted in on_val.items()}
    k = max(sweep, key=sweep.__getitem__)
    queries = features(split)
    predicted = on_val[k] if split == "val" else predict(features("train"), queries, (k,), temperature)[k]
    options = {"k": k, "temperature": temperature, "val_top1_by_k": {str(k): top1 for k, top1 in sweep.items()}}
    yield Metric("top1", float(np.mean(predicted == queries.labels)), options, predicted)


def predict(
    bank: Features, queries: Features, ks: Sequence[int], temperature: float = TEMPERATURE, *, rows: int = 1024
) -> dict[int, np.ndarray]:
    """Predicted labels (N,) of the queries for each k, exact, `rows` queries at a time.

    A query's k most similar features of the bank vote for their class with weight exp(cosine / temperature). A k larger
    than the bank takes all of it.
    """
    reference = F.normalize(torch.from_numpy(bank.x), dim=1)
    labels = torch.from_numpy(bank.labels)
    predicted: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for chunk in F.normalize(torch.from_numpy(queries.x), dim=1).split(rows):
        cosine, nearest = (chunk @ reference.T).topk(min(max(ks), len(reference)))
        weight = ((cosine - 1) / temperature).exp()  # - 1 keeps the exponent from overflowing at low temperatures
        for k in ks:
            votes = torch.zeros(len(chunk), len(bank.classes))
            votes.scatter_add_(1, labels[nearest[:, :k]], weight[:, :k])
            predicted[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts).numpy() for k, parts in predicted.items()}
