"""Every source of a backbone gives the tokens of its own model, and nothing else opens."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from dino_vit import dino_positions, dino_tokens, dino_weights
from evaluators.features.encoder import as_encoder, open_encoder, reinitialized

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
MODELS = {
    "ViT": (ViTModel, ViTConfig(**SMALL, image_size=32, initializer_range=0.3), 0),
    "MSN": (ViTMSNModel, ViTMSNConfig(**SMALL, image_size=32, initializer_range=0.3), 0),
    "DINOv2": (Dinov2Model, Dinov2Config(**SMALL, image_size=32, initializer_range=0.3), 0),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SMALL, image_size=32, initializer_range=0.3, num_register_tokens=3),
        3,
    ),
    "DINOv3": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**SMALL, image_size=32, initializer_range=0.3, num_register_tokens=2),
        2,
    ),
}


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
def test_a_folder_that_auto_model_opens(name, height, width, tmp_path):
    model_class, config, registers = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    assert (encoder.patch_size, encoder.dim, encoder.depth, encoder.image_size) == (8, 16, 3, 32)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    outputs = []
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: outputs.append(output))
    options = {"interpolate_pos_encoding": True} if name in ("ViT", "MSN") else {}
    norm = model.norm if name == "DINOv3" else model.layernorm
    if name == "DINOv2":  # interpolates as its own code, not as transformers
        positions = model.embeddings.position_embeddings
        model.embeddings.interpolate_pos_encoding = lambda tokens, height, width: torch.cat(
            [positions[:, :1], dino_positions(positions[:, 1:], height // 8, width // 8).flatten(2).mT], dim=1
        )
    with torch.no_grad():
        last = model(images(height, width), **options).last_hidden_state
        expected = [norm(output) for output in outputs]
        torch.testing.assert_close(expected[-1], last)
        found = encoder.layers(images(height, width), 2)
        cls, patches = encoder.cls(images(height, width)), encoder.patches(images(height, width))
    for got, tokens in zip(found, expected[1:], strict=True):
        assert got.shape == (2, 1 + height * width // 64, 16)
        torch.testing.assert_close(got[:, 0], tokens[:, 0])
        torch.testing.assert_close(got[:, 1:], tokens[:, 1 + registers :])
    torch.testing.assert_close(cls, last[:, 0])
    assert patches.shape == (2, height // 8, width // 8, 16)
    torch.testing.assert_close(patches[:, 1, 2], last[:, 1 + registers + width // 8 + 2])


def test_images_that_do_not_fit():
    encoder = as_encoder(ViTModel(MODELS["ViT"][1]), "some")
    with pytest.raises(ValueError, match=r"`images` \(=36 x 32 px\) must be multiples of the patch size 8"):
        encoder.cls(images(36, 32))
    with pytest.raises(ValueError, match=r"`n` \(=4\) must be in 1 \.\.\. 3"):
        encoder.layers(images(), 4)


def test_dinov2_is_evaluated_at_224_px():
    config = Dinov2Config(**{**SMALL, "patch_size": 14}, image_size=518)
    assert as_encoder(Dinov2Model(config), "some").image_size == 224


def test_random_weights_of_the_same_architecture():
    torch.manual_seed(7)
    encoder = as_encoder(ViTModel(MODELS["ViT"][1]), "some", image_size=64)
    drawn, again, other = reinitialized(encoder), reinitialized(encoder), reinitialized(encoder, seed=1)
    assert drawn.image_size == 64
    with torch.no_grad():
        assert torch.equal(drawn.cls(images()), again.cls(images()))
        assert not torch.allclose(drawn.cls(images()), encoder.cls(images()), atol=0.1)
        assert not torch.allclose(drawn.cls(images()), other.cls(images()), atol=0.1)


def test_what_is_no_vision_transformer_with_patches(tmp_path):
    small = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    with pytest.raises(ValueError, match=r"'text' \(BertModel\) is no vision transformer: .*patch_size"):
        as_encoder(BertModel(BertConfig(**small, intermediate_size=32, vocab_size=10)), "text")
    with pytest.raises(ValueError, match=r"'masked' \(ViTMAEModel\) must give a \[CLS\] token and one token per patch"):
        as_encoder(ViTMAEModel(ViTMAEConfig(**SMALL, image_size=32)), "masked")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty'\) holds neither checkpoint\.pt nor config\.json: give "):
        open_encoder(tmp_path / "empty")


def test_a_folder_with_missing_weights(tmp_path):
    model = ViTModel(MODELS["ViT"][1], add_pooling_layer=False)
    state = model.state_dict()
    del state["layernorm.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of ViTModel: layernorm\.bias"):
        open_encoder(tmp_path)


def training_checkpoint(prefix="", **networks):
    """As main_dino.py and main_ibot.py save it: a Namespace, and a NumPy learning rate in the optimiser."""
    head = {"head.mlp.0.weight": torch.ones(2, 16), "head.last_layer.weight_v": torch.ones(5, 2)}
    head["head.mlp.1.num_batches_tracked"] = torch.tensor(7)  # with --use_bn_in_head
    states = {
        name: {f"{prefix}backbone.{key}": value for key, value in weights.items()}
        | {f"{prefix}{key}": value for key, value in head.items()}
        | {f"{prefix}backbone.masked_embed": torch.ones(1, 16)}
        for name, weights in networks.items()
    }
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.1), "weight_decay": np.linspace(0, 1, 3)[1]}]}
    return {**states, "optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=0.1)}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
@pytest.mark.parametrize("kind", ["training", "data parallel", "backbone", "state_dict"])
def test_files_in_dinos_format(kind, height, width, tmp_path):
    weights = dino_weights()
    content = {
        "training": training_checkpoint(teacher=weights, student=dino_weights(seed=1)),
        "data parallel": training_checkpoint("module.", student=dino_weights(seed=1), teacher=weights),
        "backbone": weights,
        "state_dict": {"state_dict": weights},
    }[kind]
    torch.save(content, tmp_path / "file.pth")
    encoder = open_encoder(tmp_path / "file.pth", heads=2)
    assert (encoder.patch_size, encoder.dim, encoder.depth, encoder.image_size) == (8, 16, 3, 32)
    expected = dino_tokens(weights, images(height, width), heads=2)
    torch.testing.assert_close(encoder.layers(images(height, width))[0], expected, rtol=0, atol=1e-5)
    if kind == "training":
        student = open_encoder(tmp_path / "file.pth", key="student", heads=2)
        expected = dino_tokens(dino_weights(seed=1), images(height, width), heads=2)
        torch.testing.assert_close(student.layers(images(height, width))[0], expected, rtol=0, atol=1e-5)


def test_files_in_msns_format_interpolate_like_msn(tmp_path):
    weights = dino_weights()
    state = {f"module.{name}": value for name, value in weights.items()} | {"module.fc.fc1.weight": torch.ones(3, 16)}
    torch.save(
        {"target_encoder": state, "encoder": state, "epoch": 1, "prototypes": torch.ones(2, 2)}, tmp_path / "msn"
    )
    encoder = open_encoder(tmp_path / "msn", heads=2)
    expected = dino_tokens(weights, images(), heads=2)
    torch.testing.assert_close(encoder.layers(images())[0], expected, rtol=0, atol=1e-5)
    grid = F.interpolate(
        weights["pos_embed"][:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2), scale_factor=1.5, mode="bicubic"
    )
    resized = weights | {"pos_embed": torch.cat([weights["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)}
    expected = dino_tokens(resized, images(48, 48), heads=2)
    torch.testing.assert_close(encoder.layers(images(48, 48))[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, r"are not those of a ViTModel; missing: layernorm\.bias"),
        ({"blocks.1.gamma_1": torch.ones(16)}, r"unexpected: layers\.1\.gamma_1"),
        ({"norm.bias": torch.ones(8)}, r"of another shape: layernorm\.bias \(8,\), not \(16,\)"),
        ({"pos_embed": None}, "is no vision transformer of DINO, iBOT, MSN, DINOv2 or DINOv3: no pos_embed"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    weights = {name: value for name, value in (dino_weights() | change).items() if value is not None}
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        open_encoder(tmp_path / "file.pth", heads=2)


def test_keys_and_heads_that_are_not_there(tmp_path):
    torch.save(training_checkpoint(teacher=dino_weights(), student=dino_weights()), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"`key` \(='ema'\) must be one of the state dicts in .*: .*student, teacher"):
        open_encoder(tmp_path / "file.pth", key="ema", heads=2)
    with pytest.raises(ValueError, match=r"`heads` \(=None\) must be the number of attention heads of the 16-wide"):
        open_encoder(tmp_path / "file.pth")


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_run(legacy, tmp_path):
    content = training_checkpoint(teacher=dino_weights())
    content["args"].hook = Hostile(f"touch {tmp_path / 'executed'}")
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"unpickling can run code.*(?s:.)*torch\.save.*(?s:.)*system"):
        open_encoder(tmp_path / "file.pth", heads=2)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="unpickling can run code"):
        open_encoder(tmp_path / "plain.pth", heads=2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half an archive"])
def test_files_that_are_no_checkpoint(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"file\.pth is (no PyTorch file but (empty|text)|damaged, or its end is missing)"
    ):
        open_encoder(tmp_path / "file.pth")
    content = training_checkpoint(teacher=dino_weights())
    content["teacher"]["backbone.norm.bias"][2] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan.pth' cannot be opened: weights are NaN or infinite: layernorm.bias$"):
        open_encoder(tmp_path / "nan.pth", heads=2)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold a dict of state dicts, not a list"):
        open_encoder(tmp_path / "list.pth")
