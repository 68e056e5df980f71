"""Compares the steps of a training with float64 references; what it collects is what `checkouts.check_*` look at."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]


def empty_result() -> dict[str, Any]:
    return {"losses": [], "errors": [], "errors_at_wrong_temperature": []}


def errors(value: Tensor, gradients: Gradients, want: Tensor, expected: Gradients) -> dict[str, float]:
    """Relative errors of the loss, and of its gradients grouped by the part of the model."""
    found = {"loss": float(((value.double() - want) / want).abs())}
    for part in ("weight_g", "weight_v", "last_layer.weight", ""):
        names = [n for n in expected if ("last_layer" not in n if not part else n.endswith(part))]
        if not names:  # prototypes have either the first two or, without weight normalisation, the third
            continue
        difference = torch.cat([(gradients[n].double() - expected[n]).flatten() for n in names])
        exact = torch.cat([expected[n].flatten() for n in names])
        found[part or "backbone and mlp"] = float(difference.norm() / exact.norm())
    return found


def spread_norms(heads: Mapping[float, Any]) -> None:
    """Prototype norms from the key to 4."""
    for lowest, head in heads.items():
        weight_g = head.last_layer.weight_g
        weight_g.data = torch.linspace(lowest, 4, len(weight_g)).unsqueeze(1)
