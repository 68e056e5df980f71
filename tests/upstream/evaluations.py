"""Evaluation code of the original repositories, imported by path into this process."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from scipy.ndimage import binary_dilation


def load_file(path: Path, patch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module, also for the imports of other files, until `patch` is undone."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def prepare(patch: pytest.MonkeyPatch) -> None:
    """What these files need that is not here: a GPU, torchvision, OpenCV (used where it is), names dropped since."""
    patch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patch.setattr(np, "in1d", np.isin, raising=False)
    patch.setattr(Image, "ANTIALIAS", Image.Resampling.LANCZOS, raising=False)
    patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # one of them sets it
    empty = types.SimpleNamespace()
    folder = types.SimpleNamespace(ImageFolder=object)
    patch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=empty, transforms=empty, datasets=folder))
    patch.setitem(sys.modules, "vision_transformer", empty)
    try:
        importlib.import_module("cv2")
    except ImportError:
        patch.setitem(sys.modules, "cv2", types.SimpleNamespace(imread=_imread, resize=_resize, dilate=_dilate))


def _imread(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[:, :, ::-1]


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    assert size == image.shape[1::-1], "the stand-in for OpenCV does not resize"
    return image


def _dilate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return binary_dilation(image, kernel).astype(image.dtype)
