"""Trains with DINOv3's losses on CPU: train_dinov3.py CHECKOUT OUTPUT SETTINGS.

DINOv3's SSLMetaArch needs FSDP2 and CUDA. What runs here are its own `DINOLoss`, `iBOTPatchLoss` and parameter groups,
called as SSLMetaArch does, on heads made by the DINOHead that its (changed) module imports, built on the meta device.

Settings: "unit" compares with DINOv3's own head on prototypes of norm 1, otherwise with the equations on norms from
0.4 to 4; and those of `interruption`, of steps.
"""

import copy
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upstream import equations, interruption
from upstream.steps import errors

K, P, DIM, BATCH, PATCHES, LOCAL, TAU_T = 48, 16, 32, 3, 10, 2, 0.05
Heads = nn.ModuleDict


def head_class(checkout: str) -> type[nn.Module]:
    """The class that SSLMetaArch builds its heads of."""
    text = Path(checkout, "dinov3/train/ssl_meta_arch.py").read_text()
    (line,) = re.findall(r"^from .* import DINOHead$", text, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(line, names)
    return names["DINOHead"]


def build(kind: type[nn.Module]) -> Heads:
    """As DINOv3 does: on the meta device, then empty memory, then `init_weights`."""
    options = {"hidden_dim": 24, "bottleneck_dim": P, "nlayers": 3}
    with torch.device("meta"):
        heads = Heads({name: kind(in_dim=DIM, out_dim=K, **options) for name in ("dino_head", "ibot_head")})
    heads.to_empty(device="cpu")
    for head in heads.values():
        head.init_weights()
    return heads


def set_norms(heads: Heads, norms: Tensor) -> None:
    for head in heads.values():
        weight = nn.functional.normalize(head.last_layer.weight.data, dim=1)
        head.last_layer.weight.data = weight * norms[:, None]


def total(heads: Heads, x: dict[str, Tensor], dino: nn.Module, ibot: nn.Module, targets: list[Tensor]) -> Tensor:
    """The student's part of forward_backward, with DINOv3's own weights of its terms for 2 local crops."""
    of_global = heads["dino_head"](x["global"]).unflatten(0, (2, BATCH))
    of_local = heads["dino_head"](x["local"]).unflatten(0, (LOCAL, BATCH))
    loss = dino(of_local, targets[0]) * 2 / 3 + dino(of_global, targets[0], ignore_diagonal=True) / 3
    patches, mask = heads["ibot_head"](x["patches"]), torch.ones(2, PATCHES // 2, dtype=torch.bool)
    return loss + ibot.forward_masked(patches, targets[1], mask, n_masked_patches=PATCHES)


def reference(student: Heads, teacher: Heads, x: dict[str, Tensor]) -> Tensor:
    """The same from Eq. 6 for the student and Sinkhorn-Knopp of the teacher's raw scores, in float64."""

    def features(head: nn.Module, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(head.mlp(tokens), dim=1)

    targets = []
    for name, tokens in (("dino_head", x["global"]), ("ibot_head", x["patches"])):
        w = equations.prototypes(teacher[name].last_layer)[0]
        q = (features(teacher[name], tokens) @ w.T / TAU_T).exp().detach()
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        targets.append(q)

    def log_p(name: str, tokens: Tensor) -> Tensor:
        return equations.log_student(features(student[name], tokens), student[name].last_layer, 0.1)

    t = targets[0].unflatten(0, (2, BATCH))
    of_global, of_local = log_p("dino_head", x["global"]), log_p("dino_head", x["local"])
    of_global, of_local = of_global.unflatten(0, (2, BATCH)), of_local.unflatten(0, (LOCAL, BATCH))
    pairs = [(t[0], of_global[1]), (t[1], of_global[0])] + [(u, s) for u in t for s in of_local]
    loss = sum(-(u * s).sum(dim=1).mean() for u, s in pairs) / len(pairs)
    return loss - (targets[1] * log_p("ibot_head", x["patches"])).sum(dim=1).mean()


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    nn.Module.compile = lambda module: None  # DINOv3 compiles its Sinkhorn-Knopp, which takes minutes on a CPU
    sys.path.insert(0, checkout)
    train = sys.modules["dinov3.train"] = ModuleType("dinov3.train")  # its __init__ imports all of training
    train.__path__ = [f"{checkout}/dinov3/train"]
    dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
    from dinov3.layers.dino_head import DINOHead
    from dinov3.loss import DINOLoss, iBOTPatchLoss
    from dinov3.train.param_groups import get_params_groups_with_decay_fsdp

    torch.manual_seed(0)
    kind = head_class(checkout)
    student = build(kind)
    teacher, original = build(kind), build(DINOHead)
    set_norms(student, torch.ones(K) if settings["unit"] else torch.linspace(0.4, 4, K))
    teacher.load_state_dict(student.state_dict())
    dino, ibot = DINOLoss(K), iBOTPatchLoss(K)
    for loss in (dino, ibot):
        loss.init_weights()
    groups = get_params_groups_with_decay_fsdp(model=student, dino_head_wd_multiplier=0.5)
    optimizer = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.1)
    result: dict[str, Any] = {
        "losses": [],
        "errors": [],
        "last_layers": [g["name"] for g in groups if g["is_last_layer"]],
    }
    parts = {"student": student, "teacher": teacher, "dino": dino, "ibot": ibot, "optimizer": optimizer}
    for _ in interruption.loop(range(4), parts, settings, result):
        sizes = {"global": 2 * BATCH, "local": LOCAL * BATCH, "patches": PATCHES}
        x = {name: torch.randn(rows, DIM) for name, rows in sizes.items()}
        with torch.no_grad():
            cls, patches = teacher["dino_head"](x["global"]), teacher["ibot_head"](x["patches"])
            targets = [
                dino.sinkhorn_knopp_teacher(cls, teacher_temp=TAU_T).unflatten(0, (2, BATCH)),
                ibot.sinkhorn_knopp_teacher(
                    patches, teacher_temp=TAU_T, n_masked_patches_tensor=torch.tensor([PATCHES])
                ),
            ]
        value = total(student, x, dino, ibot, targets)
        optimizer.zero_grad()
        value.backward()
        exact = copy.deepcopy(student).double()
        exact.zero_grad()
        if settings["unit"]:
            original.load_state_dict(student.state_dict(), strict=True)
            original.zero_grad()
            want, expecting = total(original, x, dino, ibot, targets), original
        else:
            x = {name: tokens.double() for name, tokens in x.items()}
            want, expecting = reference(exact, copy.deepcopy(teacher).double(), x), exact
        want.backward()
        gradients, expected = ({n: p.grad.clone() for n, p in m.named_parameters()} for m in (student, expecting))
        for name in expected if settings["unit"] else ():
            if "last_layer" in name:  # the norms, where log C_p has a slope, are not DINOv3's
                unit = student.get_parameter(name).detach()
                for g in (gradients, expected):
                    g[name] = g[name] - (g[name] * unit).sum(dim=1, keepdim=True) * unit
        # There are no norms and directions apart here: the last layer is the part "weight_v".
        renamed = [
            {n.replace("last_layer.weight", "last_layer.weight_v"): g for n, g in each.items()}
            for each in (gradients, expected)
        ]
        found = errors(value.detach(), renamed[0], want.detach(), renamed[1])
        result["errors"].append(found)
        result["losses"].append(value.detach())
        optimizer.step()
        if settings["unit"]:
            set_norms(student, torch.ones(K))
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
    result |= {"student": student.state_dict(), "teacher": teacher.state_dict()}
    torch.save(result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
