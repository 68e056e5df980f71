"""Trainings of small students whose prototypes are cut over ranks, or whole, with images that ranks share out."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vmf_heads.compat.dino import DINOHead, DINOLoss
from vmf_heads.compat.ibot import iBOTHead, iBOTLoss
from vmf_heads.head import PrototypeHead
from vmf_heads.optim import separate_norms
from vmf_heads.parallel import clip_grad_norm_, prototype_parameters, shard_prototypes
from vmf_heads.prototypes import LinearPrototypes, Prototypes

STEPS, NCROPS, IMAGES = 10, 3, 8
# (loss, mesh, wrapper, precision, options of the heads and of the loss)
CASES: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "1-D": ("dino", "1-D", "DDP", "float64", {}),
    "1-D, clipped": ("dino", "1-D", "DDP", "float64", {"clip": 0.5}),
    "1-D, float32": ("dino", "1-D", "DDP", "float32", {}),
    "1-D, bfloat16 autocast": ("dino", "1-D", "DDP", "bfloat16", {}),
    "1-D, FSDP2, frozen norms": ("dino", "1-D", "FSDP2", "float64", {"norm_last_layer": True, "clip": 0.5}),
    "1-D, centre of logits": ("dino", "1-D", "DDP", "float64", {"centering": "logit"}),
    "1-D, linear": ("dino", "1-D", "DDP", "float64", {"linear": True}),
    "1-D, iBOT": ("ibot", "1-D", "FSDP2", "float64", {}),
    "2-D": ("dino", "2-D", "DDP", "float64", {"center_on": "scores"}),
    "2-D, frozen norms": ("dino", "2-D", "DDP", "float64", {"norm_last_layer": True}),
    "2-D, FSDP2": ("dino", "2-D", "FSDP2", "float64", {"clip": 0.5}),
    "2-D, float32": ("dino", "2-D", "FSDP2", "float32", {}),
    "2-D, bfloat16 autocast": ("dino", "2-D", "FSDP2", "bfloat16", {}),
    "2-D, iBOT with a shared head": ("ibot", "2-D", "DDP", "float64", {"shared_head": True}),
}
TOLERANCES = {
    "float64": {"rtol": 1e-8, "atol": 1e-10},
    "float32": {"rtol": 2e-4, "atol": 2e-6},
    "bfloat16": {"rtol": 1e-2, "atol": 1e-3},  # where float32 differs in its last place, a bfloat16 may differ, too
}
K, P = 25, 6  # 2 ranks hold 13 and 12 prototypes; 4 hold 7, 7, 7 and 4


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meshes(ranks: int) -> dict[str, DeviceMesh]:
    found = {"1-D": init_device_mesh("cpu", (ranks,))}
    return found | ({"2-D": init_device_mesh("cpu", (2, ranks // 2))} if ranks > 2 else {})


class Model(nn.Module):
    """A linear backbone and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(10, 16)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))


def build(loss: str, options: dict[str, Any]) -> tuple[Model, Model, nn.Module]:
    """Student, teacher and loss; norms from 0.3 to 3 unless they are frozen."""
    sizes = {"hidden_dim": 12, "bottleneck_dim": P}
    of_head = {name: options[name] for name in ("norm_last_layer", "shared_head") if name in options}
    of_loss = {name: options[name] for name in ("centering", "center_on") if name in options} | {"fused": True}
    pair = []
    for lowest in (0.3, 0.5):
        if options.get("linear"):
            head = PrototypeHead(16, nn.Linear(16, P), LinearPrototypes(P, K))
        elif loss == "ibot":
            head = iBOTHead(16, K, patch_out_dim=K if "shared_head" in options else K - 3, **sizes, **of_head)
        else:
            head = DINOHead(16, K, **sizes, **of_head)
        for layer in head.modules():
            if isinstance(layer, Prototypes) and "norm_last_layer" not in options:
                layer.weight_g.data = torch.linspace(lowest, 3, len(layer.weight_g)).unsqueeze(1)
        pair.append(Model(head))
    student, teacher = pair[0], pair[1].requires_grad_(False)
    if loss == "dino":
        return student, teacher, DINOLoss(K, NCROPS, 0.04, 0.07, 3, STEPS, **of_loss)
    patches = student.head.num_patch_prototypes
    return student, teacher, iBOTLoss(K, patches, 2, NCROPS - 2, 0.04, 0.07, 0.04, 0.07, 3, STEPS, **of_loss)


def training(case: str, rank: int | None, *, whole_prototypes: bool = False) -> dict[str, Any]:
    """Ten steps of all images, or of this rank's, whose prototypes are cut as the case says or whole."""
    kind, mesh, wrapper, precision, options = CASES[case]
    dtype = torch.float64 if precision == "float64" else torch.float32
    torch.manual_seed(5)
    student, teacher, loss = build(kind, options)
    student, teacher, loss = student.to(dtype), teacher.to(dtype), loss.to(dtype)
    wrapped = student
    if rank is not None:
        for model in () if whole_prototypes else (student, teacher):
            shard_prototypes(model, meshes(dist.get_world_size())[mesh])
        if wrapper == "DDP":
            wrapped = DistributedDataParallel(student)
        else:
            for model in (student, teacher):
                ignored = set() if whole_prototypes else set(prototype_parameters(model))
                fully_shard(model, ignored_params=ignored, reshard_after_forward=True)  # so that the EMA averages parts
                model.set_force_sum_reduction_for_comms(True)  # asked for a mean, gloo of torch 2.8 gives a sum
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the student's prototype norms are frozen")
        loss.attach(wrapped, teacher)
    optimizer = torch.optim.AdamW(
        separate_norms(student.parameters(), student, lr=0.01) if not options else student.parameters(), lr=0.01
    )
    losses, first = [], {}
    for epoch in range(STEPS):
        value = loss_of(kind, wrapped, teacher, loss, epoch, rank, dtype, precision == "bfloat16")
        optimizer.zero_grad()
        value.backward()
        first = first or {name: whole(p.grad).clone() for name, p in student.named_parameters() if p.grad is not None}
        if "clip" in options:
            first["norm"] = first.get("norm", clip_grad_norm_(student.parameters(), options["clip"]))
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
        losses.append(value.detach())
    trained = {
        f"{name} of {who}": whole(p).detach()
        for who, m in (("student", student), ("teacher", teacher))
        for name, p in m.named_parameters()
    }
    return {"losses": torch.stack(losses), "gradients": first, "weights": trained | loss.state_dict()}


def loss_of(
    kind: str,
    student: nn.Module,
    teacher: nn.Module,
    loss: nn.Module,
    epoch: int,
    rank: int | None,
    dtype: torch.dtype,
    autocast: bool,
) -> Tensor:
    generator = torch.Generator().manual_seed(epoch)
    tokens = () if kind == "dino" else (7,)
    views = torch.randn(NCROPS, IMAGES, *tokens, 10, generator=generator, dtype=dtype)
    masks = [torch.rand(IMAGES, 2, 3, generator=generator) < 0.4 for _ in range(2)]
    for mask in masks:
        mask[IMAGES - 2 :] = False  # the last rank has no masked patch, or fewer
    if rank is not None:
        images = slice(rank * IMAGES // dist.get_world_size(), (rank + 1) * IMAGES // dist.get_world_size())
        views, masks = views[:, images], [mask[images] for mask in masks]
    crops, local = views.flatten(0, 1), views[2:].flatten(0, 1)
    seen = views[:2].flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if kind == "dino":
            return loss(student(crops), teacher(seen), epoch)
        return loss(student(seen), teacher(seen), student(local)[0], masks, epoch)["loss"]
