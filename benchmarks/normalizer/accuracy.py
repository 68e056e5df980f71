"""Errors of every method at every point of tests/data/normalizer_truth.csv, in eps of the dtype."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.normalizer.peers import available, mpmath_besseli
from benchmarks.normalizer.truth import Exact, Truth, load_truth
from benchmarks.progress import progress
from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

OURS, OURS_COMPILED = "vmf_heads", "vmf_heads, compiled"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
QUICK = (3, 64, 256, 4096)
COMPILED = (64, 256, 1024)  # building a kernel takes seconds
PLAIN_MPMATH = (3, 256)  # a point takes up to a second


def measure(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """One row per method, dtype and p; what the columns hold is said in `_score` and `_training_score`."""
    table = {p: truth for p, truth in load_truth().items() if not quick or p in QUICK}
    rows = []
    for p, truth in progress(table.items(), desc="accuracy"):
        for name, dtype in DTYPES.items():
            kappa = truth.kappa.astype(name)
            rows.append(_row(OURS, truth, *_ours(kappa, dtype, p, device, compiled=False)))
            if p in COMPILED and not quick:
                rows.append(_row(OURS_COMPILED, truth, *_ours(kappa, dtype, p, device, compiled=True)))
            for method, function in available().items():
                rows.append(_row(method, truth, *relative(truth, *function(kappa, p)), None))
        if p in PLAIN_MPMATH and not quick:
            # Below 1e5 only: above, single points take minutes.
            few = np.flatnonzero((truth.kappa >= 1e-8) & (truth.kappa <= 1e5))
            subset = _subset(truth, few)
            rows.append(_row("mpmath.besseli", subset, *relative(subset, *mpmath_besseli(subset.kappa, p)), None))
    return rows


def measure_ours(device: str, dimensions: Iterable[int] | None = None, *, compiled: bool) -> list[dict[str, Any]]:
    """The rows of `measure` that are ours, at these dimensions or at all: of plain operations or of kernels."""
    method, table = OURS_COMPILED if compiled else OURS, load_truth()
    rows = []
    for p in table if dimensions is None else dimensions:
        for name, dtype in DTYPES.items():
            scored = _ours(table[p].kappa.astype(name), dtype, p, device, compiled=compiled)
            rows.append(_row(method, table[p], *scored))
    return rows


def _ours(kappa: np.ndarray, dtype: torch.dtype, p: int, device: str, *, compiled: bool) -> tuple[np.ndarray, ...]:
    """D, A and A', the last two by the derivatives that training uses."""
    x = torch.from_numpy(kappa).to(device).requires_grad_()
    value = log_vmf_normalizer(x, p, relative=True, compiled=compiled)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    (slope,) = torch.autograd.grad(vmf_mean_resultant(x, p, compiled=compiled).sum(), x)
    return tuple(tensor.detach().cpu().numpy() for tensor in (value, -gradient, slope))


def relative(truth: Truth, log_c: np.ndarray, resultant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D, A) of a method that returns log C_p: D is what a softmax is left with once the constant is gone."""
    with np.errstate(invalid="ignore"):
        difference = (log_c.astype(np.float64) - truth.log_c.high[0]) - truth.log_c.low[0]
    return difference.astype(log_c.dtype), resultant


def _row(
    method: str, truth: Truth, value: np.ndarray, resultant: np.ndarray, slope: np.ndarray | None
) -> dict[str, Any]:
    finite = np.isfinite(value) & np.isfinite(resultant)
    row = {
        "method": method,
        "dtype": str(value.dtype),
        "p": truth.p,
        "points": len(value),
        "non_finite": int((~finite).sum()),
        **_score("value", truth.log_c_relative, value),
        **_score("resultant", truth.mean_resultant, resultant),
        **_training_score(truth, value, resultant),
    }
    if slope is not None:
        row |= _score("slope", truth.slope, slope)
    return row


def _score(name: str, exact: Exact, got: np.ndarray) -> dict[str, Any]:
    """Largest and root-mean-square relative error in eps, and how many exceed 4, over finite results of normal size."""
    scored = np.isfinite(got) & exact.normal(got.dtype)
    error = np.abs(exact.error(got, got.dtype)[scored])
    rms = np.sqrt(np.mean(error**2)) if error.size else np.nan
    return {f"{name}_max": _largest(error), f"{name}_rms": _short(rms), f"{name}_above_4": int((error > 4).sum())}


def _training_score(truth: Truth, value: np.ndarray, resultant: np.ndarray) -> dict[str, Any]:
    """What a prototype head sees, kappa in [1, 1000]: the value's error in nats, the gradient's relative error."""
    seen = (truth.kappa >= 1) & (truth.kappa <= 1000)
    finite = seen & np.isfinite(value) & np.isfinite(resultant)
    nats = np.abs(truth.log_c_relative.error(value, value.dtype) * truth.log_c_relative.high)[finite]
    relative_error = np.abs(truth.mean_resultant.error(resultant, resultant.dtype))[finite]
    eps = float(np.finfo(value.dtype).eps)
    return {
        "training_points": int(seen.sum()),
        "training_non_finite": int((seen & ~finite).sum()),
        "training_value_nats": _largest(nats * eps),
        "training_resultant_relative": _largest(relative_error * eps),
    }


def _largest(errors: np.ndarray) -> float | None:
    return _short(errors.max()) if errors.size else None


def _short(number: float) -> float:
    return float(f"{number:.3g}")  # errors span many orders of magnitude; their digits say nothing


def _subset(truth: Truth, where: np.ndarray) -> Truth:
    columns = (truth.log_c_relative, truth.log_c, truth.mean_resultant, truth.slope)
    return Truth(truth.p, truth.kappa[where], *(Exact(column.high[where], column.low[where]) for column in columns))
