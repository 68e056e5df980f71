"""Test sets of the same classes in another distribution: how their folders are laid out, and what mCE is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's top-1 error on each corruption of ImageNet-C, the mean over its five severities (Hendrycks and Dietterich,
"Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019), with the digits that are
in AugMix's `imagenet.py` (Hendrycks et al., ICLR 2020)."""
VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The corruptions of ImageNet-C that its authors give for validation; they are no part of its means."""
SEVERITIES = (1, 2, 3, 4, 5)
IMAGENET_IMAGES, IMAGENET_CLASSES = 50_000, 1000


def corrupted_folders(root: Path) -> dict[str, dict[int, Path]]:
    """Return CORRUPTION -> severity -> folder of class folders; empty where a folder is laid out in another way.

    The layouts are ROOT/CORRUPTION/SEVERITY/CLASS and, where ImageNet-C's archives are unpacked side by side,
    ROOT/KIND/CORRUPTION/SEVERITY/CLASS.
    """
    found: dict[str, dict[int, Path]] = {}
    for pattern in ("*/[1-5]", "*/*/[1-5]"):
        for folder in sorted(root.glob(pattern)):
            if folder.is_dir() and any(inside.is_dir() for inside in folder.iterdir()):
                found.setdefault(folder.parent.name, {})[int(folder.name)] = folder
        if found:
            break
    return found


def class_numbers(own: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return which of `classes` each class of another set is (n,), by the names of their folders.

    ImageNet-V2 numbers its folders from 0 to 999, in the order in which ImageNet's names are sorted: where no name is
    one of the classes, such numbers are places among them.

    Raises ValueError when a class is unknown.
    """
    place = {name: number for number, name in enumerate(classes)}
    if not any(name in place for name in own) and all(name.isdecimal() for name in own):
        place = {str(number): number for number in range(len(classes))}
    if unknown := [name for name in own if name not in place]:
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(f"{len(unknown)} of {len(own)} classes are none of the data's {len(classes)}: {some}")
    return np.array([place[name] for name in own], np.int64)


def mean_over_corruptions(by_corruption: Mapping[str, float]) -> float:
    """Return the mean over the corruptions, without those for VALIDATION unless there are no others."""
    counted = [value for name, value in by_corruption.items() if name not in VALIDATION]
    return float(np.mean(counted or list(by_corruption.values())))


def mean_corruption_error(by_severity: Mapping[str, Mapping[int, float]]) -> float:
    """Return mCE, where AlexNet's is 1, of the top-1 accuracies of each corruption of ImageNet-C at each severity.

    It is the mean over the 15 corruptions of sum_s E_s / sum_s E_s^AlexNet, E the top-1 error at the severity s.
    """
    errors = {name: 1 - np.mean([by_severity[name][severity] for severity in SEVERITIES]) for name in ALEXNET_ERRORS}
    return float(np.mean([errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items()]))
