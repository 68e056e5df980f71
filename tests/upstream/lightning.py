"""What a test needs of Lightning: a module that logs nothing, and a loop over its hooks in Lightning's order."""

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from upstream.missing import install


class LightningModule(nn.Module):
    """The attributes that the repositories' modules read."""

    current_epoch = 0

    def __init__(self) -> None:
        super().__init__()
        self.trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=4)

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    log_dict = log


def stand_in() -> None:
    """Let `import lightning` succeed."""
    install("lightning")
    for package in ("lightning", "lightning.pytorch"):
        importlib.import_module(package).LightningModule = LightningModule


def fit(
    module: Any,
    optimizer: torch.optim.Optimizer,
    epochs: Sequence[Sequence[Any]],
    after_backward: Callable[[Any], None],
    *,
    first_epoch: int = 0,
) -> None:
    """Train on these batches; `after_backward` sees each batch before the module's own hook changes gradients."""
    module.on_train_start()
    for epoch, batches in list(enumerate(epochs))[first_epoch:]:
        module.current_epoch = epoch
        module.on_train_epoch_start()
        for index, batch in enumerate(batches):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            after_backward(batch)
            module.on_after_backward()
            optimizer.step()
            module.trainer.global_step += 1
            module.on_train_batch_end(None, batch, index)
