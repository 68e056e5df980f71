"""DINO-vMF inside solo-learn: `DINOHead` and `DINOLoss` with the original's names and signatures.

The change to solo/methods/dino.py, to be run with `norm_last_layer: False` in `method_kwargs`::

    -from solo.losses.dino import DINOLoss
    +from vmf_heads.compat.solo import DINOLoss

    +from vmf_heads.compat.solo import DINOHead    # behind the file's own class of this name, which it replaces
     class DINO(BaseMomentumMethod):

    +        self.dino_loss_func.attach(self.head, self.momentum_head)    # at the end of `__init__`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import at_least
from ..head import VMFPrototypeHead
from ..prototypes import HeadOutput
from .dino import DINOLoss as _DINOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOHead", "DINOLoss"]


class DINOHead(VMFPrototypeHead):
    """solo-learn's DINO head with log C_p of each prototype in its logits; see `VMFPrototypeHead`.

    Parameter names and order are solo-learn's: `mlp.*`, `last_layer.weight_g`, `last_layer.weight_v`.

    Args:
        in_dim: dimension of the backbone's features.
        num_prototypes: number of prototypes K.
        use_bn: batch normalisation after the hidden layers of the MLP; True by default, as in solo-learn.
        norm_last_layer: freeze the prototype norms at 1. False by default, unlike solo-learn's.
        num_layers: number of linear layers in the MLP; less than 1 counts as 1, as in solo-learn.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        temperature: as in `VMFPrototypeHead`; `DINOLoss.attach` sets it.
        normalizer: as in `VMFPrototypeHead`.

    Shape: (..., in_dim) to (..., num_prototypes), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    >>> import torch
    >>> from vmf_heads.compat.solo import DINOHead
    >>> DINOHead(32, num_prototypes=100, hidden_dim=16, bottleneck_dim=8)(torch.randn(4, 32)).shape
    torch.Size([4, 100])
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        use_bn: bool = True,
        norm_last_layer: bool = False,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        super().__init__(
            in_dim,
            at_least("num_prototypes", num_prototypes, 1),
            use_bn=use_bn,
            norm_last_layer=norm_last_layer,
            nlayers=max(num_layers, 1),
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            temperature=temperature,
            normalizer=normalizer,
        )


class DINOLoss(_DINOLoss):
    """solo-learn's DINO loss for vMF heads: that of `compat.dino` under solo-learn's names, `epoch` an attribute.

    With heads of prototype norm 1 and centering="logit" it is solo-learn's own loss.

    Args:
        num_prototypes: number of prototypes K.
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: the teacher's temperature after its warm-up.
        warmup_teacher_temp_epochs: how many epochs the teacher's temperature rises linearly from one to the other.
        num_epochs: the number of epochs of the training.
        student_temp: the student's temperature.
        num_large_crops: crops per image that the student's output has; the teacher's has 2.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        fused: see `vmf_heads.compat.dino.DINOLoss`.
        process_group: the ranks that share one centre; None means all of them.

    `attach(student_head, teacher_head)` must be called once. `epoch` is set by the training, as in solo-learn. State
    dict: `log_center` (K,) with probability centring; `center` (1, K), as in solo-learn, with logit centring.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9; da Costa et al., JMLR 2022.

    >>> import torch
    >>> from vmf_heads.compat.solo import DINOHead, DINOLoss
    >>> head, momentum_head = (DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = DINOLoss(32, 0.04, 0.07, warmup_teacher_temp_epochs=3, num_epochs=10)
    >>> loss.attach(head, momentum_head)
    >>> loss.epoch = 4
    >>> views = torch.randn(2 * 5, 16)
    >>> loss(head(views), momentum_head(views)).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            at_least("num_prototypes", num_prototypes, 1),
            at_least("num_large_crops", num_large_crops, 2),
            warmup_teacher_temp,
            teacher_temp,
            warmup_teacher_temp_epochs,
            at_least("num_epochs", num_epochs, 1),
            student_temp,
            center_momentum,
            centering=centering,
            center_on=center_on,
            center_start=center_start,
            fused=fused,
            process_group=process_group,
        )
        self.epoch = 0

    def forward(  # type: ignore[override]
        self, student_output: Tensor | HeadOutput, teacher_output: Tensor | HeadOutput, *, commit: bool = True
    ) -> Tensor:
        """The loss of what the attached heads returned: (num_large_crops * B, K) and (2 * B, K), crop by crop.

        Then the centre is updated, unless `commit` is False: with gradients accumulated over micro-batches, on all but
        the last.
        """
        return super().forward(student_output, teacher_output, self.epoch, commit=commit)

    @torch.no_grad()
    def targets(self, teacher_output: Tensor | HeadOutput) -> Tensor:  # type: ignore[override]
        """The teacher's probabilities (N, K), Eq. 7, at `epoch`; the centre stays as it is."""
        return super().targets(teacher_output, self.epoch)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor | HeadOutput, *, commit: bool = True) -> None:  # type: ignore[override]
        """One step of the centre from this batch, over all ranks; `forward` calls it."""
        super().update_center(teacher_output, self.epoch, commit=commit)
