"""A ResNet in place of a ViT: it trains, resumes, is exported and evaluated by the same commands."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, ConvNextV2Config, ConvNextV2Model, ResNetConfig, ResNetModel

import pretrain
from config.recipe import Recipe, load_recipe, parse_overrides
from data.augment import EvalTransform
from data.images import load_images
from data.views import build_views
from evaluators.dense.video.segmentation import video_segmentation
from evaluators.features.encoder import as_encoder, open_encoder
from evaluators.features.extraction import Extraction, features_of
from evaluators.few_shot.few_shot import FewShotOptions, fewshot
from evaluators.finetune.finetune import finetune
from evaluators.linear.linear import LinearOptions, linear
from evaluators.protocol import NotApplicable
from evaluators.request import Request, open_evaluation
from methods.backbone import blocks, build_backbone, features, parts
from methods.network import build_network
from methods.registry import build_method
from storage.json_lines import read_rows
from tiny_run import TINY_RUN
from training.ema import ema_update
from training.parallel import parallelize
from training.run import load_run, random_backbone

TINY = (*TINY_RUN, "backbone=resnet", "num_attention_heads=3", "patch_size=8", "epochs=1", "image_size=18")
TINY += ("feature_grid=2",)


def tiny(*overrides: str) -> Recipe:
    return load_recipe("photos_dino_vmf", parse_overrides((*TINY, *overrides)))


def run(output: Path, **options: Any) -> list[dict[str, Any]]:
    pretrain.main(pretrain.Options("photos_dino_vmf", output, overrides=TINY, **options))
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}
        for row in read_rows(output / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "resnet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run(output, max_steps=3)
    return output


def test_a_recipe_can_say_resnet_18() -> None:
    with torch.device("meta"):
        backbone = build_backbone(tiny("hidden_size=512", "patch_size=32", "num_hidden_layers=8"))
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    with torch.device("meta"):
        published = ResNetModel(config)
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    assert {name: value.shape for name, value in backbone.state_dict().items()} == shapes
    assert len(blocks(backbone)) == 8


def test_a_last_position_stands_for_patch_size_pixels() -> None:
    for size in (4, 8, 16):
        recipe = tiny(f"patch_size={size}", "num_hidden_layers=6")
        assert build_backbone(recipe)(torch.zeros(1, 3, 32, 48)).last_hidden_state.shape[2:] == (32 // size, 48 // size)


@pytest.mark.parametrize("grid", [1, 2])
def test_the_head_gets_means_over_the_last_feature_map_in_the_order_of_the_crops(grid: int) -> None:
    network = build_network(tiny(f"feature_grid={grid}")).eval()
    crops = [torch.randn(2, 3, side, side) for side in (32, 32, 16)]
    with torch.no_grad():
        maps = [network.backbone(crop).last_hidden_state for crop in crops]
        parts = [torch.stack([half for part in x.chunk(grid, 2) for half in part.chunk(grid, 3)], 2) for x in maps]
        expected = torch.cat([part.mean((3, 4)).flatten(1) for part in parts])
        torch.testing.assert_close(torch.cat([features(network.backbone, crop) for crop in crops]), expected)
        torch.testing.assert_close(network(crops), network.head(expected))


def test_the_teacher_follows_the_statistics_of_the_students_batches() -> None:
    method = build_method(tiny())
    method.attach()
    batch = {"crops": [torch.randn(4, 3, side, side) for side in (18, 18, 8)]}
    before = copy.deepcopy(method.teacher.state_dict())
    loss, _ = method.train()(batch, 0)
    loss.backward()
    ema_update(method.teacher, method.student, 0.5)
    name = "backbone.embedder.embedder.normalization.running_mean"
    assert not torch.equal(method.teacher.state_dict()[name], before[name])
    count = name.replace("running_mean", "num_batches_tracked")
    # The student has seen crops of two sizes, and the teacher's own count of 1 is replaced.
    assert [network.state_dict()[count] for network in (method.student, method.teacher)] == [2, 2]


def test_a_run_in_two_parts_is_the_whole_run(run_directory: Path, tmp_path: Path) -> None:
    run(tmp_path / "parts", max_steps=1)
    resumed = run(tmp_path / "parts", max_steps=3, resume=True)
    whole = read_rows(run_directory / "metrics.jsonl")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    ours, theirs = (load_run(path).method.state_dict() for path in (tmp_path / "parts", run_directory))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_auto_model_gives_the_features_that_evaluation_reads(run_directory: Path) -> None:
    images = torch.stack([EvalTransform(18)(image) for image, _ in list(load_images("digits", "val"))[:5]])
    trained, exported = load_run(run_directory), open_encoder(run_directory / "backbone")
    assert (exported.dim, exported.image_size, exported.has_patches) == (64, 18, False)
    with torch.no_grad():
        expected = features(trained.backbone, images)
        model = AutoModel.from_pretrained(run_directory / "backbone").eval()
        by_hand = F.adaptive_avg_pool2d(model(images).last_hidden_state, model.config.feature_grid).flatten(1)
        torch.testing.assert_close(by_hand, expected, rtol=0, atol=0)
        torch.testing.assert_close(exported.cls(images), expected, rtol=0, atol=0)
    for source in (run_directory, run_directory / "backbone"):
        request = Request(str(source), dataset="digits", output=run_directory)
        found = open_evaluation(request).features("val")
        np.testing.assert_allclose(found.x[:5], expected, atol=1e-6)
    drawn = features(random_backbone(trained.recipe), images)
    assert not torch.allclose(drawn, expected, atol=1e-2)


def test_protocols_that_need_patches_say_so(run_directory: Path) -> None:
    evaluation = open_evaluation(Request(str(run_directory)))
    names = [metric.name for metric in linear(evaluation, LinearOptions("sgd", lrs=(0.1,), epochs=1))]
    assert names == ["top1_C"]
    with pytest.raises(NotApplicable, match="'cls\\+mean_patch' need a backbone with patch tokens"):
        evaluation.features("val", "cls+mean_patch")
    with pytest.raises(NotApplicable, match="it is for vision transformers, not for convolutional networks"):
        next(finetune(evaluation))
    with pytest.raises(NotApplicable, match="needs the patch tokens of a vision transformer"):
        next(video_segmentation(evaluation))
    with pytest.raises(ValueError, match=r"`final_norm` \(=False\) must be True where no LayerNorm"):
        next(fewshot(evaluation, FewShotOptions(final_norm=False, shots=(1,), draws=1)))
    with pytest.raises(ValueError, match=r"`n` \(=2\) must be 1: a convolutional network"):
        evaluation.encoder.layers(torch.zeros(1, 3, 18, 18), 2)
    with pytest.raises(ValueError, match=r"\(ResNetModel\) has no patch tokens"):
        evaluation.encoder.patches(torch.zeros(1, 3, 18, 18))


def test_other_convolutional_networks_of_transformers_are_evaluated(tmp_path: Path) -> None:
    model = ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)).eval()
    model.save_pretrained(tmp_path)
    encoder, images = open_encoder(tmp_path), torch.randn(2, 3, 32, 32)
    assert (encoder.dim, encoder.image_size) == (16, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.cls(images), model(images).pooler_output)
    assert features_of(Extraction(encoder, "digits", None, 32))("val", "last4").x.shape == (360, 16)
    model.config.feature_grid = 10**6
    with pytest.raises(ValueError, match=r"`feature_grid` \(=1000000\) of 'some' must be in 1 \.\.\. 64"):
        as_encoder(model, "some")
    model.config.feature_grid = 1
    model.forward = lambda pixel_values: model.encoder(model.embeddings(pixel_values))  # without a pooled output
    with pytest.raises(ValueError, match=r"'some' \(ConvNextV2Model\) must give one pooled output per image"):
        as_encoder(model, "some")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("patch_size=12",), r"`patch_size` \(=12\) must be 4, 8, 16 or 32 with `backbone` \(='resnet'\)"),
        (("num_hidden_layers=3",), r"`num_hidden_layers` \(=3\) must be a multiple of the 2 stages that `patch_size`"),
        (("hidden_size=15",), r"`hidden_size` \(=15\) must be a multiple of 2, the last width over the first of the 2"),
        (("feature_grid=0",), r"`feature_grid` \(=0\) must be at least 1"),
        (("backbone=vit", "num_attention_heads=2"), r"`feature_grid` \(=2\) must be 1 with `backbone` \(='vit'\)"),
        (("drop_path=0.1",), r"`drop_path` \(=0.1\) must be 0 with `backbone` \(='resnet'\)"),
    ],
)
def test_shapes_that_no_backbone_has(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(*overrides)


def test_hidden_parts_of_an_image_do_not_reach_the_network() -> None:
    backbone = build_backbone(tiny()).eval()
    images, keep = torch.randn(3, 3, 18, 18), torch.tensor([[0], [3], [2]])
    half = 9
    by_hand = torch.zeros_like(images)
    by_hand[0, :, :half, :half] = images[0, :, :half, :half]
    by_hand[1, :, half:, half:] = images[1, :, half:, half:]
    by_hand[2, :, half:, :half] = images[2, :, half:, :half]
    with torch.no_grad():
        expected = features(backbone, by_hand)
        torch.testing.assert_close(features(backbone, images, keep=keep), expected)
        hidden = torch.ones(3, 4, dtype=torch.bool).scatter(1, keep, False)
        torch.testing.assert_close(parts(backbone, images, mask=hidden)[:, 0], expected)


def test_the_parts_have_their_places_in_the_whole() -> None:
    backbone, images = build_backbone(tiny()).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found, last = parts(backbone, images), backbone(images).last_hidden_state
        torch.testing.assert_close(found[:, 0], features(backbone, images))
    torch.testing.assert_close(found[:, 1:].sum(1), found[:, 0])
    for number, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        part = last[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
        token = found[:, 1 + number].unflatten(1, (-1, 4))
        torch.testing.assert_close(token[:, :, number], part)
        assert int((token != 0).sum()) == int((part != 0).sum()) > 0


@pytest.mark.parametrize("name", ["ibot", "msn"])
def test_methods_that_hide_patches_hide_parts_of_what_a_resnet_sees(name: str, tmp_path: Path) -> None:
    overrides = (*TINY, "ibot.patch_out_dim=32") if name == "ibot" else TINY
    recipe = load_recipe(f"photos_{name}_vmf", parse_overrides(overrides))
    sample = build_views(recipe)(Image.new("RGB", (40, 40)), random.Random(0))
    assert [mask.shape for mask in sample.get("masks", ())] == ([(2, 2)] * 2 if name == "ibot" else [])
    assert [len(kept) for kept in sample.get("keep", ())] == ([3] if name == "msn" else [])
    pretrain.main(pretrain.Options(f"photos_{name}_vmf", tmp_path / "run", overrides=overrides, max_steps=2))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert as_encoder(load_run(tmp_path / "run").backbone, "run").dim == recipe.feature_size == 64
    with pytest.raises(ValueError, match=r"`feature_grid` \(=1\) must be at least 2 with `backbone` \(='resnet'\) and"):
        load_recipe(f"photos_{name}_vmf", parse_overrides((*overrides, "feature_grid=1")))


def test_what_a_resnet_cannot_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build_method(tiny())
    with pytest.raises(ValueError, match=r"`activation_checkpointing` \(=True\) must be False with `backbone`"):
        parallelize(method, activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"`strategy` \(='fsdp2'\) must be 'ddp' with `backbone` \(='resnet'\)"):
        parallelize(method, strategy="fsdp2")
    monkeypatch.setattr("training.parallel.world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`backbone` \(='resnet'\) must be 'vit' in 2 processes without GPUs"):
        parallelize(method)
