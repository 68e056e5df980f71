"""Prototypes that follow the teacher's features as a vMF mixture, by online EM; the loss trains the networks alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.prototypes import OnlineEMSettings
from config.recipe import Recipe
from runtime.distributed import gather_rows, world_size
from vmf_heads import HeadOutput
from vmf_heads.mixture import OnlineEM, VMFMixture

EMPTY_ROWS = 2.0
"""A component that explains fewer of the remembered rows is moved to a row that the mixture explains badly."""


class OnlineMixture(nn.Module):
    """The vMF mixture whose components are the prototypes of both heads, `online_em` of a recipe. Experimental.

    At every step, with the teacher's features y of all global crops of all processes and the recipe's
    N = `rows_per_prototype` * K::

        s <- (N s + sum of the mixture's sufficient statistics of the rows) / (N + number of rows)
        weights, mu, kappa <- M-step(s), with kappa <= `max_kappa`
        w_k = student_temp * kappa_k * mu_k in both heads, all kappa times one factor with `median_kappa`

    A head has no weights, and the centre of the loss balances its targets as it does for prototypes that learn: the
    weights are for the E-step alone. The state is the mixture itself, in buffers that checkpoints hold.

    Reference: Govindarajan et al., ICLR 2023, section 6, relate DINO to stochastic EM, as future work; Arteaga et al.,
    arXiv 2510.20108, decouple prototypes by online EM of a Gaussian mixture.
    """

    weights: Tensor
    directions: Tensor
    kappa: Tensor

    def __init__(self, settings: OnlineEMSettings, recipe: Recipe) -> None:
        super().__init__()
        self.settings, self.student_temp = settings, recipe.student_temp
        self.register_buffer("weights", torch.zeros(recipe.out_dim))
        self.register_buffer("directions", torch.zeros(recipe.out_dim, recipe.bottleneck_dim))
        self.register_buffer("kappa", torch.zeros(recipe.out_dim))
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def start_(self, mixture: VMFMixture) -> None:
        """Begin with this mixture; every process must call it, and all get that of the first."""
        self._keep(mixture)
        self.kappa.clamp_(max=self.settings.max_kappa)
        if world_size() > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, src=0)  # whatever the processors of other machines round

    def collect(self, output: Tensor | HeadOutput) -> None:
        """Keep the unit features (B, p) that the teacher's head returned for the update at the end of the step."""
        self._rows.append(output.features if isinstance(output, HeadOutput) else output)

    @torch.no_grad()
    def update_(self) -> dict[str, float]:
        """Learn from what was collected, on all processes together; return statistics of the step."""
        rows, self._rows = torch.cat(self._rows), []
        online = OnlineEM(
            VMFMixture(self.weights, self.directions, self.kappa),
            max_kappa=self.settings.max_kappa,
            memory_rows=self.settings.rows_per_prototype * len(self.kappa),
            exponent=0,
        )
        log_likelihood = online.update_(rows)
        empty = online.mixture.weights * online.memory_rows < EMPTY_ROWS
        if empty.any():
            everybody = gather_rows(rows.flatten()).view(-1, rows.shape[1])
            # A few of each step, so that no step's rows alone decide about the mixture.
            worst = online.mixture.log_prob(everybody).topk(max(1, len(everybody) // 16), largest=False)
            online.reseed_(empty, everybody[worst.indices])
        self._keep(online.mixture)
        return {"mixture_log_likelihood": log_likelihood, "mixture_empty": float(empty.sum())}

    def of_heads(self) -> VMFMixture:
        """Return the mixture that the heads are at the student's temperature."""
        kappa = self.kappa
        if self.settings.median_kappa:
            kappa = kappa * (self.settings.median_kappa / kappa.median())
        return VMFMixture(self.weights, self.directions, kappa)

    def write_(self, *networks: nn.Module) -> None:
        """Make the prototypes of these networks the mixture: w = student_temp * kappa * mu."""
        for network in networks:
            self.of_heads().to_head(network, self.student_temp)

    def _keep(self, mixture: VMFMixture) -> None:
        self.weights.copy_(mixture.weights)
        self.directions.copy_(mixture.directions)
        self.kappa.copy_(mixture.kappa)
