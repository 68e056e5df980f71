"""Runs lightly's examples/pytorch/dinov2.py, shortened: train_lightly_dinov2.py CHECKOUT OUTPUT SETTINGS.

Settings: "unit" freezes the prototype norms at 1 and trains with SGD, "separate" gives the patches a head of their own,
"centering" is the losses', the others are as in train_lightly.py. lightly itself is unchanged;
stand-ins are those of train_lightly.py and, for timm, a small backbone without drop path.
"""

import copy
import importlib
import json
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, interruption
from upstream.missing import install
from upstream.steps import empty_result, errors, spread_norms
from upstream.train_lightly import Images

K, DIM = 48, 384
SIZES = {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": K}
SHORTER = {
    "epochs = 50": "epochs = 2",
    "batch_size=64": "batch_size=4",
    "num_workers=8": "num_workers=0",
    "in range(epochs):": "in epochs_of(range(epochs)):",
    'else "mps"': 'else "cpu"',
    "warmup_steps=int(30 / epochs * total_steps)": "warmup_steps=2",
}


class Views(Images):
    """Views of 8 x 8 and 4 x 4 patches."""

    sizes = (32, 32, 16, 16)


class SmallTransformer(nn.Module):
    """What the script and lightly's wrapper use of timm's: patches of 4 pixels, one block that mixes the tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 4, 4)
        self.patch_embed.grid_size = (8, 8)
        self.mix, self.cls_token = nn.Linear(DIM, DIM), nn.Parameter(torch.randn(1, 1, DIM))


class Backbone(nn.Module):
    """In place of lightly's MaskedVisionTransformerTIMM."""

    sequence_length = 1 + 8 * 8

    def __init__(self, vit: SmallTransformer, **options: Any) -> None:
        super().__init__()
        self.vit, self.mask_token = vit, nn.Parameter(torch.randn(1, 1, DIM))

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        patches = self.vit.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token, tokens)
        return tokens + torch.tanh(self.vit.mix(tokens - tokens.mean(dim=1, keepdim=True)))


class Run:
    """The variables of the script while it runs, and what is recorded of them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.result = settings, empty_result()
        self.names: dict[str, Any] = {"__name__": "__main__", "epochs_of": self.epochs}
        self.centers = [torch.zeros(K, dtype=torch.float64) for _ in range(2)]

    def epochs(self, epochs: range) -> Iterator[int]:
        """In place of the script's `range(epochs)`."""
        parts = {name: self.names[name] for name in ("model", "dino_criterion", "ibot_criterion", "optimizer")}
        return interruption.loop(epochs, parts, self.settings, self.result)

    def optimizer(self, make: Any, parameters: Any, lr: float) -> torch.optim.Optimizer:
        """The script calls this once, when model and losses are complete."""
        model = self.names["model"]
        heads = [model.student_head.dino_head, model.teacher_head.dino_head]
        heads += [model.student_head.ibot_head, model.teacher_head.ibot_head]
        if self.settings.get("start_of"):
            model.load_state_dict(torch.load(self.settings["start_of"])["start"], strict=True)
        self.result["start"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if self.settings.get("norms"):
            spread_norms(dict(zip((0.4, 0.6, 0.5, 0.7), heads, strict=True)))
        for head in heads if self.settings.get("unit") else []:
            head.last_layer.weight_g.requires_grad = False
        self.result["groups"] = [[name for name, _ in model.named_parameters()]]
        torch.manual_seed(1)  # the order of the images and their masks
        random.seed(1)
        made = torch.optim.SGD(parameters, lr=0.1) if self.settings.get("unit") else make(parameters, lr=lr)
        made.register_step_pre_hook(self.record)
        return made

    def record(self, *args: Any) -> None:
        """After the backward pass: the model is still that of the forward."""
        model, value = self.names["model"], self.names["loss"].detach()
        self.result["losses"].append(value.clone())
        if not self.settings.get("compare"):
            return
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, of_normalizer in (("errors_at_wrong_temperature", 0.1), ("errors", None)):
            self.result[name].append(errors(value, gradients, *self.reference(of_normalizer)))

    def reference(self, of_normalizer: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        model, temperature = copy.deepcopy(self.names["model"]).double(), self.names["teacher_temp"]
        model.zero_grad()
        views = [view.double() for view in self.names["views"]]
        mask, block_mask = self.names["mask"], self.names["block_mask"]

        def unit(head: nn.Module, tokens: Tensor) -> Tensor:
            return nn.functional.normalize(head.layers(tokens), dim=-1)

        heads = model.teacher_head
        with torch.no_grad():
            tokens = model.teacher_backbone.encode(torch.cat(views[:2]))
            of_teacher = [unit(heads.dino_head, tokens[:, 0]), unit(heads.ibot_head, tokens[mask])]
        layers = [heads.dino_head.last_layer, heads.ibot_head.last_layer]
        cls_targets, patch_targets = (
            equations.teacher(y, layer, temperature, center, of_normalizer=of_normalizer)
            for y, layer, center in zip(of_teacher, layers, self.centers, strict=True)
        )
        if of_normalizer is None:
            self.centers = [
                equations.next_center(y, layer, temperature, center)
                for y, layer, center in zip(of_teacher, layers, self.centers, strict=True)
            ]

        heads = model.student_head
        tokens = model.student_backbone.encode(torch.cat(views[:2]), mask=mask)
        local = model.student_backbone.encode(torch.cat(views[2:]))
        log_p = equations.log_student(
            unit(heads.dino_head, torch.cat([tokens[:, 0], local[:, 0]])), heads.dino_head.last_layer, 0.1
        )
        want = equations.pairs_of_views(cls_targets.chunk(2), log_p.chunk(len(views)))
        log_p = equations.log_student(unit(heads.ibot_head, tokens[mask]), heads.ibot_head.last_layer, 0.1)
        entropy = -(patch_targets * log_p).sum(dim=1)
        for of_image in entropy.split(block_mask.sum(dim=(1, 2)).tolist()):
            if len(of_image):
                want = want + of_image.mean() / len(block_mask)
        want = want + 0.1 * sum(self.names["koleo_criterion"](view) for view in tokens[:, 0].chunk(2))
        want.backward()
        return want.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install("torchvision", "lightning_utilities")
    sys.path.insert(0, checkout)
    importlib.import_module("torchvision.datasets").VOCDetection = Views

    import lightly.loss
    import lightly.models.modules as original
    import lightly.models.utils
    import lightly.transforms.dino_transform

    lightly.transforms.dino_transform.DINOTransform = lambda **options: None  # made of torchvision
    lightly.models.utils.update_drop_path_rate = lambda *args, **kwargs: None
    original.MaskedVisionTransformerTIMM = Backbone
    timm = sys.modules["timm.models.vision_transformer"] = ModuleType("timm.models.vision_transformer")
    timm.vit_small_patch16_224 = SmallTransformer

    from vmf_heads.compat import lightly as compat

    options = {"centering": settings["centering"]} if "centering" in settings else {}
    for module in (original, compat):
        module.DINOv2ProjectionHead = partial(module.DINOv2ProjectionHead, **SIZES)
    for module, own in ((lightly.loss, {}), (compat, options)):
        module.DINOLoss = partial(module.DINOLoss, output_dim=K, **own)
        module.IBOTPatchLoss = partial(module.IBOTPatchLoss, output_dim=K, **own)

    run = Run(settings)
    torch.optim.AdamW = partial(run.optimizer, torch.optim.AdamW)
    script = Path(checkout, "examples/pytorch/dinov2.py")
    text = script.read_text()
    for old, new in (SHORTER | ({"= DINOv2()": "= DINOv2(True)"} if settings.get("separate") else {})).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    exec(compile(text, script, "exec"), run.names)

    state = run.names["model"].state_dict()
    for who in ("student", "teacher"):
        run.result[who] = {name: tensor for name, tensor in state.items() if name.startswith(who)}
    run.result["state_of_loss"] = {
        f"{name}.{key}": tensor
        for name in ("dino", "ibot")
        for key, tensor in run.names[f"{name}_criterion"].state_dict().items()
    }
    run.result["reference_centers"] = run.centers
    torch.save(run.result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
