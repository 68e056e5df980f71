"""Trains solo-learn's `DINO` method on a small backbone: train_solo.py CHECKOUT OUTPUT SETTINGS.

The module is built by its own constructor and goes through its own hooks, in Lightning's order. Stand-ins: Lightning,
OmegaConf, timm, torchmetrics, and the backbones.

Settings: "unit" freezes the prototype norms at 1 and trains with SGD, "centering" and "fused" are the loss's,
"start_of" names the result whose weights to start from, "norms" spreads the prototype norms, "compare" compares with
the equations, "stop_at" and "resume" name an epoch and the file of a checkpoint.
"""

import copy
import importlib
import json
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upstream import equations, lightning
from upstream.missing import Missing, install
from upstream.steps import empty_result, errors, spread_norms

K, P, BATCH = 48, 16, 4
TEMPERATURES = (0.04, 0.07)


class Config(SimpleNamespace):
    """Nested settings as attributes, like OmegaConf's."""


def select(config: Any, path: str, default: Any = None) -> Any:
    """`OmegaConf.select`; a dict becomes settings, to which the caller adds more."""
    for name in path.split("."):
        config = getattr(config, name, None)
    value = default if config is None else config
    return Config() if value == {} and path != "backbone.kwargs" and path != "optimizer.kwargs" else value


class Backbone(nn.Sequential):
    num_features = 32

    def __init__(self, method: str) -> None:
        super().__init__(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32))


def install_missing_modules(checkout: str) -> None:
    lightning.stand_in()
    install("omegaconf", "timm", "torchmetrics", "solo.backbones")
    omega = importlib.import_module("omegaconf")
    omega.DictConfig = Config
    omega.OmegaConf = SimpleNamespace(select=select, is_missing=lambda config, path: select(config, path) is None)
    for name in ("solo", "solo.methods"):  # whose __init__ imports every method and all of its requirements
        package = ModuleType(name)
        package.__path__ = [f"{checkout}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    names = ("convnext", "poolformer", "resnet", "swin", "vit", "wide")
    Missing.__getattr__ = partial_getattr(Missing.__getattr__, names)


def partial_getattr(original: Any, prefixes: tuple[str, ...]) -> Any:
    """Backbones are functions, which a missing module would take for submodules."""

    def get(module: ModuleType, name: str) -> Any:
        return None if module.__name__ == "solo.backbones" and name.startswith(prefixes) else original(module, name)

    return get


def config(settings: dict[str, Any]) -> Config:
    tree = {
        "method": "dino",
        "max_epochs": 2,
        "backbone": {"name": "small"},
        "data": {"dataset": "stand-in", "num_classes": 3, "num_large_crops": 2, "num_small_crops": 0},
        "optimizer": {"name": "adamw", "batch_size": BATCH, "lr": 1e-3, "weight_decay": 1e-4, "classifier_lr": 0.1},
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": 0.9},
        "method_kwargs": {
            "proj_hidden_dim": 24,
            "proj_output_dim": P,
            "num_prototypes": K,
            "norm_last_layer": bool(settings.get("unit")),
            # Biases in front of it have gradients of 0, and what rounding leaves of these has no equal.
            "use_bn_in_head": not settings.get("unit"),
            "clip_grad": 0.3,
            "warmup_teacher_temperature_epochs": 1,
        },
    }
    return json.loads(json.dumps(tree), object_hook=lambda d: Config(**d))


def batches(epoch: int) -> list[Any]:
    """[image numbers, views, labels], as solo-learn's loaders give them."""
    generator = torch.Generator().manual_seed(epoch)
    views = torch.randn(2, 2, BATCH, 3, 16, 16, generator=generator)
    return [[torch.arange(BATCH), list(pair), torch.arange(BATCH) % 3] for pair in views]


class Run:
    """The module in training, and what is recorded of it."""

    def __init__(self, module: Any, settings: dict[str, Any]) -> None:
        self.module, self.settings, self.result = module, settings, empty_result()
        self.center = torch.zeros(K, dtype=torch.float64)
        self.before: Any = None
        module.dino_loss_func.register_forward_hook(self.record_loss)

    def record_loss(self, loss: nn.Module, args: Any, value: Tensor) -> None:
        self.result["losses"].append(value.detach().clone())
        if self.settings.get("compare"):
            self.before = copy.deepcopy(self.module).double()

    def compare(self, batch: Any) -> None:
        if not self.settings.get("compare"):
            return
        gradients = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        for name, of_normalizer in (("errors_at_wrong_temperature", 0.1), ("errors", None)):
            expected = self.reference(batch, of_normalizer)
            self.result[name].append(errors(self.result["losses"][-1], gradients, *expected))

    def reference(self, batch: Any, of_normalizer: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        module, temperature = copy.deepcopy(self.before), TEMPERATURES[self.module.current_epoch]
        views = [view.double() for view in batch[1]]

        def features(backbone: nn.Module, head: nn.Module) -> list[Tensor]:
            # View by view, as solo-learn does, which is another batch normalisation than of both together.
            return [F.normalize(head.mlp(backbone(view)), dim=1) for view in views]

        with torch.no_grad():
            of_teacher = features(module.momentum_backbone, module.momentum_head)
        layer = module.momentum_head.last_layer
        targets = [
            equations.teacher(y, layer, temperature, self.center, of_normalizer=of_normalizer) for y in of_teacher
        ]
        of_student = features(module.backbone, module.head)
        log_p = [equations.log_student(y, module.head.last_layer, 0.1) for y in of_student]
        want = equations.pairs_of_views(targets, log_p)
        want.backward()
        if of_normalizer is None:
            self.center = equations.next_center(torch.cat(of_teacher), layer, temperature, self.center)
        return want.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install_missing_modules(checkout)
    sys.path.insert(0, checkout)
    from vmf_heads.compat import solo as compat

    options = {name: settings[name] for name in ("centering", "fused") if name in settings}
    compat.DINOLoss = partial(compat.DINOLoss, **options)
    from solo.methods import base, dino

    base.BaseMethod._BACKBONES["small"] = Backbone
    module = dino.DINO(config(settings))
    if settings.get("start_of"):
        module.load_state_dict(torch.load(settings["start_of"])["start"], strict=False)
    start = {n: t.clone() for n, t in module.state_dict().items() if not n.startswith("dino_loss_func")}
    if settings.get("norms"):
        spread_norms({0.4: module.head, 0.6: module.momentum_head})
    run = Run(module, settings)
    run.result["start"] = start
    groups = module.learnable_params
    run.result["groups"] = [group["name"] for group in groups]
    optimizer = torch.optim.SGD(groups, lr=0.1) if settings.get("unit") else torch.optim.AdamW(groups, lr=1e-3)
    first = settings.get("first_epoch", 0)
    if first:
        checkpoint = torch.load(settings["resume"], weights_only=False)
        module.load_state_dict(checkpoint["state_dict"], strict=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        module.trainer.global_step, module.momentum_updater.cur_tau = checkpoint["global_step"], checkpoint["tau"]
    epochs = [batches(epoch) for epoch in range(settings.get("epochs", 2))]
    lightning.fit(module, optimizer, epochs, run.compare, first_epoch=first)

    state = module.state_dict()
    for part, prefixes in (("student", ("backbone", "head")), ("teacher", ("momentum",))):
        run.result[part] = {n: t for n, t in state.items() if n.startswith(prefixes)}
    run.result["state_of_loss"] = module.dino_loss_func.state_dict()
    run.result["reference_centers"] = [run.center]
    run.result["checkpoint"] = {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "global_step": module.trainer.global_step,
        "tau": module.momentum_updater.cur_tau,
    }
    torch.save(run.result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
