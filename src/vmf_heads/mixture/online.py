"""Online EM: a mixture that follows a stream of feature batches."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from .._checks import positive
from ._steps import Statistics, expectation, maximisation, reseed, statistics_of
from .distribution import VMFMixture

__all__ = ["OnlineEM"]


class OnlineEM:
    """Online EM of Cappé and Moulines for a mixture of von Mises-Fisher distributions.

    It keeps running means s of the sufficient statistics and updates them, then the mixture, with every batch::

        s <- (1 - rate) s + rate * (mean statistics of the batch under the present mixture)
        mixture <- M-step(s)
        rate = B / (B + memory_rows) * step^(-exponent),    step = 1, 2, ...

    with B the rows of the batch, on all ranks together. At the start s is what the mixture itself expects, so that the
    first batches move it by their share of `memory_rows` and do not replace it.

    Args:
        mixture: where to start, for example the result of `fit_vmf_mixture`.
        max_kappa: upper bound of every kappa; without one, a component of a single row would reach infinity.
        memory_rows: how many rows the start counts as much as. None: 20 for each component.
        exponent: in (0.5, 1]: how fast the rate falls. 0 keeps the rate, which makes an exponential moving average of
            the statistics, for features that change while an encoder learns.
        process_group: the ranks whose batches are summed, by one all-reduce in each update; None: all of them.

    Attributes:
        mixture: the present `VMFMixture`.
        step: how many updates there were.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.

    Reference: Cappé and Moulines, "On-line expectation-maximization algorithm for latent data models", JRSS B 71, 2009.

    >>> import torch
    >>> from vmf_heads.mixture import OnlineEM, VMFMixture
    >>> truth = VMFMixture(torch.ones(2), torch.eye(8)[:2], torch.tensor([40.0, 20.0]))
    >>> online = OnlineEM(VMFMixture(torch.ones(2), torch.eye(8)[:2] + 0.3, torch.full((2,), 10.0)), max_kappa=1e4)
    >>> generator = torch.Generator().manual_seed(0)
    >>> for _ in range(40):
    ...     log_likelihood = online.update_(truth.sample(400, generator)[0])
    >>> (online.mixture.kappa / truth.kappa - 1).abs().max() < 0.1
    tensor(True)
    """

    def __init__(
        self,
        mixture: VMFMixture,
        *,
        max_kappa: float,
        memory_rows: float | None = None,
        exponent: float = 0.6,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not (exponent == 0 or 0.5 < exponent <= 1):
            raise ValueError(f"`exponent` (={exponent}) must be 0, or lie in (0.5, 1]")
        self.mixture = mixture
        self.max_kappa = positive("max_kappa", max_kappa)
        default = 20.0 * mixture.num_components
        self.memory_rows = default if memory_rows is None else positive("memory_rows", memory_rows)
        self.exponent = exponent
        self.process_group = process_group
        self.step = 0
        self._mean = statistics_of(mixture)

    def update_(self, features: Tensor) -> float:
        """Learn from unit vectors (B, p), and return their mean log-likelihood in nats before that."""
        found = expectation(self.mixture, features, self.process_group)
        if found.rows == 0:
            return math.nan
        self.step += 1
        rate = found.rows / (found.rows + self.memory_rows) * self.step**-self.exponent
        batch = found.mean()
        self._mean = Statistics(
            self._mean.weight.lerp(batch.weight, rate), self._mean.total.lerp(batch.total, rate), 0.0, 1
        )
        self.mixture = maximisation(self._mean, self.mixture, self.max_kappa)
        return batch.log_likelihood

    def reseed_(self, empty: Tensor, places: Tensor) -> None:
        """Move the first components of `empty` (K,) to the unit vectors `places` (n, p)."""
        self.mixture = reseed(self.mixture, empty, places)
        self._mean = statistics_of(self.mixture)
