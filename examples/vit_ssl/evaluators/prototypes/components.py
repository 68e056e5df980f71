"""The mixture in a checkpoint: its prototypes and what turns backbone features into scores, logits and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backbones.public_checkpoints import read_network
from evaluators.protocol import Evaluation, NotApplicable
from vmf_heads import VMFPrototypeHead

if TYPE_CHECKING:
    from training.run import Run


@dataclass(frozen=True)
class Components:
    """A trained mixture of K components on the sphere in p dimensions."""

    prototypes: Tensor
    """The prototypes w (K, p)."""
    temperature: float
    """The student's temperature, which kappa = ||w|| / temperature and the logits of Eq. 6 are formed with."""
    log_normalizer: Tensor
    """The normaliser log C_p(kappa) (K,) up to a constant, zeros without vMF normalisation."""
    project: Callable[[Tensor], Tensor]
    """Backbone features (N, D) -> unit vectors y (N, p)."""
    targets: Callable[[Tensor], Tensor] | None = None
    """Scores <w, y> (N, K) -> the probabilities that the student is taught (N, K); None where the centre is unknown."""

    def logits(self, scores: Tensor) -> Tensor:
        """Return the logits of Eq. 6 (N, K), before its softmax, of scores <w, y> (N, K)."""
        return scores / self.temperature + self.log_normalizer


def open_components(evaluation: Evaluation, *, normalizer: str, temperature: float) -> Components:
    """Return the prototypes of one of our runs, or of a .pth file with its head.

    For a .pth file, `normalizer` and `temperature` say how it was trained; a run knows.

    Raises NotApplicable for a checkpoint without prototypes.
    """
    if evaluation.run is not None:
        return of_run(evaluation.run)
    source = Path(evaluation.encoder.source) if evaluation.encoder is not None else None
    if source is None or not source.is_file():
        raise NotApplicable("prototypes are in the head, and this checkpoint is a backbone alone")
    head = read_head(read_network(source, key=evaluation.encoder.key), normalizer).to(evaluation.encoder.model.device)
    return Components(head.last_layer.weight, temperature, head.log_normalizer(temperature), head.features)


def of_run(run: Run) -> Components:
    """Return the teacher's features and the prototypes that its targets come from, at the last epoch."""
    layer, temperature = run.method.prototypes(), run.recipe.student_temp
    epoch = min(run.epoch, run.recipe.epochs - 1)
    return Components(
        layer.weight,
        temperature,
        run.head.log_normalizer(temperature, layer.norms),
        run.head.features,
        lambda scores: run.method.targets(scores, epoch),
    )


def read_head(weights: Mapping[str, Tensor], normalizer: str) -> VMFPrototypeHead:
    """Return the projection head `head.*` of DINO's or iBOT's state dict; of iBOT the [CLS] prototypes.

    Raises NotApplicable when there is none: DINO's "full checkpoints" have it, its backbone files have not.
    """
    own = {name.removeprefix("head."): value for name, value in weights.items()}
    own = {name: value for name, value in own.items() if name.startswith(("mlp.", "last_layer."))}
    if not {"last_layer.weight_g", "last_layer.weight_v"} <= own.keys():
        raise NotApplicable(
            "prototypes are in the head, which this file lacks; what DINO calls full checkpoints has it"
        )
    linear = [value for name, value in own.items() if name.startswith("mlp.") and value.dim() == 2]
    if not linear:
        raise NotApplicable("the head in this file has no MLP, so there is no way from features to prototypes")
    (total, dim), (hidden, in_dim) = own["last_layer.weight_v"].shape, linear[0].shape
    head = VMFPrototypeHead(
        in_dim,
        total,
        use_bn=any(name.endswith("running_mean") for name in own),
        nlayers=len(linear),
        hidden_dim=hidden,
        bottleneck_dim=dim,
        mlp_bias=any(name.endswith("bias") for name in own),
        normalizer=normalizer,
        output="scores",
    )
    with torch.no_grad():
        head.load_state_dict(own)
    return head.requires_grad_(False).eval()
