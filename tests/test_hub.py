"""vmf_heads.hub: a head that was saved and read gives the same numbers, and files of something else are refused."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from vmf_heads import VMFPrototypeHead, hub
from vmf_heads.compat import dinov2, dinov3, esvit, ibot, lightly, solo, stable_pretraining
from vmf_heads.compat.dino import DINOLoss
from vmf_heads.head import PrototypeHead
from vmf_heads.hub import PretrainedHead
from vmf_heads.prototypes import Prototypes

D, K, P = 16, 32, 8
PARTS = {"hidden_dim": 24, "bottleneck_dim": P}
HEADS = {
    "dino": lambda: VMFPrototypeHead(D, K, **PARTS, temperature=0.2, float32_scores=True),
    "dino, batch norm": lambda: VMFPrototypeHead(D, K, use_bn=True, mlp_bias=False, **PARTS),
    "dino, frozen norms": lambda: VMFPrototypeHead(D, K, norm_last_layer=True, **PARTS),
    "dino, one layer": lambda: VMFPrototypeHead(D, K, nlayers=1, **PARTS),
    "dino, plain": lambda: VMFPrototypeHead(D, K, normalizer="none", **PARTS),
    "ibot": lambda: ibot.iBOTHead(D, K, patch_out_dim=K + 1, **PARTS),
    "dinov2": lambda: dinov2.DINOHead(D, K, **PARTS),
    "dinov3": lambda: dinov3.DINOHead(D, K, **PARTS),
    "esvit": lambda: esvit.DINOHead(D, K, **PARTS),
    "lightly": lambda: lightly.DINOProjectionHead(D, 24, P, K),
    "solo": lambda: solo.DINOHead(D, K, **PARTS),
    "stable_pretraining": lambda: stable_pretraining.DINOProjector(D, 24, P, K),
}


def trained(name: str) -> PrototypeHead:
    """A head as after a training: norms that differ, statistics of batch normalisation that are not the first ones."""
    head = HEADS[name]()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_() if parameter.dim() == 1 or parameter.shape[1] > 1 else parameter.uniform_(0.5, 3)
        head.features(torch.randn(7, D))
    return head.eval()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_read_gives_the_numbers_of_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    head, log_center, x = trained(name), torch.randn(K), torch.randn(5, D)
    PretrainedHead(head, 0.07, log_center, "scores", "facebook/dino-vits16").save_pretrained(tmp_path)
    found = PretrainedHead.from_pretrained(tmp_path)
    assert torch.equal(found.head.features(x), head.features(x))
    assert torch.equal(found.head.last_layer(head.features(x)), head.last_layer(head.features(x)))
    assert torch.equal(found.head.log_normalizer(0.1), head.log_normalizer(0.1))
    assert not found.head.training
    assert found.head.last_layer.norms_require_grad == head.last_layer.norms_require_grad
    for attribute in ("temperature", "normalizer", "float32_scores", "bottleneck_dim", "num_prototypes", "in_dim"):
        assert getattr(found.head, attribute) == getattr(head, attribute), attribute
    assert (found.teacher_temp, found.center_on, found.backbone) == (0.07, "scores", "facebook/dino-vits16")
    torch.testing.assert_close(found.log_center, log_center, rtol=0, atol=0)


def test_targets_are_those_of_the_loss(tmp_path: Path) -> None:
    student, teacher, x = trained("dino"), trained("dino"), torch.randn(8, D)
    loss = DINOLoss(K, 2, 0.07, 0.07, 0, 1)
    loss.attach(student, teacher)
    loss(student(x), teacher(x), 0)
    PretrainedHead(teacher, 0.07, loss.state_dict()["log_center"]).save_pretrained(tmp_path)
    torch.testing.assert_close(PretrainedHead.from_pretrained(tmp_path).targets(x), loss.targets(teacher(x), 0))


def test_the_card_says_in_words_what_the_head_is(tmp_path: Path) -> None:
    PretrainedHead(trained("dino"), 0.07, backbone="facebook/dino-vits16").save_pretrained(tmp_path / "a")
    PretrainedHead(trained("dino, plain"), 0.07, center_on="logits").save_pretrained(tmp_path / "b")
    vmf, plain = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert "32 prototypes in 8 dimensions" in vmf
    assert "belongs to the backbone `facebook/dino-vits16`" in vmf
    assert "0.2 of the student, 0.07 of the teacher" in vmf
    assert "components of a von Mises-Fisher mixture" in vmf
    assert "Centre: the logarithm of a running mean of responsibilities." in vmf
    assert "plain DINO" in plain
    assert "Centre: a running mean of the teacher's logits, over its temperature." in plain
    assert "has not said which backbone" in plain


class Hub(types.SimpleNamespace):
    """What of huggingface_hub is used, with a folder in place of the hub."""

    def create_repo(self, repo_id: str, **options: object) -> types.SimpleNamespace:
        assert options == {"exist_ok": True, "private": True}
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, token: None) -> str:
        target = self.folder / repo_id
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return f"commit of {repo_id}"

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], revision: str) -> str:
        assert (sorted(allow_patterns), revision) == (["config.json", "model.safetensors"], "main")
        return str(self.folder / repo_id)


def test_a_head_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_huggingface_hub", lambda: Hub(folder=tmp_path))
    head, x = trained("dino"), torch.randn(3, D)
    assert PretrainedHead(head, 0.07).push_to_hub("me/head", private=True) == "commit of me/head"
    assert sorted(path.name for path in (tmp_path / "me/head").iterdir()) == ["README.md", "config.json", hub.WEIGHTS]
    assert torch.equal(PretrainedHead.from_pretrained("me/head", revision="main").head(x), head(x))


def test_what_is_used_of_the_hub_is_what_it_takes() -> None:
    """Names of arguments, without a network."""
    import inspect

    import huggingface_hub

    for function, names in (
        (huggingface_hub.create_repo, {"exist_ok", "private", "token"}),
        (huggingface_hub.upload_folder, {"repo_id", "folder_path", "token"}),
        (huggingface_hub.snapshot_download, {"allow_patterns", "revision", "token", "cache_dir"}),
    ):
        assert names <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_what_is_not_installed_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # then an import of it raises
    head = PretrainedHead(HEADS["dino"](), 0.07)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'vmf_heads\[hub\]'"):
        head.save_pretrained(tmp_path) if package == "safetensors" else head.push_to_hub("me/head")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"`teacher_temp` \(=0.0\) must be a finite number > 0"),
        ((0.07, torch.zeros(K + 1)), r"`log_center` \(of shape \(33,\)\) must have the shape \(32,\)"),
        ((0.07, None, "targets"), r"`center_on` \(='targets'\) must be one of 'responsibilities', 'scores', 'logits'"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainedHead(HEADS["dino"](), *arguments)


@pytest.mark.parametrize("mlp", [nn.Sequential(nn.Linear(D, P), nn.Tanh()), nn.Identity()])
def test_another_mlp_is_refused_before_anything_is_written(mlp: nn.Module, tmp_path: Path) -> None:
    head = PrototypeHead(D, mlp, Prototypes(P, K))
    with pytest.raises(
        ValueError, match=r"must have an MLP as `projection_mlp` makes it.* its layers are .*(Tanh|Identity)"
    ):
        PretrainedHead(head, 0.07).save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_places_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it does not hold a head"):
        PretrainedHead.from_pretrained(tmp_path)
    for name in (tmp_path / "missing", "neither/user/nor/folder", "word"):
        with pytest.raises(
            FileNotFoundError, match=r"`name_or_folder` \(='.*'\) must be a folder with config.json, or"
        ):
            PretrainedHead.from_pretrained(name)
    with pytest.raises(TypeError, match="`revision` is for heads on the hub"):
        PretrainedHead.from_pretrained(tmp_path, revision="main")


@pytest.mark.parametrize("damage", ["not json", "other", "lacks", "more", "text", "shape", "kind"])
def test_files_of_something_else(damage: str, tmp_path: Path) -> None:
    PretrainedHead(HEADS["dino"](), 0.07).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    settings = json.loads(config.read_text())
    changes = {
        "other": {"model_type": "vit"},
        "more": {"layers": 3},
        "shape": {"num_prototypes": K + 1},
        "kind": {"prototypes": "cubes"},
    }
    if damage == "not json":
        config.write_text("<html>")
    elif damage == "text":
        weights.write_text("weights")
    elif damage == "lacks":
        del settings["hidden_dim"]
        config.write_text(json.dumps(settings))
    else:
        config.write_text(json.dumps(settings | changes[damage]))
    with pytest.raises(ValueError, match=r"the files in .* are not those of a head of vmf_heads"):
        PretrainedHead.from_pretrained(tmp_path)
