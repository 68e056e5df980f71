"""What keeps prototypes distinct, both experimental: a regulariser of their directions, or online EM."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from config.settings import Ranges, check_fields, check_ranges


@dataclasses.dataclass(frozen=True)
class OnlineEMSettings:
    """Prototypes that are a vMF mixture, fitted to the teacher's features by online EM, with no gradient of the loss.

    See `methods.online_mixture`.
    """

    mlp: Literal["isometric", "keep"]  # how the head's MLP begins: as a projection, or at random; see warm_start_
    rows_per_prototype: float  # memory: at each step the past counts as so many rows (global crops) per prototype
    max_kappa: float  # bound of every kappa of the mixture; a component of one row alone has no other
    median_kappa: float  # in the heads, by one factor for all kappa; 0: as the mixture has them

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, "online_em.")


_RANGES: Ranges = (
    (("rows_per_prototype", "max_kappa"), "positive", lambda value: value > 0),
    (("median_kappa",), "at least 0", lambda value: value >= 0),
)


def check_prototypes(recipe: Any) -> None:
    """Raise ValueError, naming the field, where a recipe asks for distinct prototypes in a way that cannot be."""
    of_method = f"with `method` (={recipe.method!r})"
    if recipe.method == "msn":
        check_fields(recipe, ("prototype_koleo_weight",), f"0 {of_method}", lambda weight: weight == 0)
    if recipe.online_em is None:
        return
    if recipe.method != "dino":
        raise ValueError(f"`online_em` must be null {of_method}: only DINO's prototypes can follow an online EM")
    why = "with `online_em`, whose prototypes are a vMF mixture that no gradient trains"
    check_fields(recipe, ("normalization",), f"'vmf' {why}", lambda kind: kind == "vmf")
    check_fields(recipe, ("prototype_koleo_weight",), f"0 {why}", lambda weight: weight == 0)
