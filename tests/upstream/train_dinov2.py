"""Runs DINOv2's SSLMetaArch on a small backbone: train_dinov2.py CHECKOUT OUTPUT SETTINGS.

DINOv2's training needs FSDP on CUDA, xFormers, omegaconf and fvcore. Here its SSLMetaArch is built by its own
constructor and trained by its own forward_backward, parameter groups and teacher update, without FSDP. Stand-ins: the
backbone, xFormers' BlockDiagonalMask (which concatenates and splits), FSDP's module list, and what `stand_ins` lists.

Settings: "unit" freezes the prototype norms at 1 and trains with SGD, "center" is the loss's centring, "sinkhorn"
is DINOv2's `train.centering: sinkhorn_knopp`, "shared" one head for both losses, "start_of" names the result whose
weights to start from, "norms" spreads the prototype norms, "compare" compares with the equations; and those of
`interruption`, of steps.
"""

import copy
import json
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, interruption, stand_ins
from upstream.steps import empty_result, errors, spread_norms

K, P, DIM, PATCHES, BATCH, LOCAL = 48, 16, 32, 16, 3, 2
TEMPERATURES = (0.04, 0.04, 0.07, 0.07)


class Backbone(nn.Module):
    """Features of patches and of their mean; masked patches are replaced by a token."""

    _streams = None  # FSDP's

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(12, DIM)
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))
        self.mix = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x: Any, masks: Any = None, is_training: bool = True) -> Any:
        if isinstance(x, list):
            return [self(crops, mask) for crops, mask in zip(x, masks, strict=True)]
        tokens = self.patch_embed(x)
        if masks is not None:
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token, tokens)
        tokens = tokens + self.mix(tokens + tokens.mean(dim=1, keepdim=True))
        return {"x_norm_clstoken": tokens.mean(dim=1), "x_norm_patchtokens": tokens}


class BlockDiagonalMask:
    """xFormers' of tensors (1, n, d): one behind the other, and apart again."""

    @staticmethod
    def from_tensor_list(tensors: list[Tensor]) -> tuple[Any, Tensor]:
        lengths = [tensor.shape[1] for tensor in tensors]
        return SimpleNamespace(split=lambda x: list(x.split(lengths, dim=1))), torch.cat(tensors, dim=1)


def install_missing_modules(checkout: str) -> None:
    stand_ins.install(crop_sizes=[], images=0)
    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    fsdp = ModuleType("dinov2.fsdp")
    fsdp.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    fsdp.get_fsdp_wrapper = fsdp.reshard_fsdp_model = lambda *args, **kwargs: None
    fsdp.ShardedGradScaler = None
    models = ModuleType("dinov2.models")
    models.build_model_from_cfg = lambda cfg: (Backbone(), Backbone(), DIM)
    transformer = ModuleType("dinov2.models.vision_transformer")
    transformer.BlockChunk = nn.ModuleList
    train = ModuleType("dinov2.train")  # its __init__ imports the training script, and with it fvcore and the data
    train.__path__ = [f"{checkout}/dinov2/train"]
    sys.modules["xformers"] = ModuleType("xformers")
    sys.modules |= {module.__name__: module for module in (ops, fsdp, models, transformer, train)}


def config(settings: dict[str, Any]) -> Any:
    head = {"head_n_prototypes": K, "head_bottleneck_dim": P, "head_nlayers": 3, "head_hidden_dim": 24}
    tree = {
        "compute_precision": {"grad_scaler": False},
        "student": {"pretrained_weights": "", "arch": "small"},
        "dino": {"loss_weight": 1.0, "koleo_loss_weight": 0.1, **head},
        "ibot": {
            "loss_weight": 1.0,
            "mask_ratio_min_max": [0.1, 0.5],
            "mask_sample_probability": 0.5,
            "separate_head": not settings.get("shared"),
            **head,
        },
        "crops": {"local_crops_number": LOCAL},
        "train": {"centering": "sinkhorn_knopp" if settings.get("sinkhorn") else "centering"},
        "optim": {"layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2},
    }
    return json.loads(json.dumps(tree), object_hook=lambda d: SimpleNamespace(**d))


def batch(step: int) -> dict[str, Any]:
    """What DINOv2's collate_data_and_cast makes: crops of patches, masks of half of the images."""
    generator = torch.Generator().manual_seed(step)
    masks = torch.rand(2 * BATCH, PATCHES, generator=generator) < torch.tensor([0.4, 0.0, 0.3, 0.0, 0.5, 0.2])[:, None]
    index = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    return {
        "collated_global_crops": torch.randn(2 * BATCH, PATCHES, 12, generator=generator),
        "collated_local_crops": torch.randn(LOCAL * BATCH, PATCHES // 4, 12, generator=generator),
        "collated_masks": masks,
        "mask_indices_list": index,
        "masks_weight": weights,
        "upperbound": len(index) + 2,
        "n_masked_patches": torch.full((1,), len(index)),
    }


def sinkhorn(logits: Tensor) -> Tensor:
    q = logits.exp()
    for _ in range(3):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    return q


class Reference:
    """The total of forward_backward from the equations; each centre is one batch behind, as in DINOv2."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.centers = [torch.zeros(K, dtype=torch.float64)] * 2

    def __call__(
        self, architecture: nn.Module, images: dict[str, Any], temperature: float, of_normalizer: float | None
    ) -> tuple[Tensor, nn.ModuleDict]:
        student, teacher = (copy.deepcopy(m).double() for m in (architecture.student, architecture.teacher))
        patch_head = "dino_head" if self.settings.get("shared") else "ibot_head"
        masks = images["collated_masks"]
        globals_, locals_ = images["collated_global_crops"].double(), images["collated_local_crops"].double()

        def features(head: nn.Module, x: Tensor) -> Tensor:
            return nn.functional.normalize(head.mlp(x), dim=-1)

        with torch.no_grad():
            seen = teacher.backbone(globals_)
            cls = features(teacher["dino_head"], seen["x_norm_clstoken"])
            patches = features(teacher[patch_head], seen["x_norm_patchtokens"][masks])
            targets, following = [], []
            for y, name, center in zip((cls, patches), ("dino_head", patch_head), self.centers, strict=True):
                layer = teacher[name].last_layer
                if self.settings.get("sinkhorn"):
                    targets.append(sinkhorn(y @ equations.prototypes(layer)[0].T / temperature))
                else:
                    targets.append(equations.teacher(y, layer, temperature, center, of_normalizer=of_normalizer))
                    following.append(equations.next_center(y, layer, temperature, center))
        if of_normalizer is None and following:
            self.centers = following
        of_global, of_local = student.backbone(globals_, masks), student.backbone(locals_)
        layer = student["dino_head"].last_layer
        log_global, log_local = (
            equations.log_student(features(student["dino_head"], out["x_norm_clstoken"]), layer, 0.1).unflatten(
                0, (-1, BATCH)
            )
            for out in (of_global, of_local)
        )
        log_patches = equations.log_student(
            features(student[patch_head], of_global["x_norm_patchtokens"][masks]), student[patch_head].last_layer, 0.1
        )
        t = targets[0].unflatten(0, (2, BATCH))
        pairs = [(t[0], log_global[1]), (t[1], log_global[0])] + [(u, s) for u in t for s in log_local]
        total = sum(-(u * s).sum(dim=1).mean() for u, s in pairs) / len(pairs)
        total = total + 0.1 * sum(koleo(x) for x in of_global["x_norm_clstoken"].chunk(2))
        per_patch = -(targets[1] * log_patches).sum(dim=1)
        total = total + (per_patch * images["masks_weight"].double()).sum() / (2 * BATCH)
        return total, student


def koleo(x: Tensor) -> Tensor:
    x = nn.functional.normalize(x, dim=-1)
    nearest = (x @ x.T - 3 * torch.eye(len(x))).argmax(dim=1)
    return -torch.log(nn.functional.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    install_missing_modules(checkout)
    sys.path.insert(0, checkout)
    from vmf_heads.compat import dinov2 as compat

    for name in ("DINOLoss", "iBOTPatchLoss"):
        setattr(compat, name, partial(getattr(compat, name), centering=settings.get("center", "probability")))
    if settings.get("sinkhorn"):
        torch.distributed.init_process_group("gloo", "", 1, 0)  # the original's all_reduce has no guard
    from dinov2.train import ssl_meta_arch
    from dinov2.utils import param_groups

    torch.manual_seed(0)
    architecture = ssl_meta_arch.SSLMetaArch(config(settings))
    for name, module in architecture.student.items():
        architecture.teacher[name].load_state_dict(module.state_dict())
    if settings.get("start_of"):
        architecture.load_state_dict(torch.load(settings["start_of"])["start"], strict=False)
    result = empty_result()
    result["start"] = {
        n: t.clone() for n, t in architecture.state_dict().items() if n.startswith(("student", "teacher"))
    }
    heads = [
        (m[n], low) for m, low in ((architecture.student, 0.4), (architecture.teacher, 0.6)) for n in m if "head" in n
    ]
    for head, lowest in heads:
        if settings.get("norms"):
            spread_norms({lowest: head})
        if settings.get("unit"):
            head.last_layer.weight_g.requires_grad = False
    groups = [g for m in architecture.student.values() for g in param_groups.get_params_groups_with_decay(m, 0.9, 0.2)]
    result["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    optimizer = torch.optim.SGD(groups, lr=1.0) if settings.get("unit") else torch.optim.AdamW(groups, lr=1e-3)

    rates = [group["lr"] for group in optimizer.param_groups]
    reference = Reference(settings)
    losses: list[Tensor] = []
    architecture.backprop_loss = lambda loss: (losses.append(loss.detach().clone()), loss.backward())
    parts = {"architecture": architecture, "optimizer": optimizer}
    for step in interruption.loop(range(4), parts, settings, result):
        temperature, images, expected = TEMPERATURES[step], batch(step), []
        if settings.get("compare"):
            for of_normalizer in (0.1, None):
                want, student = reference(architecture, images, temperature, of_normalizer)
                want.backward()
                expected.append((want.detach(), gradients_of(student)))
        optimizer.zero_grad()
        architecture.forward_backward(images, teacher_temp=temperature)
        for name, pair in zip(("errors_at_wrong_temperature", "errors"), expected, strict=False):
            result[name].append(errors(losses[-1], gradients_of(architecture.student), *pair))
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * (step > 0 or not group["is_last_layer"])  # as in DINOv2, at first 0 in the last layer
        optimizer.step()
        architecture.update_teacher(0.9)
    for loss in (architecture.dino_loss, architecture.ibot_patch_loss):
        loss.apply_center_update()
    state = architecture.state_dict()
    restored = ssl_meta_arch.SSLMetaArch(config(settings))
    restored.load_state_dict(state, strict=True)
    result |= {part: {n: t for n, t in state.items() if n.startswith(part)} for part in ("student", "teacher")}
    result["state_of_loss"] = {n: t for n, t in state.items() if "center" in n}
    result["losses"], result["reference_centers"] = losses, reference.centers
    torch.save(result, output)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
