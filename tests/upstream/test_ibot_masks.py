"""The same random numbers give the masks of bytedance/ibot, block by block."""

import importlib.util
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from data.masking import block_mask
from upstream.checkouts import copy_of


class Images:
    """A stand-in for torchvision's ImageFolder: one view of 14 x 10 patches of 2 px."""

    def __init__(self) -> None: ...

    def __getitem__(self, index: int) -> tuple:
        return [np.zeros((3, 28, 20))], 0


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_masks_are_the_originals(ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy_of("ibot", tmp_path) / "loader.py"
    datasets = types.SimpleNamespace(ImageFolder=Images)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    spec = importlib.util.spec_from_file_location("loader", path)
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    original = loader.ImageFolderMask(
        patch_size=2, pred_ratio=ratio, pred_ratio_var=0, pred_aspect_ratio=(0.3, 1 / 0.3)
    )
    for seed in range(200):
        random.seed(seed)
        (mask,) = original[0][2]
        assert np.array_equal(block_mask(14, 10, ratio, random.Random(seed)).numpy(), mask)
