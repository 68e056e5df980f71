"""EM for mixtures of von Mises-Fisher distributions as the textbook has it: an oracle and a peer in NumPy and SciPy.

[1] Banerjee, Dhillon, Ghosh, Sra, "Clustering on the unit hypersphere using von Mises-Fisher distributions", JMLR 6,
2005: soft-moVMF, Algorithm 2 on page 1357, with kappa by Eq. 4.4. movMF of R and spherecluster do this, too.
"""

import numpy as np
import scipy.special
import torch
from torch import Tensor

from benchmarks.concentration.peers import banerjee
from vmf_heads.mixture import VMFMixture


def textbook_em(features: Tensor, start: VMFMixture, passes: int, max_kappa: float) -> VMFMixture:
    """So many E-steps and M-steps from `start`, in float64, with the whole (N, K) matrix in memory.

    `max_kappa` bounds kappa, as it does in ours: without it a component of one row has an infinite likelihood.
    """
    y = features.numpy().astype(np.float64)
    weights, directions, kappa = (
        tensor.numpy().astype(np.float64) for tensor in (start.weights, start.directions, start.kappa)
    )
    for _ in range(passes):
        # P(component | row), in place
        joint = y @ (kappa[:, None] * directions).T
        joint += np.log(weights) + log_normalizer(kappa, y.shape[1])
        joint -= joint.max(axis=1, keepdims=True)
        responsibility = np.exp(joint, out=joint)
        responsibility /= responsibility.sum(axis=1, keepdims=True)

        weight, total = responsibility.sum(axis=0), responsibility.T @ y
        length = np.linalg.norm(total, axis=1)
        weights, directions = weight / len(y), total / length[:, None]
        with np.errstate(divide="ignore"):  # a component of one row
            kappa = np.minimum(banerjee(np.minimum(length / weight, 1), y.shape[1]), max_kappa)
    return VMFMixture(torch.from_numpy(weights), torch.from_numpy(directions), torch.from_numpy(kappa))


def log_normalizer(kappa: np.ndarray, p: int) -> np.ndarray:
    """log C_p(kappa) from SciPy's scaled Bessel function, which underflows for kappa far below p."""
    order = p / 2 - 1
    return order * np.log(kappa) - p / 2 * np.log(2 * np.pi) - np.log(scipy.special.ive(order, kappa)) - kappa
