"""Runs lightly's examples/pytorch/dino.py, shortened: train_lightly.py CHECKOUT OUTPUT SETTINGS.

Settings: "unit" freezes the prototype norms at 1 and trains with SGD, "centering" is the loss's, "start_of" names the
result whose weights to start from, "norms" spreads the prototype norms, "compare" compares with the equations; then
there are those of `interruption`. lightly itself is unchanged; stand-ins are torchvision (data, transforms, the ResNet)
and lightning_utilities, which its transforms import.
"""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, interruption
from upstream.missing import install
from upstream.steps import empty_result, errors, spread_norms

SHORTER = {
    "epochs = 10": "epochs = 2",
    "batch_size=64": "batch_size=4",
    "num_workers=8": "num_workers=0",
    "in range(epochs):": "in epochs_of(range(epochs)):",
    "warmup_teacher_temp_epochs=5,": "warmup_teacher_temp_epochs=1, teacher_temp=0.07,",
}
TEMPERATURES = (0.04, 0.07)


class Images(torch.utils.data.Dataset):
    """8 images, 2 global and 2 local views of each."""

    sizes = (16, 16, 8, 8)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(3, size, size, generator=generator) for size in self.sizes], 0


def small_resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 512, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Identity())


class Run:
    """The variables of the script while it runs, and what is recorded of them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.result = settings, empty_result()
        self.names: dict[str, Any] = {"__name__": "__main__", "epochs_of": self.epochs}
        self.center = torch.zeros(2048, dtype=torch.float64)  # the output_dim of the example
        self.expected: list[tuple[Tensor, dict[str, Tensor]]] = []

    def epochs(self, epochs: range) -> Iterator[int]:
        """In place of the script's `range(epochs)`."""
        parts = {name: self.names[name] for name in ("model", "criterion", "optimizer")}
        return interruption.loop(epochs, parts, self.settings, self.result)

    def optimizer(self, make: Any, parameters: Any, lr: float) -> torch.optim.Optimizer:
        """The script calls this once, when model and loss are complete."""
        model, criterion = self.names["model"], self.names["criterion"]
        if self.settings.get("start_of"):
            model.load_state_dict(torch.load(self.settings["start_of"])["start"], strict=True)
        self.result["start"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if self.settings.get("norms"):
            spread_norms({0.4: model.student_head, 0.6: model.teacher_head})
        self.result["groups"] = [[name for name, _ in model.named_parameters()]]
        criterion.register_forward_hook(self.record_loss)
        kind = type(model.student_head)
        cancel, kind.cancel_last_layer_gradients = kind.cancel_last_layer_gradients, self.record_gradients
        self.cancel = cancel
        optimizer = torch.optim.SGD(parameters, lr=1.0) if self.settings.get("unit") else make(parameters, lr=lr)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.result["options"] = [
            {"names": [names[id(p)] for p in group["params"]], "lr": group["lr"]} for group in optimizer.param_groups
        ]
        return optimizer

    def record_loss(self, criterion: nn.Module, args: Any, value: Tensor) -> None:
        self.result["losses"].append(value.detach().clone())
        if self.settings.get("compare"):
            self.expected = [self.reference(of_normalizer) for of_normalizer in (0.1, None)]

    def reference(self, of_normalizer: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        model, temperature = copy.deepcopy(self.names["model"]).double(), TEMPERATURES[self.names["epoch"]]
        views = [view.double() for view in self.names["views"]]

        def features(who: str, view: Tensor) -> Tensor:
            backbone, head = getattr(model, f"{who}_backbone"), getattr(model, f"{who}_head")
            return nn.functional.normalize(head.layers(backbone(view).flatten(start_dim=1)), dim=1)

        of_teacher, layer = [features("teacher", view).detach() for view in views[:2]], model.teacher_head.last_layer
        targets = [
            equations.teacher(y, layer, temperature, self.center, of_normalizer=of_normalizer) for y in of_teacher
        ]
        log_p = [equations.log_student(features("student", view), model.student_head.last_layer, 0.1) for view in views]
        want = equations.pairs_of_views(targets, log_p)
        want.backward()
        if of_normalizer is None:
            self.center = equations.next_center(torch.cat(of_teacher), layer, temperature, self.center)
        return want.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def record_gradients(self, current_epoch: int) -> None:
        """In place of `cancel_last_layer_gradients`, which the script calls after every backward pass."""
        model, value = self.names["model"], self.result["losses"][-1]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, expected in zip(("errors_at_wrong_temperature", "errors"), self.expected, strict=False):
            self.result[name].append(errors(value, gradients, *expected))
        self.cancel(model.student_head, current_epoch)
        frozen = all(p.grad is None for p in model.student_head.last_layer.parameters())
        assert frozen is (current_epoch < 1), "the example freezes the last layer for one epoch"


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install("torchvision", "lightning_utilities")
    sys.path.insert(0, checkout)
    importlib.import_module("torchvision.datasets").VOCDetection = Images
    importlib.import_module("torchvision.models").resnet18 = small_resnet

    import lightly.models.modules as original
    import lightly.transforms.dino_transform

    lightly.transforms.dino_transform.DINOTransform = lambda: None  # made of torchvision; the data set has the views

    from vmf_heads.compat import lightly as compat

    for module in (original, compat):
        module.DINOProjectionHead = partial(module.DINOProjectionHead, norm_last_layer=bool(settings.get("unit")))
    compat.DINOLoss = partial(compat.DINOLoss, centering=settings.get("centering", "probability"))

    run = Run(settings)
    torch.optim.Adam = partial(run.optimizer, torch.optim.Adam)
    script = Path(checkout, "examples/pytorch/dino.py")
    text = script.read_text()
    for old, new in SHORTER.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    exec(compile(text, script, "exec"), run.names)

    state = run.names["model"].state_dict()
    for who in ("student", "teacher"):
        run.result[who] = {name: tensor for name, tensor in state.items() if name.startswith(who)}
    run.result["state_of_loss"] = run.names["criterion"].state_dict()
    run.result["reference_centers"] = [run.center]
    torch.save(run.result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
