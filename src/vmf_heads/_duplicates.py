"""Which prototypes repeat one another: the greedy count of section 5.2, for several thresholds in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._matmul import at_least_float32, without_autocast
from ._memory import rows_per_chunk


class Duplicates(NamedTuple):
    """What is left of K prototypes at one threshold, and how large the largest set is, its first member included."""

    unique: int
    largest_set: int


def count_duplicates(prototypes: Tensor, thresholds: Sequence[float], *, rows: int | None = None) -> list[Duplicates]:
    """Unique prototypes and the largest set of duplicates of `prototypes` (K, p), for each cosine threshold.

    Equals, for each threshold::

        remaining = list(range(K))
        while remaining:
            first, *others = remaining  # `first` is unique; its set are those with a cosine above the threshold to it
            remaining = [k for k in others if cosine[first, k] <= threshold]

    `rows` prototypes at a time are compared with all unique ones before them.
    """
    with without_autocast(prototypes.device):
        directions = F.normalize(at_least_float32(prototypes), dim=1)
        total = len(directions)
        rows = rows or min(1024, rows_per_chunk(total, directions.device))
        # Prototypes that are unique at any threshold are moved to the front of `directions`. They overwrite a prefix
        # that has been read already. `unique` says at which thresholds each of them counts.
        found = 0
        unique = torch.zeros(len(thresholds), total, dtype=torch.bool, device=directions.device)
        sizes = torch.zeros(len(thresholds), total, dtype=torch.int64, device=directions.device)
        for start in range(0, total, rows):
            block = directions[start : start + rows].clone()
            to_found, within = block @ directions[:found].T, block @ block.T
            kept, members = [], []
            for index, threshold in enumerate(thresholds):
                repeats = (to_found > threshold) & unique[index, :found]
                old = repeats.any(dim=1)
                if found:
                    owners = repeats[old].byte().argmax(dim=1)  # the first of several
                    sizes[index, :found] += torch.bincount(owners, minlength=found)
                first, size = _first_of_each((within > threshold).cpu(), ~old.cpu())
                kept.append(first)
                members.append(size)
            new = torch.stack(kept)
            anywhere = new.any(dim=0)
            count = int(anywhere.sum())
            directions[found : found + count] = block[anywhere.to(block.device)]
            unique[:, found : found + count] = new[:, anywhere].to(unique.device)
            sizes[:, found : found + count] = torch.stack(members)[:, anywhere].to(sizes.device)
            found += count
    return [
        Duplicates(int(u), int(s)) for u, s in zip(unique.sum(dim=1).tolist(), sizes.amax(dim=1).tolist(), strict=True)
    ]


def _first_of_each(near: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the `alive` rows (R,) are unique and the sizes (R,) of their sets, else 0; `near` (R, R) on the CPU."""
    near = near.triu(1)  # [i, j]: j repeats the earlier i
    sizes = torch.ones(len(alive), dtype=torch.int64)
    for row in (near.any(dim=1) & alive).nonzero().flatten().tolist():
        if alive[row]:
            members = near[row] & alive
            sizes[row] += members.sum()
            alive &= ~members
    return alive, sizes * alive
