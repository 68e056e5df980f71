"""iBOT-vMF inside bytedance/ibot: `iBOTHead` and `iBOTLoss` with the original's names and signatures.

The change to main_ibot.py, to be run with `--norm_last_layer false`::

    -from models.head import iBOTHead
    +from vmf_heads.compat.ibot import iBOTHead, iBOTLoss as VMFiBOTLoss

    -    ibot_loss = iBOTLoss(
    +    ibot_loss = VMFiBOTLoss(

    +    ibot_loss.attach(student, teacher)     # after both are built and wrapped

(The alias is needed because main_ibot.py defines its own class iBOTLoss further down, which would shadow the import.)
The accuracy `acc` that main_ibot.py logs compares the argmax of the teacher's raw scores with that of the student's
logits; in the original both are scores. With fused=True a line in front of it asks the loss for them:
`with_cls_logits`.
"""

from .head import iBOTHead
from .loss import iBOTLoss

__all__ = ["iBOTHead", "iBOTLoss"]
