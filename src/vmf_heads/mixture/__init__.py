"""Mixtures of von Mises-Fisher distributions as a tool: concentrations, densities, samples and fits."""

from .compression import CompressedMixture, compress_mixture
from .concentration import vmf_concentration
from .distribution import VMFMixture
from .fit import MixtureFit, fit_vmf_mixture
from .online import OnlineEM
from .scores import DensityScores, density_scores
from .warm_start import warm_start_

__all__ = [
    "CompressedMixture",
    "DensityScores",
    "MixtureFit",
    "OnlineEM",
    "VMFMixture",
    "compress_mixture",
    "density_scores",
    "fit_vmf_mixture",
    "vmf_concentration",
    "warm_start_",
]
