"""A sample of the patches of train images and their labels: neighbours are found in it, and heads learn from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluators.dense.segmentation.folder import VOID, Pairs
from evaluators.dense.segmentation.patches import Patches, described, label_shares
from runtime.shares import gather


@dataclass(frozen=True)
class Bank:
    """N patches: features `x` (N, D) and `shares` (N, K) of the labels in each, both float32.

    The rows of `shares` sum to 1, and column k is about the label `classes[k]`: those that some patch has.
    """

    x: np.ndarray
    shares: np.ndarray
    classes: np.ndarray

    def some(self, most: int, seed: int) -> Bank:
        """Return at most so many patches, drawn at random, with the same classes."""
        if len(self.x) <= most:
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self.x), most, replace=False))
        return Bank(self.x[rows], self.shares[rows], self.classes)


def build_bank(pairs: Pairs, patches: Patches, *, most: int, seed: int, num_workers: int | None = None) -> Bank:
    """Return at most `most` labelled patches of the images, equally many of each as far as it has them, on every rank.

    Which ones is drawn from `seed`, and does not depend on the features or on the number of ranks. Where there are more
    images than `most`, images are drawn, and one patch of each.

    Raises ValueError when the masks show fewer than two classes.
    """
    images = np.arange(len(pairs))
    if len(images) > most:
        images = np.sort(np.random.default_rng(seed).choice(images, most, replace=False))
    chosen = Pairs([pairs.pairs[image] for image in images], pairs.split, pairs.size, pairs.ignore)
    of_each = most // len(images)

    def sample(number: int, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shares = label_shares(mask, *tokens.shape[:2])
        labelled = np.flatnonzero(shares.any(axis=1))
        rng = np.random.default_rng([seed, number])
        rows = np.sort(rng.choice(labelled, min(of_each, len(labelled)), replace=False))
        return tokens.reshape(len(shares), -1)[rows], shares[rows].astype(np.float16)

    drawn = [
        [sample(number, one.cpu().numpy(), mask) for one, (number, mask) in zip(tokens, masks, strict=True)]
        for tokens, masks in described(chosen, patches, num_workers=num_workers)
    ]
    parts = [part for batch in gather(drawn) for part in batch]
    shares = np.concatenate([shares for _, shares in parts])
    classes = np.flatnonzero(shares.any(axis=0))
    if len(classes) < 2:
        shown = f"class {classes[0]} alone" if len(classes) else "no class"
        raise ValueError(
            f"the {pairs.split} masks show {shown}, but must show at least 2 classes; pixels of the value {VOID}, "
            "which is white, do not count"
        )
    return Bank(np.concatenate([x for x, _ in parts]), shares[:, classes].astype(np.float32), classes.astype(np.uint8))
