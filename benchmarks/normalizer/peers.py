"""How others compute log C_p(kappa) and its slope, each the way its users call it.

A method maps float32 or float64 concentrations and p to (log C_p, A_p) in the same dtype. Non-finite results are left
in: they are what a training run would have got.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.special
import torch

Method = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def scipy_ive(kappa: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """The exponentially scaled Bessel function, as in scipy.stats.vonmises_fisher, and the ratio of two of them."""
    nu = kappa.dtype.type(p / 2 - 1)
    with np.errstate(all="ignore"):
        scaled = scipy.special.ive(nu, kappa)
        log_c = nu * np.log(kappa) - np.log(scaled) - kappa - kappa.dtype.type(p / 2 * math.log(2 * math.pi))
        return log_c, scipy.special.ive(nu + 1, kappa) / scaled


def scipy_iv(kappa: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """The Bessel function itself: the formula as printed."""
    nu = kappa.dtype.type(p / 2 - 1)
    with np.errstate(all="ignore"):
        bessel = scipy.special.iv(nu, kappa)
        log_c = nu * np.log(kappa) - np.log(bessel) - kappa.dtype.type(p / 2 * math.log(2 * math.pi))
        return log_c, scipy.special.iv(nu + 1, kappa) / bessel


def paper_log_c(kappa: torch.Tensor, p: int) -> torch.Tensor:
    """Eq. 5 of the DINO-vMF paper with its first term alone, U_0 = 1, line by line."""
    nu = p / 2 - 1
    r = kappa / nu
    root = torch.sqrt(1 + r * r)
    eta = root + torch.log(r / (1 + root))
    log_bessel = nu * eta - 0.5 * math.log(2 * math.pi * nu) - 0.5 * torch.log(root)
    return nu * torch.log(kappa) - log_bessel - p / 2 * math.log(2 * math.pi)


def paper(kappa: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's formula and its slope by autograd, which is how it is trained. Undefined at p = 2, where nu = 0."""
    if p == 2:
        return np.full_like(kappa, np.nan), np.full_like(kappa, np.nan)
    x = torch.from_numpy(kappa).requires_grad_()
    log_c = paper_log_c(x, p)
    (slope,) = torch.autograd.grad(log_c.sum(), x)
    return log_c.detach().numpy(), -slope.numpy()


def mpmath_besseli(kappa: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """mpmath at its default 15 digits, one point after the other; nan where its series does not converge."""
    import mpmath

    nu = mpmath.mpf(p) / 2 - 1
    points = []
    for k in kappa.tolist():
        try:
            bessel = mpmath.besseli(nu, k)
            log_c = nu * mpmath.log(k) - mpmath.log(bessel) - mpmath.mpf(p) / 2 * mpmath.log(2 * mpmath.pi)
            points.append((float(log_c), float(mpmath.besseli(nu + 1, k) / bessel)))
        except (ArithmeticError, ValueError, mpmath.NoConvergence):
            points.append((math.nan, math.nan))
    log_c, resultant = np.array(points).T
    return log_c, resultant


def tfp(kappa: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """TensorFlow Probability: log_bessel_ive and its GradientTape, in one graph."""
    return tuple(result.numpy() for result in _tfp_graph(p)(kappa))


@lru_cache
def _tfp_graph(p: int) -> Callable[[np.ndarray], tuple[Any, Any]]:
    import tensorflow as tf
    import tensorflow_probability as tfp

    @tf.function
    def graph(x: Any) -> tuple[Any, Any]:
        nu = tf.constant(p / 2 - 1, x.dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            log_c = nu * tf.math.log(x) - tfp.math.log_bessel_ive(nu, x) - x
            log_c -= tf.constant(p / 2 * math.log(2 * math.pi), x.dtype)
        return log_c, -tape.gradient(log_c, x)

    return lambda kappa: graph(tf.constant(kappa))


def available() -> dict[str, Method]:
    """The vectorised methods that can run here, by the name the tables use."""
    methods = {"scipy.special.ive": scipy_ive, "scipy.special.iv": scipy_iv, "DINO-vMF paper, U_0": paper}
    if importlib.util.find_spec("tensorflow_probability"):
        methods["TFP log_bessel_ive"] = tfp
    return methods
