"""Published vision transformers: every size is mapped to a model of transformers, and nothing else is taken for one."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from backbones.models_of_weights import build_model, check_names
from backbones.open_backbone import open_backbone
from backbones.original_names import backbone_weights, to_transformers
from backbones.timm_models import original_weights
from published_vits import PUBLISHED, Published, Shapes


@pytest.fixture
def _no_random_weights(monkeypatch):
    """On the meta device they would take most of the time, and are nothing."""
    monkeypatch.setattr(PreTrainedModel, "init_weights", lambda model: None)


def weights_of(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check(published: Published, weights: dict[str, Tensor], heads: int | None = None) -> None:
    """Every weight of the model is there, of its shape, and no other; on the meta device, which has no memory."""
    weights = backbone_weights(weights)
    with torch.device("meta"):
        model = build_model(weights, heads=heads)
    check_names(model, to_transformers(weights))
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == (published.dim, published.depth)
    assert (config.num_attention_heads, config.patch_size) == (published.heads, published.patch)
    assert getattr(config, "num_register_tokens", 0) == published.registers
    assert config.image_size == (518 if published.code == "dinov2" else 224) // published.patch * published.patch


@pytest.mark.usefixtures("_no_random_weights")
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_every_published_size_is_mapped(published):
    check(published, weights_of(published.shapes()))


def published_as(name: str) -> Published:
    return next(published for published in PUBLISHED if published.name == name)


@pytest.mark.usefixtures("_no_random_weights")
def test_chunked_blocks_and_heads_of_a_training_of_dinov2():
    published = published_as("dinov2-dinov2_vits14")
    shapes = {
        (f"blocks.{int(name.split('.')[1]) // 3}.{name.removeprefix('blocks.')}" if "blocks." in name else name): shape
        for name, shape in published.shapes().items()
    }
    assert "blocks.3.11.norm1.weight" in shapes
    check(published, weights_of(shapes | {"dino_head.mlp.0.weight": (8, 8), "ibot_head.last_layer.weight_v": (8, 8)}))


@pytest.mark.usefixtures("_no_random_weights")
@pytest.mark.parametrize("name", ["dino-vit_small-16", "dinov2-dinov2_vitb14", "dinov2-dinov2_vitg14_reg"])
def test_names_of_timm(name):
    """As its own models have them: see `test_encoders_of_timm_itself`."""
    published = published_as(name)
    shapes = {key: shape for key, shape in published.shapes().items() if key != "mask_token"}
    if published.registers:
        shapes["reg_token"] = shapes.pop("register_tokens")
        shapes["pos_embed"] = (1, 37 * 37, published.dim)
    shapes = {key.replace("w12", "fc1").replace("w3", "fc2"): shape for key, shape in shapes.items()}
    check(published, original_weights(weights_of(shapes)))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("conv1.weight", "layer1.0.conv1.weight"), "a ResNet"),
        (("cls_token", "blocks.0.attn.temperature", "cls_attn_blocks.0.norm1.weight"), "an XCiT"),
        (("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"), "a Swin transformer"),
        (("downsample_layers.0.0.weight", "stages.0.0.gamma"), "a ConvNeXt"),
    ],
)
def test_what_is_published_beside_them_is_called_what_it_is(names, what, tmp_path):
    torch.save({"teacher": {f"module.backbone.{name}": torch.ones(2, 2) for name in names}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"file\.pth' cannot be opened: these are the weights of {what}, not of a vi"):
        open_backbone(str(tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_embed.periods": torch.zeros(4)}, r"rope_embed\.periods \(=\[0\.0, .*must be a number > 0 for four col"),
        ({"rope_embed.periods": torch.ones(2, 2)}, r"no vision transformer of .*: patch_embed.*periods \(2, 2\)$"),
        ({"blocks.0.attn.qkv.weight": torch.ones(47, 16)}, r"qkv\.weight \(of shape \(47, 16\)\) must hold 3 parts"),
        ({"storage_tokens": None}, r"the weights are not those of a DINOv3ViTModel; .*register_tokens"),
        ({"cls_norm.weight": torch.ones(16)}, r"DINOv3ViTModel; unexpected: cls_norm\.weight"),
    ],
)
def test_damaged_files_of_dinov3_are_refused(change, message, tmp_path):
    tiny = Published("dinov3", "", "", 16, 1, 1, 8, registers=2)
    weights = {name: torch.ones(shape) for name, shape in tiny.shapes().items()} | change
    torch.save({name: value for name, value in weights.items() if value is not None}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"(?s)file\.pth' cannot be opened: .*{message}"):
        open_backbone(str(tmp_path / "file.pth"))
