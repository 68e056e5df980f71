"""Few-shot evaluation beside facebookresearch/msn: its lists of images, and the features its script regresses on."""

import importlib
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.images import Images
from evaluators.features.encoder import open_encoder
from evaluators.few_shot.few_shot import before_final_norm, normalize
from evaluators.few_shot.splits import listed_sets
from upstream.checkouts import copy_of


def test_published_lists(tmp_path):
    checkout = copy_of("msn", tmp_path)
    lists = sorted(checkout.rglob("*.txt"))
    names = sorted({name for path in lists for name in path.read_text().split()})
    classes = sorted({name.split("_")[0] for name in names})
    assert len(classes) == 1000
    labels = np.array([classes.index(name.split("_")[0]) for name in names])
    images = Images("folder", "train", classes, labels, [Path("train", name.split("_")[0], name) for name in names])
    sets = listed_sets(checkout, images)
    assert Counter(chosen.name for chosen in sets) == {"1-shot": 3, "2-shot": 3, "5-shot": 3, "1percent": 1}
    for path, chosen in zip(lists, sets, strict=True):
        assert [names[row] for row in chosen.rows] == path.read_text().split()


def test_features_are_those_of_its_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(copy_of("msn", tmp_path))
    try:
        deit = importlib.import_module("src.deit")
    finally:
        for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
            del sys.modules[name]
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = deit.VisionTransformer(embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True, norm_layer=norm)
    model.fc = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        images = torch.randn(6, 3, 224, 224)
        expected = model.eval().forward_blocks(images, 1, 0.0)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"target_encoder": weights, "epoch": 1}, tmp_path / "msn.pth.tar")
    encoder = open_encoder(tmp_path / "msn.pth.tar", heads=2)
    with torch.no_grad():
        features = before_final_norm(encoder, encoder.cls(images).numpy())
    assert np.abs(normalize(features) - normalize(expected.numpy())).max() < 1e-5
