"""What a run leaves for others to go on with, backbone and heads, is what another run starts from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from config.recipe import load_recipe, parse_overrides
from data.images import load_images
from data.loading import load_steps
from dino_vit import dino_tokens, dino_weights
from methods.method import Method
from methods.registry import build_method
from storage.checksums import check_checksums
from storage.torch_file import UnreadableFile
from tiny_run import TINY_RUN
from training import warm_start
from training.run import load_run
from training.warm_start import fit_head, start_from
from vmf_heads.head import find_head
from vmf_heads.hub import PretrainedHead

TINY = (*TINY_RUN, "epochs=2", "freeze_last_layer_epochs=0")
ALONE: dict[str, int] = {"accumulate": 1, "num_workers": 0}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(warm_start, "CROPS_PER_PROTOTYPE", 4)  # enough, and soon done


def run(output: Path, recipe: str = "photos_dino_vmf", *overrides: str, **options: Any) -> None:
    pretrain.main(pretrain.Options(recipe, output, overrides=(*TINY, *overrides), max_steps=3, **options))


@pytest.mark.parametrize(("recipe", "more"), [("photos_dino_vmf", ()), ("photos_ibot_vmf", ("ibot.patch_out_dim=32",))])
def test_another_run_starts_from_backbone_head_and_centre(recipe: str, more: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "first", recipe, *more)
    first = load_run(tmp_path / "first")
    head = PretrainedHead.from_pretrained(tmp_path / "first" / "heads" / "student")
    features = torch.randn(4, 16)
    own = find_head(first.method.student)
    assert torch.equal(head.head.features(features), own.features(features))
    check_checksums(tmp_path / "first" / "heads" / "teacher")

    method = build_method(load_recipe(recipe, parse_overrides((*TINY, *more))))
    start_from(method, str(tmp_path / "first" / "backbone"), str(tmp_path / "first" / "heads" / "teacher"))
    for network in (method.student, method.teacher):
        for name, value in first.backbone.state_dict().items():
            if not name.endswith("mask_token"):
                assert torch.equal(network.backbone.state_dict()[name], value), name
        teacher = find_head(first.method.teacher)
        assert torch.equal(find_head(network).features(features), teacher.features(features))
        assert torch.equal(find_head(network).last_layer.weight, teacher.last_layer.weight)
    centre = first.loss.state_dict()["log_center"]
    assert centre.abs().max() > 0
    assert torch.equal(method.loss.state_dict()["log_center"], centre)


def test_targets_of_a_published_head_are_those_of_the_run(tmp_path: Path) -> None:
    """Also with a centre on logits, which Eq. 7 divides by the temperature."""
    for centering in ("probability", "logit"):
        run(tmp_path / centering, "photos_dino_vmf", f"centering={centering}")
        method = load_run(tmp_path / centering).method
        teacher = find_head(method.teacher)
        features = torch.randn(4, 16)
        scores = teacher.last_layer(teacher.features(features))
        published = PretrainedHead.from_pretrained(tmp_path / centering / "heads" / "teacher")
        assert published.center_on == {"probability": "responsibilities", "logit": "logits"}[centering]
        torch.testing.assert_close(published.targets(features), method.targets(scores, epoch=1))


def test_the_command_starts_from_them_and_a_resumed_run_does_not_start_again(tmp_path: Path) -> None:
    run(tmp_path / "first")
    start = {
        "init_backbone": str(tmp_path / "first" / "backbone"),
        "init_head": str(tmp_path / "first" / "heads" / "teacher"),
    }
    run(tmp_path / "second", "photos_dino_vmf", "lr=1e-9", "min_lr=1e-9", **start)
    for name, value in load_run(tmp_path / "first").backbone.state_dict().items():
        torch.testing.assert_close(load_run(tmp_path / "second").backbone.state_dict()[name], value, rtol=0, atol=1e-6)
    pretrain.main(
        pretrain.Options(
            "photos_dino_vmf",
            tmp_path / "second",
            overrides=(*TINY, "lr=1e-9", "min_lr=1e-9"),
            max_steps=4,
            resume=True,
            init_backbone="no such folder",
        )
    )


def test_msn_has_no_head_with_a_centre(tmp_path: Path) -> None:
    run(tmp_path / "run", "photos_msn_vmf")
    assert (tmp_path / "run" / "backbone").is_dir()
    assert not (tmp_path / "run" / "heads").exists()


def test_networks_of_other_shapes_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    other = build_method(load_recipe("photos_dino_vmf", parse_overrides((*TINY, "hidden_size=32", "out_dim=16"))))
    with pytest.raises(ValueError, match=r"`init_backbone` .* must have the shapes of the recipe, in which .*32.*16"):
        start_from(other, backbone=str(tmp_path / "run" / "backbone"))
    with pytest.raises(ValueError, match=r"`init_head` .* must have the shapes of the recipe, in which .*32.*16"):
        start_from(other, head=str(tmp_path / "run" / "heads" / "teacher"))
    with pytest.raises(FileNotFoundError, match=r"must be a folder with config.json"):
        start_from(other, head=str(tmp_path / "missing"))


def test_weights_that_are_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    method = build_method(load_recipe("photos_dino_vmf", parse_overrides(TINY)))
    for option, folder in (("head", tmp_path / "run/heads/teacher"), ("backbone", tmp_path / "run/backbone")):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(UnreadableFile, match=r"model.safetensors is damaged"):
            start_from(method, **{option: str(folder)})
    backbone = load_run(tmp_path / "run").backbone
    state = {name: value for name, value in backbone.state_dict().items() if name != "layernorm.weight"}
    backbone.save_pretrained(tmp_path / "lacks", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of ViTModel: layernorm.weight"):
        start_from(method, backbone=str(tmp_path / "lacks"))


def test_a_backbone_from_a_file_of_dino(tmp_path: Path) -> None:
    sizes = ("hidden_size=192", "num_hidden_layers=1", "patch_size=8", "image_size=32")
    weights = dino_weights(depth=1, dim=192, mlp=4)
    file = tmp_path / "file.pth"
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in weights.items()}}, file)
    method = build_method(load_recipe("photos_dino_vmf", parse_overrides((*TINY, *sizes, "num_attention_heads=3"))))
    start_from(method, backbone=str(file))
    images = torch.randn(2, 3, 32, 32)
    for network in (method.student, method.teacher):
        with torch.no_grad():
            got = network.backbone.eval()(pixel_values=images).last_hidden_state
        torch.testing.assert_close(got, dino_tokens(weights, images, heads=3), rtol=0, atol=1e-4)
    other = build_method(load_recipe("photos_dino_vmf", parse_overrides((*TINY, *sizes, "num_attention_heads=6"))))
    with pytest.raises(ValueError, match=r"must have the `num_attention_heads` of the recipe \(=6\), not 3"):
        start_from(other, backbone=str(file))


def fitted(backbone: Path, seed: int = 0, recipe: str = "photos_dino_vmf", *more: str) -> Method:
    """Student and teacher with this backbone, and the head that is fitted to it."""
    method = build_method(load_recipe(recipe, parse_overrides((*TINY, f"seed={seed}", *more)))).train()
    start_from(method, str(backbone))
    fit_head(method, load_images("digits", "train"), backbone, num_workers=0)
    return method


def test_a_head_is_fitted_to_the_backbone_and_a_resumed_run_does_not_fit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "first")
    backbone = tmp_path / "first" / "backbone"
    method = fitted(backbone)
    assert re.search(
        r"mixture of 32 components, fitted to 128 crops with a median kappa of \d+", capsys.readouterr()[0]
    )
    heads = [find_head(network) for network in (method.student, method.teacher)]
    assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True))
    assert (heads[0].last_layer.norms / 0.1).median().item() == pytest.approx(10)
    again = find_head(fitted(backbone).student)
    assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), again.parameters(), strict=True))

    slow = ("lr=1e-9", "min_lr=1e-9")
    run(tmp_path / "second", "photos_dino_vmf", *slow, init_backbone=str(backbone), warm_start_head=True)
    trained = load_run(tmp_path / "second").method
    torch.testing.assert_close(trained.student.state_dict(), method.student.state_dict(), rtol=0, atol=1e-6)
    monkeypatch.setattr(pretrain, "fit_head", None)  # a call would raise
    options = {"init_backbone": "no such folder", "warm_start_head": True, "resume": True, "max_steps": 4}
    pretrain.main(
        pretrain.Options("photos_dino_vmf", tmp_path / "second", overrides=(*TINY, *slow), **options)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("photos_ibot_vmf", ("ibot.patch_out_dim=32",)),
        ("photos_msn_vmf", ()),
        ("digits_dino_vmf", ("normalization=l2",)),
    ],
)
def test_heads_of_other_methods_are_fitted_too(recipe: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Frozen norms stay; BatchNorm, which the recipe of the digits has, does not matter."""
    method = build_method(load_recipe(recipe, parse_overrides((*TINY, *more)))).train()
    fit_head(method, load_images("digits", "train"), tmp_path, num_workers=0)
    head = find_head(method.student)
    assert not torch.equal(head.last_layer.weight, find_head(build_method(method.recipe).student).last_layer.weight)
    if "normalization=l2" in more:
        assert torch.equal(head.last_layer.norms, torch.ones(32))
    method.attach()
    batch = next(iter(load_steps(load_images("digits", "train"), method.recipe, 0, 0, 1, tmp_path, **ALONE)))[0]
    assert method(batch, 0)[0].isfinite()


@pytest.mark.parametrize("more", [{}, {"init_head": "some/head"}])
def test_a_head_is_fitted_only_where_that_has_a_meaning(more: dict[str, str], tmp_path: Path) -> None:
    backbone = {"init_backbone": "some/backbone"} if more else {}
    with pytest.raises(ValueError, match=r"`warm_start_head` needs `init_backbone`, .* and no `init_head` beside it"):
        run(tmp_path / "run", "photos_dino_vmf", warm_start_head=True, **backbone, **more)
    assert not (tmp_path / "run").exists()
