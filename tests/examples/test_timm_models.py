"""Encoders of timm by name: the tokens are timm's own, and what would give others is refused."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.open_backbone import open_backbone
from dino_vit import dino_tokens, dino_weights
from evaluators.features.encoder import open_encoder

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Encoder:
    """What the evaluations use of a model of timm; `add` makes its tokens others than those of its weights."""

    def __init__(self, *, add: float = 0.0, mean: tuple[float, ...] = IMAGENET["mean"]) -> None:
        self.weights, self.add = dino_weights(), add
        self.pretrained_cfg = IMAGENET | {"mean": mean}
        self.blocks = [SimpleNamespace(attn=SimpleNamespace(num_heads=2))] * 3

    def eval(self) -> "Encoder":
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def forward_features(self, images: Tensor) -> Tensor:
        return dino_tokens(self.weights, images, heads=2) + self.add


def install(monkeypatch: pytest.MonkeyPatch, **models: Encoder) -> None:
    """A module `timm` with these models."""

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> Encoder:
        assert pretrained
        assert num_classes == 0
        if name not in models:
            raise RuntimeError(f"Unknown model ({name})")
        return models[name]

    timm: Any = ModuleType("timm")
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_an_encoder_by_its_name(monkeypatch):
    """Also at a resolution that is not its own, where the position embeddings are interpolated as DINO's."""
    model = Encoder()
    install(monkeypatch, tiny=model)
    encoder = open_encoder("timm:tiny")
    assert (encoder.patch_size, encoder.dim, encoder.depth, encoder.image_size) == (8, 16, 3, 32)
    for size in ((32, 32), (24, 48)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(encoder.layers(images)[0], model.forward_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Encoder(add=0.1), r"timm's `tiny` is no vision .* same weights its tokens \(1, 17, 16\) differ by \d+\.\d%"),
        (Encoder(mean=(0.5, 0.5, 0.5)), r"timm's `tiny` expects images of mean \(0\.5, 0\.5, 0\.5\) and deviation"),
        (None, r"timm opens no pretrained model `tiny`: Unknown model \(tiny\)"),
    ],
)
def test_other_encoders_are_refused(model, message, monkeypatch):
    install(monkeypatch, **({} if model is None else {"tiny": model}))
    with pytest.raises(ValueError, match=message):
        open_backbone("timm:tiny")


def test_weights_of_another_architecture_are_refused(monkeypatch):
    model = Encoder()
    model.weights |= {"norm_pre.weight": torch.ones(16)}
    install(monkeypatch, tiny=model)
    with pytest.raises(ValueError, match=r"timm's `tiny` is no vision .* of a ViTModel; unexpected: norm_pre\.weight"):
        open_backbone("timm:tiny")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"`timm:tiny` needs the package `timm`: pip install timm"):
        open_backbone("timm:tiny")


SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "image_size", "registers", "options"),
    [
        ("vit_small_patch16_224.dino", 64, 0, {}),
        ("vit_small_patch14_dinov2.lvd142m", 56, 0, {}),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", 56, 4, {}),
        ("deit3_small_patch16_224.fb_in1k", 64, 0, {}),  # no position embedding for [CLS]
    ],
)
def test_encoders_of_timm_itself(name, image_size, registers, options, monkeypatch):
    """Skipped where timm does not import, which is so wherever its torchvision was built for another torch."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not import: {error}")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0, **SMALL, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    encoder = open_encoder(f"timm:{name}")
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        want = model.forward_features(images)
    got = encoder.layers(images)[0]
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(got[:, 1:], want[:, 1 + registers :], rtol=0, atol=1e-4)
    assert encoder.model.config.num_attention_heads == 2
