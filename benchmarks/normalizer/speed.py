"""Nanoseconds per element at the size of a prototype head: 65 536 concentrations at p = 256."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.normalizer.peers import available, mpmath_besseli, paper_log_c
from benchmarks.timing import interleaved_medians
from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

ELEMENTS, DIMENSION = 65_536, 256
MPMATH_ELEMENTS = 16

Call = Callable[[], object]


def measure(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """One row per method, dtype and task ("value": log C_p; "value and A": both; "value and gradient": by autograd)."""
    contenders: dict[tuple[str, str, str], Call] = {}
    rng = np.random.default_rng(0)
    for name in ("float32", "float64"):
        kappa = rng.uniform(5, 500, ELEMENTS).astype(name)
        x = torch.from_numpy(kappa).to(device)
        contenders |= {(method, name, task): call for (method, task), call in _torch_contenders(x).items()}
        if device == "cpu":
            contenders |= {(method, name, task): call for (method, task), call in _peer_contenders(kappa).items()}
    # A method's name and dtype are the label a row of timings goes by.
    seconds = interleaved_medians(
        {" | ".join(key): call for key, call in contenders.items()},
        rounds=3 if quick else 7,
        seconds=0.01 if quick else 0.1,
        device=device,
    )
    rows = []
    for method, dtype, task in contenders:
        elements = MPMATH_ELEMENTS if method == "mpmath.besseli" else ELEMENTS
        nanoseconds = 1e9 * seconds[f"{method} | {dtype} | {task}"] / elements
        rows.append({"method": method, "dtype": dtype, "task": task, "ns_per_element": float(f"{nanoseconds:.3g}")})
    return rows


def _torch_contenders(x: Tensor) -> dict[tuple[str, str], Call]:
    leaf = x.clone().requires_grad_()

    def value(kappa: Tensor) -> Tensor:
        return log_vmf_normalizer(kappa, DIMENSION, compiled=False)

    def both(kappa: Tensor) -> tuple[Tensor, Tensor]:
        return value(kappa), vmf_mean_resultant(kappa, DIMENSION, compiled=False)

    def gradient(function: Callable[[Tensor], Tensor]) -> object:
        return torch.autograd.grad(function(leaf).sum(), leaf)

    compiled_both, compiled_value = torch.compile(both, fullgraph=True), torch.compile(value, fullgraph=True)
    own_kernel = partial(log_vmf_normalizer, p=DIMENSION, compiled=True)
    literal = partial(paper_log_c, p=DIMENSION)
    return {
        ("vmf_heads, eager", "value"): partial(value, x),
        ("vmf_heads, eager", "value and A"): partial(both, x),
        ("vmf_heads, eager", "value and gradient"): partial(gradient, value),
        ("vmf_heads, compiled", "value"): partial(compiled_value, x),
        ("vmf_heads, compiled", "value and A"): partial(compiled_both, x),
        ("vmf_heads, compiled", "value and gradient"): partial(gradient, compiled_value),
        ("vmf_heads, compiled=True", "value"): partial(own_kernel, x),
        ("vmf_heads, compiled=True", "value and gradient"): partial(gradient, own_kernel),
        ("DINO-vMF paper, U_0, eager", "value"): partial(literal, x),
        ("DINO-vMF paper, U_0, eager", "value and gradient"): partial(gradient, literal),
        ("torch.log (for scale)", "value"): partial(torch.log, x),
    }


def _peer_contenders(kappa: np.ndarray) -> dict[tuple[str, str], Call]:
    import scipy.special

    nu = kappa.dtype.type(DIMENSION / 2 - 1)
    calls: dict[tuple[str, str], Call] = {
        # The Bessel function alone, so that nobody pays for our way of writing the rest.
        ("scipy.special.ive", "value"): partial(scipy.special.ive, nu, kappa),
        ("scipy.special.iv", "value"): partial(scipy.special.iv, nu, kappa),
    }
    for method, function in available().items():
        if method != "DINO-vMF paper, U_0":  # timed above, without the detour through NumPy
            task = "value and gradient" if method.startswith("TFP") else "value and A"
            calls[method, task] = partial(function, kappa, DIMENSION)
    if kappa.dtype == np.float64:
        calls["mpmath.besseli", "value and A"] = partial(mpmath_besseli, kappa[:MPMATH_ELEMENTS], DIMENSION)
    return calls
