"""Files of the original code open as transformers models with the same tokens, and published sizes are its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from evaluators.features.encoder import Encoder, open_encoder
from published_vits import PUBLISHED
from upstream.checkouts import ROOT, Training, copy_of

pytestmark = pytest.mark.slow

# The models that the training scripts of this folder build.
MICRO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "qkv_bias": True}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4, "qkv_bias": True}
# Repository: options of its training script, its file, its model, sizes of images in px beside the 224 of the model.
CASES = {
    "dino": (["--norm_last_layer", "false"], "checkpoint.pth", MICRO, [(96, 96), (160, 240)]),
    "ibot": (["--shared_head", "false"], "checkpoint.pth", MICRO | {"patch_size": 8}, [(96, 96), (80, 120)]),
    "msn": ([], "msn-latest.pth.tar", TINY, [(96, 96), (160, 160)]),  # its code takes square images alone
}


def run_original(name: str, script: str, settings: dict[str, Any], folder: Path) -> Path:
    """Run a script of this folder on a copy of a checkout; return the file that it wrote."""
    checkout, output = copy_of(name, folder), folder / "output"
    path = os.pathsep.join(str(p) for p in (ROOT / "src", ROOT / "tests"))
    arguments = [str(Path(__file__).with_name(script)), str(checkout), str(output), json.dumps(settings)]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return output


def original_tokens(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return torch.load(run_original(name, "original_features.py", settings, folder), weights_only=True)


@pytest.mark.parametrize("name", ["dino", "ibot", "msn", "dinov2", "dinov3"])
def test_published_shapes_are_those_of_the_original_code(name, tmp_path_factory):
    """Of every size, name by name; `test_published_vits` maps the same tables to transformers."""
    published = [model for model in PUBLISHED if model.code == name]
    settings = {"models": [(model.module, model.factory, model.options) for model in published]}
    output = run_original(name, "original_shapes.py", settings, tmp_path_factory.mktemp("shapes"))
    found = json.loads(output.read_text())
    assert found == [{key: list(shape) for key, shape in model.shapes().items()} for model in published]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_original_code(name, tmp_path_factory):
    """[CLS] and patches of every block, also at other resolutions, from the file of a real training run."""
    options, file, model, sizes = CASES[name]
    folder = tmp_path_factory.mktemp("run")
    Training(name, "", f"train_{name}.py", tmp_path_factory)(options, diff=False, folder=folder, stop_at=1)
    for key in ("teacher",) if name == "msn" else ("teacher", "student"):  # MSN's evaluation knows no other
        settings = {"file": str(folder / file), "key": key, "model": model, "sizes": [(224, 224), *sizes]}
        original = original_tokens(name, settings, tmp_path_factory.mktemp("features"))
        encoder = open_encoder(folder / file, key=key, heads=model["num_heads"])
        assert (encoder.depth, encoder.dim, encoder.image_size) == (model["depth"], model["embed_dim"], 224)
        for images, blocks in zip(original["images"], original["tokens"], strict=True):
            for got, want in zip(encoder.layers(images, len(blocks)), blocks, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            height, width = (side // encoder.patch_size for side in images.shape[-2:])
            patches = blocks[-1][:, 1:].unflatten(1, (height, width))
            torch.testing.assert_close(encoder.patches(images), patches, rtol=0, atol=1e-5)


DINOV2 = {"img_size": 112, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}
DINOV2 |= {"block_chunks": 0}


def dinov2_weights(model: Dinov2Model, registers: int) -> dict[str, torch.Tensor]:
    """The weights of a transformers model under DINOv2's names, queries, keys and values in one matrix."""
    state = model.state_dict()
    embeddings = {"cls_token": "cls_token", "pos_embed": "position_embeddings", "mask_token": "mask_token"}
    embeddings |= {"register_tokens": "register_tokens"} if registers else {}
    found = {theirs: state[f"embeddings.{ours}"] for theirs, ours in embeddings.items()}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for block in range(2):
            ours, theirs = f"encoder.layer.{block}", f"blocks.{block}"
            attention = [name for name in state if name.startswith(f"{ours}.attention.") and name.endswith(kind)]
            query, key, value, output = attention
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat([state[name] for name in (query, key, value)])
            found[f"{theirs}.attn.proj.{kind}"] = state[output]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{theirs}.{name}.{kind}"] = state[f"{ours}.{name}.{kind}"]
    for block in range(2):
        for number in (1, 2):
            found[f"blocks.{block}.ls{number}.gamma"] = state[f"encoder.layer.{block}.layer_scale{number}.lambda1"]
    return found


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2_gives_the_tokens_of_its_own_code(registers, tmp_path_factory):
    """As a folder of transformers and as a .pth file, at the resolution of its position embeddings and at others."""
    folder = tmp_path_factory.mktemp("model")
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
    }
    settings |= {"layerscale_value": 0.5, "initializer_range": 0.3}
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**settings))
    model.save_pretrained(folder)
    torch.save(dinov2_weights(model, registers), folder / "weights.pth")
    published = {"num_register_tokens": registers, "interpolate_antialias": True, "interpolate_offset": 0.0}
    original = original_tokens(
        "dinov2",
        {
            "file": str(folder / "weights.pth"),
            "model": DINOV2 | (published if registers else {}),
            "sizes": [(112, 112), (56, 56), (70, 140)],
        },
        tmp_path_factory.mktemp("features"),
    )
    for encoder in (open_encoder(folder), open_encoder(folder / "weights.pth", heads=2)):
        check_tokens(encoder, original, registers)


def check_tokens(encoder: Encoder, original: dict[str, Any], registers: int) -> None:
    for images, blocks in zip(original["images"], original["tokens"], strict=True):
        for got, want in zip(encoder.layers(images, 2), blocks, strict=True):
            want = torch.cat([want[:, :1], want[:, 1 + registers :]], dim=1)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_the_gated_mlp_of_dinov2s_vit_g_is_that_of_its_own_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    model = DINOV2 | {"ffn_layer": "swiglu", "num_register_tokens": 2, "interpolate_offset": 0.0}
    settings = {"file": str(folder / "weights.pth"), "model": model, "sizes": [(112, 112)]}
    original = original_tokens("dinov2", settings, folder)
    check_tokens(open_encoder(folder / "weights.pth", heads=2), original, 2)


TINY_DINOV3 = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "ffn_ratio": 6.0,
    "layerscale_init": 0.1,
    "norm_layer": "layernormbf16",
    "n_storage_tokens": 3,
    "mask_k_bias": True,
    "pos_embed_rope_dtype": "fp32",
}


@pytest.mark.parametrize(
    "options",
    [{"ffn_layer": "mlp"}, {"ffn_layer": "swiglu"}, {"qkv_bias": False, "untie_global_and_local_cls_norm": True}],
)
def test_dinov3_gives_the_tokens_of_its_own_code(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    settings = {"file": str(folder / "weights.pth"), "model": TINY_DINOV3 | options, "sizes": [(64, 64), (40, 72)]}
    original = original_tokens("dinov3", settings, folder)
    check_tokens(open_encoder(folder / "weights.pth"), original, 3)
