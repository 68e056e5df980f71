import dataclasses
import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from config.recipe import Recipe, load_recipe
from methods.backbone import cls_token
from methods.registry import Method, build_method
from storage.torch_file import UnreadableFile
from training.run import CHECKPOINT, PREVIOUS, load_checkpoint, load_run, random_backbone, save_checkpoint


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8, "num_hidden_layers": 1, "seed": 3})


def state_of(method: Method, recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe, "method": method.state_dict(), "step": 7, "epoch": 2}


def test_a_run_is_the_teacher_with_its_head_loss_and_centre(recipe: Recipe, tmp_path: Path) -> None:
    method = build_method(dataclasses.replace(recipe, fused_loss=False))
    method.attach()
    nn.init.normal_(method.teacher.head.last_layer.weight_g)
    crops = [torch.randn(4, 3, 32, 32)] * 2 + [torch.randn(4, 3, 16, 16)] * 2
    method.train()({"crops": crops}, 0)  # moves the centre
    save_checkpoint(tmp_path, state_of(method, recipe))
    run = load_run(tmp_path)
    assert (run.recipe, run.step, run.epoch) == (recipe, 7, 2)
    assert not run.backbone.training
    assert not run.head.training
    assert not any(p.requires_grad for p in (*run.backbone.parameters(), *run.head.parameters()))
    images = torch.randn(6, 3, 32, 32)
    scores = run.head(cls_token(run.backbone, images))
    expected = method.eval().teacher([images])
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)
    torch.testing.assert_close(run.loss.targets(scores, 2), method.loss.targets(expected, 2), rtol=0, atol=0)
    assert run.loss.state_dict()["log_center"].abs().sum() > 0


def test_the_random_backbone_is_the_students_before_its_first_step(recipe: Recipe) -> None:
    random_weights = random_backbone(recipe).state_dict()
    initial = build_method(recipe).student.backbone.state_dict()
    assert random_weights.keys() == initial.keys()
    assert all(torch.equal(random_weights[name], initial[name]) for name in initial)


def test_building_leaves_the_global_generator_alone(recipe: Recipe) -> None:
    before = torch.get_rng_state()
    build_method(recipe)
    random_backbone(recipe)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_give_other_weights(recipe: Recipe) -> None:
    other = load_recipe("photos_dino_vmf", {**vars(recipe), "seed": 4})
    ours, theirs = random_backbone(recipe), random_backbone(other)
    assert not torch.equal(ours.embeddings.cls_token, theirs.embeddings.cls_token)


def test_a_full_disk_is_said_and_leaves_the_checkpoint_that_was_there(recipe: Recipe, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"recipe": recipe, "step": 1})
    (tmp_path / f"{CHECKPOINT}.partial").symlink_to("/dev/full")  # where every write fails as on a full disk
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint.pt'") as caught:
        save_checkpoint(tmp_path, {"recipe": recipe, "step": 2, "method": {"weight": torch.zeros(100_000)}})
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(recipe: Recipe, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"recipe": recipe, "step": 1})
    bad = {"recipe": recipe, "step": 2, "method": {"good": torch.zeros(3), "bad": torch.tensor([0, math.inf])}}
    with pytest.raises(FloatingPointError, match=r"^bad holds NaN or infinity, and is not saved"):
        save_checkpoint(tmp_path, bad)
    assert load_checkpoint(tmp_path)["step"] == 1
    torch.save(bad | {"recipe": dataclasses.asdict(recipe)}, tmp_path / CHECKPOINT)
    with pytest.raises(UnreadableFile, match=r"checkpoint.pt holds weights that are NaN or infinite \(bad\); there is"):
        load_checkpoint(tmp_path)


def test_the_checkpoint_before_the_last_is_kept_and_named_when_the_last_is_damaged(
    recipe: Recipe, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"recipe": recipe, "step": step})
    assert load_checkpoint(tmp_path)["step"] == 3
    last, previous = tmp_path / CHECKPOINT, tmp_path / PREVIOUS
    last.write_bytes(b"")
    advice = r"the one before it is whole \(step 2\): mv .*checkpoint.previous.pt .*checkpoint.pt$"
    with pytest.raises(UnreadableFile, match=rf"checkpoint.pt is no PyTorch file but empty; {advice}"):
        load_checkpoint(tmp_path)
    whole = previous.read_bytes()
    previous.write_bytes(whole[:-500])
    with pytest.raises(UnreadableFile, match=r"is no PyTorch file but empty, and .*previous.pt is damaged, or its end"):
        load_checkpoint(tmp_path)
    last.unlink()
    previous.write_bytes(whole)
    with pytest.raises(UnreadableFile, match=rf"there is no .*checkpoint.pt; {advice}"):
        load_checkpoint(tmp_path)
    previous.replace(last)
    assert load_checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no checkpoint of pretrain.py: it holds a list; there is no checkpoint.previous.pt"),
        ({"teacher": {}}, "is no checkpoint of pretrain.py: it lacks recipe and step"),
        ({"recipe": 3, "step": 0}, "is no checkpoint of pretrain.py: its `recipe` must be a dict"),
        ({"recipe": {}, "step": "7"}, r"is no checkpoint of pretrain.py: its `step` must be a number >= 0"),
        ({"recipe": {}, "step": 7, "epoch": -1}, r"is no checkpoint of pretrain.py: its `epoch` must be a number >= 0"),
        ({"recipe": {"name": "x"}, "step": 0}, "is no checkpoint .*: missing fields method, dataset"),
        ({"recipe": {}, "step": 0, "method": {"a": 1}}, "its `method` must be a dict of tensors"),
    ],
)
def test_files_of_torch_that_are_no_checkpoints_say_so(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(UnreadableFile, match=message):
        load_checkpoint(tmp_path)


def test_weights_of_another_network_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"recipe": recipe, "method": {"weight": torch.zeros(3)}, "step": 1, "epoch": 0})
    with pytest.raises(UnreadableFile, match=r"(?s)checkpoint.pt are not those of its recipe: .*Missing"):
        load_run(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*checkpoint.pt: expected the --output directory"):
        load_run(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"recipe": Hostile()}, tmp_path / CHECKPOINT)
    with pytest.raises(UnreadableFile, match="holds objects whose unpickling can run code, and is not opened"):
        load_run(tmp_path)
    assert not (tmp_path / "executed").exists()
