"""How others find kappa from the mean resultant length R, in float64."""

from collections.abc import Callable

import numpy as np
import scipy.special
import scipy.stats

Method = Callable[[np.ndarray, int], np.ndarray]


def banerjee(resultant: np.ndarray, p: int) -> np.ndarray:
    """Banerjee et al., JMLR 2005, Eq. 4.4: in closed form."""
    return resultant * (p - resultant**2) / (1 - resultant**2)


def sra(resultant: np.ndarray, p: int) -> np.ndarray:
    """Sra, Computational Statistics 2012: two Newton steps from Banerjee's, with a ratio of Bessel functions as A."""
    kappa = banerjee(resultant, p)
    for _ in range(2):
        a = scipy.special.ive(p / 2, kappa) / scipy.special.ive(p / 2 - 1, kappa)
        kappa = kappa - (a - resultant) / (1 - a**2 - (p - 1) / kappa * a)
    return kappa


def scipy_fit(resultant: np.ndarray, p: int) -> np.ndarray:
    """scipy.stats.vonmises_fisher.fit of two points with this mean resultant length; nan where it raises."""
    found = []
    for r in resultant.tolist():
        points = np.zeros((2, p))
        points[:, 0] = r
        points[:, 1] = np.array([1, -1]) * np.sqrt((1 - r) * (1 + r))
        try:
            found.append(scipy.stats.vonmises_fisher.fit(points)[1])
        except ValueError:  # its root finder found no change of sign
            found.append(np.nan)
    return np.array(found)


PEERS: dict[str, Method] = {
    "Banerjee et al. 2005": banerjee,
    "Sra 2012, two Newton steps": sra,
    "scipy.stats.vonmises_fisher.fit": scipy_fit,
}
