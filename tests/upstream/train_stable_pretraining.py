"""Trains a method of stable-pretraining on a small backbone: train_stable_pretraining.py CHECKOUT OUTPUT SETTINGS.

The method is built by its own constructor; its own forward, its teacher-student wrappers with their moving average, and
the originals of what the diff leaves alone are used. Stand-ins: Lightning, transformers' ModelOutput, loguru,
torchvision, timm, the backbone, and the packages' `__init__` files, which import everything.

Settings: "method" is DINO, iBOT, DINOv2 or DINOv3; "unit" freezes prototypes of norm 1 and trains with SGD, "centering"
and "fused" are the losses', "start_of" names the result whose weights to start from, "norms" spreads the prototype
norms, "compare" compares with the equations, "epochs", "first_epoch" and "resume" stop and continue.
"""

import copy
import importlib
import json
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upstream import equations, lightning
from upstream.missing import install
from upstream.steps import empty_result, errors

K, P, DIM, BATCH, LOCAL = 48, 16, 32, 3, 2
TEMPERATURES = {"DINO": (0.04, 0.07), "iBOT": (0.04, 0.07), "DINOv2": (0.07, 0.07), "DINOv3": (0.07, 0.07)}


class Backbone(nn.Module):
    """timm's vision transformer as far as the methods use it."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, DIM))
        self.mix = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.pos_drop = self.norm = nn.Identity()

    def patch_embed(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).mT

    def _pos_embed(self, patches: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed

    def blocks(self, tokens: Tensor) -> Tensor:
        return tokens + self.mix(tokens + tokens.mean(dim=1, keepdim=True))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(images))))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)[:, 0]


def install_missing_modules(checkout: str) -> None:
    lightning.stand_in()
    install("loguru", "torchvision", "timm", "transformers", "stable_pretraining.utils")
    importlib.import_module("transformers.utils").ModelOutput = object
    for name in ("", ".backbone", ".losses", ".methods"):
        package = ModuleType(f"stable_pretraining{name}")
        package.__path__ = [f"{checkout}/stable_pretraining{name.replace('.', '/')}"]
        sys.modules[package.__name__] = package
    sys.modules["stable_pretraining"].Module = lightning.LightningModule
    for package, module, names in (
        ("backbone", "nn_modules", ["L2Norm"]),
        ("backbone", "utils", ["TeacherStudentWrapper"]),
        ("losses", "dino", ["DINOv1Loss", "DINOv2Loss", "iBOTPatchLoss"]),
    ):
        found = importlib.import_module(f"stable_pretraining.{package}.{module}")
        for name in names:
            setattr(sys.modules[f"stable_pretraining.{package}"], name, getattr(found, name))


def build(method: str) -> Any:
    module = importlib.import_module(f"stable_pretraining.methods.{method.lower()}")
    options: dict[str, Any] = {"projector_hidden_dim": 24, "projector_bottleneck_dim": P}
    if method in ("DINO", "iBOT"):
        options["warmup_epochs_temperature_teacher"] = 1
    if method == "DINO":
        options["n_prototypes"] = K
    else:
        options |= {"n_cls_prototypes": K, "n_patch_prototypes": K, "image_size": 16}
    return getattr(module, method)(Backbone(), **options, ema_decay_start=0.9)


def heads(module: Any) -> dict[str, Any]:
    names = ("projector", "cls_head", "patch_head")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def prototypes(head: nn.Module) -> nn.Linear:
    return head.last_layer if hasattr(head, "last_layer") else head[6]


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of nn.Sequential, and without the losses, so that states compare."""
    names = {n.replace(".mlp.", ".").replace(".last_layer.", ".6."): n for n in state if "loss" not in n}
    return {name: state[n] for name, n in names.items()}


def views(epoch: int) -> list[dict[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(epoch)

    def crops(number: int, size: int) -> list[Tensor]:
        return [torch.randn(BATCH, 3, size, size, generator=generator) for _ in range(number)]

    return [{"global_views": crops(2, 16), "local_views": crops(LOCAL, 8)} for _ in range(2)]


class Reference:
    """The loss of one step from the equations; the centre starts from the first batch and is one batch behind."""

    def __init__(self, method: str) -> None:
        self.method, self.center, self.first = method, torch.zeros(K, dtype=torch.float64), True

    def __call__(
        self, module: Any, batch: dict[str, Any], mask: Tensor | None, temperature: float, of_normalizer: float | None
    ) -> Tensor:
        batch = {name: [crop.double() for crop in crops] for name, crops in batch.items()}
        of_cls = heads(module)["projector" if self.method == "DINO" else "cls_head"]

        def features(wrapper: Any, who: str, x: Tensor) -> Tensor:
            return F.normalize(getattr(wrapper, who).mlp(x), dim=-1)

        def tokens(who: str, crops: list[Tensor], masked: Tensor | None = None) -> Tensor:
            backbone = getattr(module.backbone, who)
            patches = backbone.patch_embed(torch.cat(crops))
            if masked is not None:
                patches = torch.where(masked.bool()[..., None], module.mask_token, patches)
            return backbone.blocks(backbone._pos_embed(patches))

        with torch.no_grad():
            of_teacher = tokens("teacher", batch["global_views"])
            y, layer = features(of_cls, "teacher", of_teacher[:, 0]), of_cls.teacher.last_layer
            if self.method in ("DINO", "iBOT"):
                targets = equations.teacher(y, layer, temperature, self.center, of_normalizer=of_normalizer)
                if of_normalizer is None:
                    following = equations.next_center(y, layer, temperature, self.center)
                    # The momentum is 0.9; without it the first batch's mean is left.
                    self.center = following / 0.1 if self.first else following
                    self.first = False
            else:
                targets = sinkhorn(y @ layer.weight.T / temperature)
        ours = tokens("student", batch["global_views"], mask)
        cls = [ours[:, 0]]
        if self.method != "iBOT":
            cls.append(tokens("student", batch["local_views"])[:, 0])
        log_p = [equations.log_student(features(of_cls, "student", x), of_cls.student.last_layer, 0.1) for x in cls]
        want = equations.pairs_of_views(targets.chunk(2), torch.cat(log_p).split(BATCH))
        if self.method == "DINOv3":
            want = want + module.koleo_weight * sys.modules[type(module).__module__]._koleo_loss(ours[:BATCH, 0])
        if mask is None:
            return want
        rows, of_patch = mask.bool(), module.patch_head
        with torch.no_grad():
            y = features(of_patch, "teacher", of_teacher[:, 1:][rows])
            targets = sinkhorn(y @ of_patch.teacher.last_layer.weight.T / temperature)
        y = features(of_patch, "student", ours[:, 1:][rows])
        log_patch = equations.log_student(y, of_patch.student.last_layer, 0.1)
        return want - (targets * log_patch).sum(dim=1).mean()


def sinkhorn(logits: Tensor) -> Tensor:
    q = logits.exp()
    for _ in range(3):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install_missing_modules(checkout)
    sys.path.insert(0, checkout)
    from vmf_heads.compat import stable_pretraining as compat

    fused = settings.get("fused", False)
    compat.DINOv1Loss = partial(compat.DINOv1Loss, centering=settings.get("centering", "probability"), fused=fused)
    compat.iBOTPatchLoss = partial(compat.iBOTPatchLoss, fused=fused)
    compat.DINOv2Loss = partial(compat.DINOv2Loss, fused=fused)
    method = settings["method"]
    module = build(method)
    if settings.get("start_of"):
        module.load_state_dict(torch.load(settings["start_of"])["start"], strict=True)
    for wrapper in heads(module).values():
        for head, lowest in ((wrapper.student, 0.4), (wrapper.teacher, 0.6)):
            weight = prototypes(head).weight
            if settings.get("unit"):
                weight.data = F.normalize(weight.data, dim=1)
                weight.requires_grad = False
            if settings.get("norms"):
                weight.data = F.normalize(weight.data, dim=1) * torch.linspace(lowest, 4, K)[:, None]
    result = empty_result()
    result["start"] = {n: t.clone() for n, t in original_names(module.state_dict()).items()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    result["groups"] = len(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.5) if settings.get("unit") else torch.optim.AdamW(parameters, lr=1e-3)
    first = settings.get("first_epoch", 0)
    if first:
        checkpoint = torch.load(settings["resume"], weights_only=False)
        module.load_state_dict(checkpoint["state_dict"], strict=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"])
    masks: list[Tensor] = []
    if hasattr(module, "_random_mask"):
        draw = module._random_mask
        module._random_mask = lambda *args, **kwargs: masks.append(draw(*args, **kwargs)) or masks[-1]

    reference = Reference(method)
    for epoch in range(first, settings.get("epochs", 2)):
        module.current_epoch = epoch
        for batch in views(epoch):
            before = copy.deepcopy(module).double() if settings.get("compare") else None
            loss = module(**({"global_views": batch["global_views"]} if method == "iBOT" else batch)).loss
            result["losses"].append(loss.detach().clone())
            optimizer.zero_grad()
            loss.backward()
            gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            for name, of_normalizer in (("errors_at_wrong_temperature", 0.1), ("errors", None)):
                if before is None:
                    continue
                exact, mask = copy.deepcopy(before), masks[-1] if masks else None
                want = reference(exact, batch, mask, TEMPERATURES[method][epoch], of_normalizer)
                want.backward()
                expected = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
                result[name].append(errors(loss.detach(), gradients, want.detach(), expected))
            optimizer.step()
            for wrapper in (module.backbone, *heads(module).values()):
                wrapper.update_teacher()

    state = module.state_dict()
    names = original_names(state)
    result["student"] = {n: t for n, t in names.items() if ".teacher." not in n}
    result["teacher"] = {n: t for n, t in names.items() if ".teacher." in n}
    result["state_of_loss"] = {n.rpartition(".")[2]: t for n, t in state.items() if n.endswith("center")}
    if method in ("DINO", "iBOT") and not result["state_of_loss"]:  # the original keeps it to itself
        module.dino_loss.apply_center_update()
        result["state_of_loss"] = {"center": module.dino_loss.center.view(1, K)}
    result["reference_centers"] = [reference.center]
    result["columns"] = next(iter(heads(module).values())).student(torch.zeros(1, DIM)).shape[-1]
    result["checkpoint"] = {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
