"""The recommended learning rate of the norms, docs/migrating.md, in the original repositories' own optimisers."""

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from upstream.checkouts import Training, apply_documented_diff, copy_of
from vmf_heads.compat.dinov2 import DINOHead

pytestmark = pytest.mark.slow
SECTION = "A learning rate of their own for the norms"
NORMS = "head.last_layer.weight_g"


@pytest.mark.parametrize(
    ("name", "section", "script", "place"),
    [
        ("dino", "facebookresearch/dino", "train_dino.py", 0),
        ("ibot", "bytedance/ibot", "train_ibot.py", 1),
    ],
)
def test_the_norms_learn_faster_in_a_group_of_their_own(name, section, script, place, tmp_path_factory):
    train = Training(name, section, script, tmp_path_factory)
    free = ["--norm_last_layer", "false"]
    before, after = train(free), train(free, also=(SECTION, slice(place, place + 1)))
    others = [[parameter for parameter in group if not is_norm(parameter)] for group in before["groups"]]
    assert after["groups"][:-1] == others
    assert all(map(is_norm, after["groups"][-1]))
    *rest, norms = after["options"]
    assert rest == before["options"]
    assert rest[0]["weight_decay"] > 0 == norms["weight_decay"]
    assert norms["lr"] == pytest.approx(10 * rest[0]["lr"])
    assert norms["lr"] > 0
    moved = [(result["student"][NORMS] - 1).abs().max() for result in (before, after)]
    assert moved[1] > 5 * moved[0] > 0
    assert len(after["losses"]) == 4


def test_lightly_gives_the_norms_ten_times_the_learning_rate(tmp_path_factory):
    train = Training("lightly", "lightly-ai/lightly", "train_lightly.py", tmp_path_factory)
    rest, norms = train([], also=(SECTION, slice(2, 3)))["options"]
    assert norms == {"names": ["student_head.last_layer.weight_g"], "lr": pytest.approx(0.01)}
    assert "teacher_head.last_layer.weight_g" in rest["names"]  # it has no gradient
    assert rest["lr"] == 0.001


def test_dinov2_multiplies_the_learning_rate_of_the_norms_by_itself(tmp_path):
    checkout = copy_of("dinov2", tmp_path)
    apply_documented_diff(checkout, SECTION, slice(3, 4))
    groups_of = runpy.run_path(str(checkout / "dinov2/utils/param_groups.py"))
    student = torch.nn.ModuleDict({"dino_head": DINOHead(8, 12, hidden_dim=8, bottleneck_dim=4)})
    fused = groups_of["fuse_params_groups"](groups_of["get_params_groups_with_decay"](student["dino_head"]))
    model = SimpleNamespace(student=student, get_params_groups=lambda: list(fused))
    adam = SimpleNamespace(lr=1e-3, adamw_beta1=0.9, adamw_beta2=0.999)
    names = run_lines(checkout / "dinov2/train/train.py", {"model": model, "cfg": SimpleNamespace(optim=adam)})
    names["apply_optim_scheduler"](names["optimizer"], lr=0.5, wd=0.1, last_layer_lr=0.25)
    *rest, norms = names["optimizer"].param_groups
    assert norms["params"] == [student["dino_head"].last_layer.weight_g]
    assert (norms["lr"], norms["weight_decay"]) == (2.5, 0.0)
    assert {group["lr"] for group in rest} == {0.5, 0.25}  # of the MLP and of the last layer
    assert sum(len(group["params"]) for group in rest) + 1 == len(list(student.parameters()))


def is_norm(name: str) -> bool:
    return "last_layer" in name and name.endswith("weight_g")


def run_lines(file: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Two functions of DINOv2's train.py, and the lines of the diff out of its do_train, which needs CUDA."""
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted = [functions[name] for name in ("build_optimizer", "apply_optim_scheduler")]
    wanted += [node for node in tree.body if "vmf_heads" in ast.unparse(node) and isinstance(node, ast.ImportFrom)]
    lines = [node for node in functions["do_train"].body if "separate_norms" in ast.unparse(node)]
    lines += [node for node in functions["do_train"].body if "build_optimizer" in ast.unparse(node)]
    names["torch"] = torch
    exec(compile(ast.Module([*wanted, *lines], type_ignores=[]), str(file), "exec"), names)
    return names
