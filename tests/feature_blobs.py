"""Features of a few classes, each around a centre of its own."""

import numpy as np

from evaluators.protocol import Features


def blobs(seed, n=60, classes=3, dim=5, spread=1.0):
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = (centers[labels] + spread * rng.normal(size=(n, dim))).astype(np.float32)
    return Features(x, labels.astype(np.int64), [f"class {number}" for number in range(classes)])
