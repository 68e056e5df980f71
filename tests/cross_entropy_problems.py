"""Random inputs of `prototype_cross_entropy`, and what its reference makes of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_heads.cross_entropy import prototype_cross_entropy_reference

# (student rows, teacher rows, prototypes K, dimension p, targets per row M): primes and ones on purpose
SHAPES = [(1, 1, 2, 2, 1), (7, 5, 13, 3, 2), (31, 11, 101, 17, 3), (6, 2, 5, 4, 1)]
GRADIENTS = ("student_features", "student_prototypes", "student_log_normalizer")
SCALED_GRADIENTS = (*GRADIENTS, "student_scale")


def problem(
    shape: tuple[int, int, int, int, int],
    *,
    scales: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments with uneven norms, rows without a target and zero weights; temperatures as in DINO.

    With `scales` the prototypes are directions, of any length, and have scales of either sign, the first of them 0.
    """
    ns, nt, k, p, m = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = torch.rand(ns, m, **options)
    weights[torch.rand(ns, m) < 0.2] = 0
    arguments = {
        "student_features": normalize(torch.randn(ns, p, **options), dim=1).requires_grad_(),
        "student_prototypes": torch.randn(k, p, **options).requires_grad_(),
        "teacher_features": normalize(torch.randn(nt, p, **options), dim=1),
        "teacher_prototypes": torch.randn(k, p, **options),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "student_log_normalizer": torch.randn(k, **options).requires_grad_(),
        "teacher_log_normalizer": torch.randn(k, **options),
        "log_center": torch.randn(k, **options),
        "targets": torch.randint(-1, nt, (ns, m), device=device),
        "weights": weights,
    }
    if scales:
        for name in ("student_scale", "teacher_scale"):
            arguments[name] = torch.randn(k, **options)
            arguments[name][0] = 0
        arguments["student_scale"].requires_grad_()
    return arguments


def reference(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """The reference's results in float64 for any arguments of the fused loss but `reduction` and `chunk_rows`."""
    known = {key: value for key, value in arguments.items() if key not in ("reduction", "chunk_rows")}
    if known.get("targets") is None:
        rows = len(known["student_features"])
        known["targets"] = torch.arange(rows, device=known["student_features"].device)[:, None]
    if known.get("weights") is None:
        known["weights"] = torch.ones_like(known["targets"])
    exact = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in known.items()
        if value is not None
    }
    return prototype_cross_entropy_reference(**exact)


def gradients(loss: Tensor, arguments: dict[str, Any], *, retain_graph: bool = False) -> dict[str, Tensor]:
    """d loss / d argument of those arguments that carry gradients."""
    wanted = {
        name: arguments[name]
        for name in SCALED_GRADIENTS
        if arguments.get(name) is not None and arguments[name].requires_grad
    }
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), retain_graph=retain_graph), strict=True))
