"""von Mises-Fisher prototype heads, centring and normaliser for DINO, iBOT and MSN in PyTorch."""

from .centering import ProbabilityCentering
from .cross_entropy import prototype_cross_entropy
from .head import VMFPrototypeHead, set_temperature
from .prototypes import HeadOutput
from .report import prototype_report
from .special import log_vmf_normalizer, vmf_mean_resultant
from .teacher import TeacherTargets

__version__ = "0.1.0"

__all__ = [
    "HeadOutput",
    "ProbabilityCentering",
    "TeacherTargets",
    "VMFPrototypeHead",
    "log_vmf_normalizer",
    "prototype_cross_entropy",
    "prototype_report",
    "set_temperature",
    "vmf_mean_resultant",
]
