"""The sections of a recipe that only one method has."""

from __future__ import annotations

import dataclasses

from config.settings import LOWEST_TEMPERATURE, Ranges, check_ranges, is_share, is_temperature


@dataclasses.dataclass(frozen=True)
class IBOTSettings:
    """What iBOT adds to DINO: masked patches and their objective (Zhou et al., 2022; appendix A.5 of the paper)."""

    mask_probability: float  # probability that a global crop has masked patches at all
    mask_ratio: tuple[float, float]  # of its patches that are masked, drawn uniformly; iBOT has 0.1 to 0.5
    mask_start_epoch: int  # before it nothing is masked
    shared_head: bool  # whether [CLS] and patches have the same prototypes
    patch_out_dim: int  # prototypes of the patches, K2; with a shared head out_dim
    patch_teacher_temp_warmup: float  # at mask_start_epoch; it rises for teacher_temp_warmup_epochs
    patch_teacher_temp: float  # the one that it rises to
    patch_center_momentum: float  # of the centre of the patches, a moving average
    cls_weight: float  # weight of the [CLS] objective in the loss, lambda_1
    patch_weight: float  # weight of the objective of the patches, lambda_2

    def __post_init__(self) -> None:
        check_ranges(self, _IBOT_RANGES, "ibot.")


@dataclasses.dataclass(frozen=True)
class MSNSettings:
    """What MSN has of its own (Assran et al., 2022); the sharpening T is teacher_temp / student_temp.

    One global crop is the target. The others and the local crops, MSN's focal views, are the anchors.
    """

    rand_views: int  # anchors among the global crops, in addition to the target
    patch_drop: float  # share of the patches of such an anchor that are left out
    me_max_weight: float  # weight of ln K - entropy of the anchors' mean prediction, which keeps the prototypes in use
    entropy_weight: float  # weight of the mean entropy of the anchors' predictions
    sinkhorn: bool  # whether Sinkhorn-Knopp balances the targets over the prototypes

    def __post_init__(self) -> None:
        check_ranges(self, _MSN_RANGES, "msn.")


_IBOT_RANGES: Ranges = (
    (("mask_probability", "patch_center_momentum"), "in [0, 1]", is_share),
    (("mask_ratio",), "(low, high) with 0 <= low <= high <= 1", lambda ratio: 0 <= ratio[0] <= ratio[1] <= 1),
    (("mask_start_epoch", "patch_weight"), "at least 0", lambda value: value >= 0),
    (("patch_out_dim",), "at least 2", lambda value: value >= 2),
    (("patch_teacher_temp_warmup", "patch_teacher_temp"), f"at least {LOWEST_TEMPERATURE}", is_temperature),
    (("cls_weight",), "positive", lambda value: value > 0),
)
_MSN_RANGES: Ranges = (
    (("rand_views",), "at least 1", lambda value: value >= 1),
    (("patch_drop",), "in [0, 1)", lambda value: 0 <= value < 1),
    (("me_max_weight", "entropy_weight"), "at least 0", lambda value: value >= 0),
)
