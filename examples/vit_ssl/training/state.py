"""The whole of what is trained, as plain tensors that any strategy on any number of processes can continue from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methods.method import Method
from runtime.distributed import is_main
from training.parallel import unwrap


def whole_state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return {"method": state dict, "optimizer": state dict} on the CPU, under the names of the networks without
    wrappers.

    Every process must call it, because what FSDP2 has cut is gathered, tensor by tensor. Only the main one gets the
    values; the others' are empty.
    """
    parts = _parts(method)
    named = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    saved = optimizer.state_dict()
    # Parameters are numbered by group, which no strategy changes; one that was frozen until now has no moments.
    moments = {number: _whole(values) for number, values in saved["state"].items()}
    return {"method": _whole(named), "optimizer": saved | {"state": moments}}


def restore_state(method: Method, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_state` returned on the main process, cut as the networks at hand are cut."""
    for part, module in _parts(method).items():
        _load(module, {name[len(part) + 1 :]: v for name, v in state["method"].items() if name.startswith(f"{part}.")})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _cut_like(parameters[number], value) for name, value in values.items()}
        for number, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def _parts(method: Method) -> dict[str, nn.Module]:
    parts = {"student": unwrap(method.student), "teacher": unwrap(method.teacher), "loss": method.loss}
    return parts if method.mixture is None else parts | {"mixture": method.mixture}


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: _cut_like(own.get(name), value) for name, value in state.items()})


def _whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {}
    for name, value in values.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        whole[name] = value.cpu() if is_main() else value.new_empty(0)
    return whole


def _cut_like(reference: Tensor | None, value: Tensor) -> Tensor:
    if not hasattr(reference, "placements") or value.shape != reference.shape:  # for example AdamW's step counters
        return value
    # Imported here, because a run in one process starts sooner without.
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the same file, so none has to send anything.
    value = value.to(reference.device)
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
