"""Mixtures of von Mises-Fisher distributions as a tool: concentrations, densities, samples and fits."""

from .concentration import vmf_concentration
from .distribution import VMFMixture
from .fit import MixtureFit, fit_vmf_mixture
from .online import OnlineEM

__all__ = ["MixtureFit", "OnlineEM", "VMFMixture", "fit_vmf_mixture", "vmf_concentration"]
