"""Weighted nearest neighbours on the sphere (Wu et al., 2018), as in DINO's evaluation and Table 2 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config.settings import LOWEST_TEMPERATURE, is_temperature
from evaluators.protocol import Evaluation, Features, Metric
from runtime.distributed import device
from runtime.shares import gather, share


@dataclass(frozen=True)
class KNNOptions:
    """Weighted k nearest neighbours with [CLS] features; k is the one with the best accuracy on val."""

    ks: tuple[int, ...] = ()
    """Numbers of neighbours; by default 5, 10, 20 and 50, with 10 000 train images or more also 100 and 200."""
    temperature: float = 0.07
    """A neighbour's vote has the weight exp(cosine / temperature)."""


def knn(evaluation: Evaluation, options: KNNOptions = KNNOptions()) -> Iterator[Metric]:
    """Yield the top-1 accuracy of weighted kNN; k is the one with the best accuracy on val, the smallest of equals.

    Raises ValueError when an option is out of range.
    """
    if not is_temperature(options.temperature):
        raise ValueError(f"`temperature` (={options.temperature}) must be at least {LOWEST_TEMPERATURE}")
    if min(options.ks, default=1) < 1:
        raise ValueError(f"`ks` (={options.ks}) must be at least 1")
    bank, val = evaluation.features("train"), evaluation.features("val")
    size = len(bank.labels)
    if max(options.ks, default=0) > size:
        raise ValueError(f"`ks` (={options.ks}) must be at most {size}, the number of train images")
    # Of a set smaller than all of these every image is a neighbour.
    usual = (5, 10, 20, 50) if size < 10_000 else (5, 10, 20, 50, 100, 200)
    ks = options.ks or tuple(k for k in usual if k <= size) or (size,)
    on_val = predict(bank, val, ks, options.temperature)
    sweep = {k: float(np.mean(predicted == val.labels)) for k, predicted in on_val.items()}
    k = max(sweep, key=sweep.__getitem__)
    queries = evaluation.features(evaluation.split)
    predicted = on_val[k] if evaluation.split == "val" else predict(bank, queries, (k,), options.temperature)[k]
    notes = {"k": k, "temperature": options.temperature, "val_top1_by_k": {str(k): top1 for k, top1 in sweep.items()}}
    yield Metric("top1", float(np.mean(predicted == queries.labels)), notes, predicted)


def predict(
    bank: Features, queries: Features, ks: Sequence[int], temperature: float = 0.07, *, rows: int = 1024
) -> dict[int, np.ndarray]:
    """Return the predicted labels (N,) of the queries for each k, exact; the ranks share the queries, `rows` at a time.

    A query's k most similar features of the bank vote for their class with weight exp(cosine / temperature). A k larger
    than the bank takes all of it.
    """
    parts = share([slice(first, first + rows) for first in range(0, len(queries.x), rows)])
    labels = torch.from_numpy(bank.labels).to(device())
    predicted = []
    for cosine, nearest in nearest_neighbours(bank.x, [queries.x[part] for part in parts], max(ks)):
        weight = ((cosine - 1) / temperature).exp()  # - 1 keeps the exponent from overflowing at low temperatures
        of_chunk = {}
        for k in ks:
            votes = torch.zeros(len(cosine), len(bank.classes), device=cosine.device)
            votes.scatter_add_(1, labels[nearest[:, :k]], weight[:, :k])
            of_chunk[k] = votes.argmax(dim=1).cpu().numpy()
        predicted.append(of_chunk)
    chunks = gather(predicted)
    return {k: np.concatenate([chunk[k] for chunk in chunks]) for k in ks}


def nearest_neighbours(
    bank: np.ndarray, queries: Sequence[np.ndarray], k: int, *, bank_rows: int = 32_768
) -> list[tuple[Tensor, Tensor]]:
    """Yield cosines and row numbers, each (n, k), of the rows of `bank` (N, D) nearest to those of each chunk of
    queries.

    The most similar comes first; where k > N, there are N of them. Products are float32 whatever the features are.

    The bank passes once, `bank_rows` at a time, with a running best k of every query. With ImageNet (N = 1.28 M,
    D = 768, 50 000 queries in chunks of 1024, k = 200) the device holds at most 0.15 GB of queries, 0.12 GB of
    neighbours, 0.1 GB of the bank and twice 0.13 GB of cosines, about 0.7 GB; the bank is 2 GB as float16 in a file.
    """
    chunks = [_unit(chunk) for chunk in queries]
    best = [(chunk.new_empty(len(chunk), 0), chunk.new_empty(len(chunk), 0, dtype=torch.int64)) for chunk in chunks]
    for first in range(0, len(bank), bank_rows):
        some = _unit(bank[first : first + bank_rows])
        for index, chunk in enumerate(chunks):
            cosine, nearest = (chunk @ some.T).topk(min(k, len(some)))
            # The best k are taken from the best of this part of the bank and the best so far.
            cosine = torch.cat([best[index][0], cosine], dim=1)
            nearest = torch.cat([best[index][1], nearest + first], dim=1)
            cosine, order = cosine.topk(min(k, cosine.shape[1]))
            best[index] = (cosine, nearest.gather(1, order))
    return best


def _unit(x: np.ndarray) -> Tensor:
    # This is a copy, because the features may be memory-mapped; it is moved in the dtype they are stored in.
    return F.normalize(torch.from_numpy(np.array(x)).to(device()).float(), dim=1)
