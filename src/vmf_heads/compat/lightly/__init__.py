"""DINO-vMF, and its patch losses, inside lightly: the original's names and signatures.

The change to a training script, such as lightly's examples/pytorch/dino.py::

    -from lightly.loss import DINOLoss
    -from lightly.models.modules import DINOProjectionHead
    +from vmf_heads.compat.lightly import DINOLoss, DINOProjectionHead

    +criterion.attach(model.student_head, model.teacher_head)   # after both are built

and to one that trains with patches, such as examples/pytorch/dinov2.py, likewise with `DINOv2ProjectionHead` and
`IBOTPatchLoss`::

    +dino_criterion.attach(model.student_head, model.teacher_head, head="dino_head")
    +ibot_criterion.attach(model.student_head, model.teacher_head, head="ibot_head")

`norm_last_layer` defaults to False here (True in lightly): with frozen norms the vMF normalisation changes nothing.
"""

from .dino_loss import DINOLoss
from .heads import DINOProjectionHead, DINOv2ProjectionHead
from .patch_losses import IBOTPatchLoss, IBOTPlusPlusPatchLoss

__all__ = ["DINOLoss", "DINOProjectionHead", "DINOv2ProjectionHead", "IBOTPatchLoss", "IBOTPlusPlusPatchLoss"]
