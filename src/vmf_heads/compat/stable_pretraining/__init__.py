"""stable-pretraining with vMF prototypes: its projector and its losses, with the originals' names and signatures.

Experimental where the method is DINOv2 or DINOv3. The change to stable_pretraining/methods/dino.py::

    -from stable_pretraining.losses import DINOv1Loss
    +from vmf_heads.compat.stable_pretraining import DINOProjector, DINOv1Loss

    -            _build_dino_projector(
    +            DINOProjector(

    +        self.dino_loss.attach(self.projector.student, self.projector.teacher)    # at the end of `__init__`

Its prototypes are a plain linear layer, so their norms are free from the start. Its centre starts from the first batch
instead of zero, and is not in its state dict; here it is in the loss's.

With `fused=True` the projectors return features and no logits exist. What stands for targets are then the teacher's
features, which the loss reads as the last `softmax_center_teacher` or `sinkhorn_knopp_teacher` says; the methods, which
view, join and select rows of them, stay as they are.
"""

from .dino_loss import DINOv1Loss
from .dinov2_loss import DINOv2Loss
from .patch_loss import iBOTPatchLoss
from .projector import DINOProjector

__all__ = ["DINOProjector", "DINOv1Loss", "DINOv2Loss", "iBOTPatchLoss"]
