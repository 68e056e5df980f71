"""EsViT with vMF prototypes: `DINOHead`, `DINOLoss` and `DDINOLoss` with the original's names and signatures.

Experimental: the paper has DINO and iBOT only. The change to main_esvit.py, to be run with `--norm_last_layer false`::

    -from models.vision_transformer import DINOHead
    +from vmf_heads.compat.esvit import DDINOLoss as VMFDDINOLoss, DINOHead, DINOLoss as VMFDINOLoss

    -        dino_loss = DDINOLoss(
    +        dino_loss = VMFDDINOLoss(
    -        dino_loss = DINOLoss(
    +        dino_loss = VMFDINOLoss(

    +    dino_loss.attach(student, teacher)     # after both are built and wrapped

(The aliases are needed because main_esvit.py defines its own classes of these names further down.)
"""

from ..dino import DINOHead
from .region_loss import DDINOLoss
from .view_loss import DINOLoss

__all__ = ["DDINOLoss", "DINOHead", "DINOLoss"]
