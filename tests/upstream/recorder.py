"""Watches the training loop of a repository: losses, gradients before clipping, optimiser groups, final states."""

import copy
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# (loss, next centres) of copies in float64, what went into the student, epoch, centres and log C_p's temperature.
Reference = Callable[..., tuple[Tensor, list[Tensor]]]


class Interrupted(Exception):
    """Raised at the epoch at which the training is to stop."""


class Recorder:
    """Wraps `main.train_one_epoch` and `utils.clip_gradients`; `result` is what the tests compare.

    Settings: "start_of" is the file of another run's result, whose weights training starts from; "norms" spreads the
    prototype norms from 0.4 to 4; "stop_at" is an epoch; "compare" compares every step with `reference` and with what
    that gives when the teacher's normaliser is left at the student's temperature; "leave_temperature" makes this
    mistake in the library.
    """

    def __init__(
        self,
        main: ModuleType,
        utils: ModuleType,
        settings: dict[str, Any],
        reference: Reference,
        centers: list[Tensor],
    ) -> None:
        self.result: dict[str, Any] = {"losses": [], "errors": [], "errors_at_wrong_temperature": []}
        self.settings, self.reference, self.centers = settings, reference, centers
        self._train_one_epoch, main.train_one_epoch = main.train_one_epoch, self.train_one_epoch
        self._clip_gradients, utils.clip_gradients = utils.clip_gradients, self.clip_gradients
        utils.SmoothedValue.synchronize_between_processes = lambda meter: None
        self.inputs: list[Any] = []
        self.expected: list[tuple[Tensor, dict[str, Tensor]]] = []

    def train_one_epoch(
        self, student: nn.Module, teacher: nn.Module, bare_teacher: nn.Module, loss: nn.Module, *rest: Any
    ) -> Any:
        """`rest` is data_loader, optimizer, lr_schedule, wd_schedule, momentum_schedule, epoch, scaler, args."""
        optimizer, epoch = rest[1], rest[5]
        if epoch == self.settings.get("stop_at"):
            raise Interrupted
        random.seed(epoch)  # iBOT draws its masks from it
        self.student, self.teacher, self.loss, self.epoch = student.module, bare_teacher, loss, epoch
        models = {"student": self.student, "teacher": bare_teacher}
        if epoch == 0 and self.settings.get("start_of"):
            start = torch.load(self.settings["start_of"])["start"]
            for name, model in models.items():
                model.load_state_dict(start[name], strict=True)
        if epoch == 0:
            self.result["start"] = {name: _clones(model) for name, model in models.items()}
        if self.settings.get("leave_temperature"):
            _leave_temperature(bare_teacher.head)
        if self.settings.get("norms") and epoch == 0:
            for model, lowest in ((student, 0.4), (teacher, 0.6)):
                for name, parameter in model.named_parameters():
                    if name.endswith("weight_g"):
                        parameter.data = torch.linspace(lowest, 4, len(parameter)).unsqueeze(1)
        names = {id(parameter): name for name, parameter in self.student.named_parameters()}
        self.result["groups"] = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        hooks = [
            student.register_forward_pre_hook(
                lambda module, args, kwargs: self.inputs.append((args, kwargs)), with_kwargs=True
            ),
            loss.register_forward_hook(self.record_loss),
        ]
        statistics = self._train_one_epoch(student, teacher, bare_teacher, loss, *rest)
        for hook in hooks:
            hook.remove()
        self.result["options"] = [
            {name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups
        ]
        self.result |= {name: model.state_dict() for name, model in models.items()}
        self.result["state_of_loss"] = loss.state_dict()
        return statistics

    def record_loss(self, loss: nn.Module, args: Any, value: Any) -> None:
        """Before the backward pass: the student and teacher of the reference are those of this forward."""
        value = value["loss"] if isinstance(value, dict) else value
        self.result["losses"].append(value.detach().clone())
        if not self.settings.get("compare"):
            return
        self.expected = []
        for of_normalizer in (0.1, None):
            student, teacher = (copy.deepcopy(m).double() for m in (self.student, self.teacher))
            want, centers = self.reference(student, teacher, self.inputs, self.epoch, self.centers, of_normalizer)
            want.backward()
            gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            self.expected.append((want.detach(), gradients))
        self.centers = centers

    def clip_gradients(self, model: nn.Module, clip: float) -> Any:
        """After the backward pass and before anything is done to the gradients."""
        value = self.result["losses"][-1].double()
        for name, (want, gradients) in zip(("errors_at_wrong_temperature", "errors"), self.expected, strict=False):
            errors = {"loss": float(((value - want) / want).abs())}
            for part in ("weight_g", "weight_v", ""):
                of_part = [n for n in gradients if ("last_layer" not in n if not part else part in n)]
                difference = torch.cat(
                    [(self.student.get_parameter(n).grad.double() - gradients[n]).flatten() for n in of_part]
                )
                exact = torch.cat([gradients[n].flatten() for n in of_part])
                errors[part or "backbone and mlp"] = float(difference.norm() / exact.norm())
            self.result[name].append(errors)
        self.inputs.clear()
        return self._clip_gradients(model, clip)


def _clones(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _leave_temperature(head: Any) -> None:
    """Let the teacher's log C_p be that of temperature 0.1, as of a head that nobody told the schedule's."""
    normalizer = type(head).log_normalizer
    head.log_normalizer = lambda temperature, norms: 0.1 / temperature * normalizer(head, 0.1, norms)
