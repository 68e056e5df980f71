"""A mixture of von Mises-Fisher distributions: density, responsibilities, samples, and how much components overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import positive
from .._distributed import is_sharded
from .._matmul import at_least_float32, without_autocast
from .._memory import rows_per_chunk
from ..head import find_head
from ..prototypes import Prototypes
from ..special import log_vmf_normalizer, vmf_mean_resultant
from ._sampling import sample_vmf

__all__ = ["VMFMixture"]


@dataclass(frozen=True, eq=False)
class VMFMixture:
    """The density sum_k weights_k C_p(kappa_k) exp(kappa_k <directions_k, y>) on the unit sphere of R^p.

    With one component it equals SciPy's distribution::

        scipy.stats.vonmises_fisher(directions[0], kappa[0]).logpdf(y)

    Args:
        weights: (K,), not negative; they are divided by their sum.
        directions: mu (K, p), of any length but 0; they are divided by it.
        kappa: (K,), >= 0 and finite.

    All three are kept in the dtype of `directions`, float32 or float64, and on its device. `to` moves them. To save and
    load a mixture: `torch.save(vars(mixture), path)`, `VMFMixture(**torch.load(path))`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit together or values are out of range; the message names the argument.

    >>> import torch
    >>> from vmf_heads.mixture import VMFMixture
    >>> mixture = VMFMixture(torch.tensor([0.5, 0.5]), torch.eye(3)[:2], torch.tensor([50.0, 5.0]))
    >>> mixture.log_prob(torch.eye(3))
    tensor([ 1.3817, -0.9215, -5.9215])
    >>> mixture.responsibilities(torch.eye(3)).argmax(1)
    tensor([0, 1, 1])
    """

    weights: Tensor
    directions: Tensor
    kappa: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "directions", "kappa"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"`{name}` (of {got}) must be a floating tensor")
        directions = at_least_float32(self.directions)
        if directions.dim() != 2 or not len(directions) or directions.shape[1] < 2:
            raise ValueError(f"`directions` (of shape {tuple(directions.shape)}) must have shape (K >= 1, p >= 2)")
        norms = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        if not (norms.isfinite() & (norms > 0)).all():
            raise ValueError("`directions` must have rows of finite length > 0")
        for name in ("weights", "kappa"):
            value = getattr(self, name).to(directions)
            if value.shape != (len(directions),):
                raise ValueError(f"`{name}` (of shape {tuple(value.shape)}) must have shape ({len(directions)},)")
            if not (value.isfinite() & (value >= 0)).all():
                raise ValueError(f"`{name}` must be finite and >= 0, but some are not")
            object.__setattr__(self, name, value)
        if not self.weights.sum() > 0:
            raise ValueError("`weights` must not all be 0")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())
        object.__setattr__(self, "directions", directions / norms)

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.kappa)

    @property
    def dim(self) -> int:
        """p, the dimension of the space the sphere lies in."""
        return self.directions.shape[1]

    def to(self, *args: Any, **kwargs: Any) -> VMFMixture:
        """The mixture on another device or in another dtype, as `Tensor.to`."""
        return VMFMixture(*(tensor.to(*args, **kwargs) for tensor in (self.weights, self.directions, self.kappa)))

    def log_joint(self, y: Tensor) -> Tensor:
        """log(weights_k f_k(y)) (..., K) of unit vectors y (..., p): what a softmax turns into responsibilities.

        In float32 its error is about kappa * 1e-7 nats, because kappa <mu, y> - kappa cancels. Use float64
        (`mixture.to(torch.float64)`, float64 y) where kappa exceeds some 10 000.
        """
        if y.shape[-1:] != (self.dim,):
            raise ValueError(f"`y` (of shape {tuple(y.shape)}) must end in p (={self.dim})")
        with without_autocast(y.device):
            return F.linear(y.to(self.directions), *self.natural_parameters())

    def natural_parameters(self) -> tuple[Tensor, Tensor]:
        """kappa_k mu_k (K, p) and log(weights_k C_p(kappa_k)) (K,): weight and bias of `log_joint` as a layer."""
        offset = self.weights.double().log() + log_vmf_normalizer(self.kappa.double(), self.dim)
        return self.kappa[:, None] * self.directions, offset.to(self.kappa.dtype)

    def log_prob(self, y: Tensor) -> Tensor:
        """The logarithm of the density (...,) at unit vectors y (..., p), with respect to the area of the sphere.

        Rows are taken in chunks, so that without autograd no tensor (..., K) is held.
        """
        rows = y.reshape(-1, y.shape[-1])
        chunks = rows.split(rows_per_chunk(self.num_components, y.device, buffers=2)) if len(rows) else [rows]
        return torch.cat([self.log_joint(chunk).logsumexp(-1) for chunk in chunks]).reshape(y.shape[:-1])

    def responsibilities(self, y: Tensor) -> Tensor:
        """P(component | y) (..., K) of unit vectors y (..., p)."""
        return self.log_joint(y).softmax(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` points (n, p) and the component (n,) of each, the same for the same state of a CPU `generator`.

        Drawn in float64 on the CPU by Wood's rejection (1994), which is exact for every p >= 2 and kappa >= 0, then
        moved to the mixture's dtype and device.

        >>> import torch
        >>> mixture = VMFMixture(torch.ones(1), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([100.0]))
        >>> points, component = mixture.sample(1000, torch.Generator().manual_seed(0))
        >>> torch.round(points.mean(0), decimals=1)
        tensor([1., 0., 0.])
        """
        component = torch.multinomial(self.weights.double().cpu(), n, replacement=True, generator=generator)
        points = sample_vmf(self.directions.double().cpu()[component], self.kappa.cpu()[component], generator)
        return points.to(self.directions), component.to(self.directions.device)

    def kl(self, other: VMFMixture | None = None) -> Tensor:
        """KL(f_j || g_k) (K, L) in nats of each component of this mixture from each of `other` (None: this one).

        In closed form: log C(kappa_j) - log C(kappa_k) + A(kappa_j) (kappa_j - kappa_k <mu_j, mu_k>), evaluated in
        float64. The divergence between the two *mixtures* has no closed form.
        """
        a, b = self._double(), self._double(other)
        log_a, log_b = (log_vmf_normalizer(m.kappa, self.dim, relative=True) for m in (a, b))
        cosine = a.directions @ b.directions.T
        resultant = vmf_mean_resultant(a.kappa, self.dim)[:, None]
        value = log_a[:, None] - log_b + resultant * (a.kappa[:, None] - b.kappa * cosine)
        return value.clamp(min=0).to(self.directions)

    def bhattacharyya(self, other: VMFMixture | None = None) -> Tensor:
        """The overlap int sqrt(f_j g_k) (K, L), in [0, 1], of each component with each of `other` (None: this one).

        In closed form: sqrt(C(kappa_j) C(kappa_k)) / C(||kappa_j mu_j + kappa_k mu_k|| / 2), evaluated in float64. The
        total variation between the two lies between 1 - overlap and sqrt(1 - overlap^2).
        """
        a, b = self._double(), self._double(other)
        return bhattacharyya_coefficient(a.directions, a.kappa, b.directions, b.kappa).to(self.directions)

    def entropy_bounds(self) -> tuple[float, float]:
        """(lower, upper) bounds in nats of the entropy of the mixture, which has no closed form itself.

        With h_k = -log C(kappa_k) - kappa_k A(kappa_k), the entropies of the components, and pairwise divergences d::

            sum_j w_j h_j - sum_j w_j log sum_k w_k exp(-d(j, k))

        where d = -log(overlap) of `bhattacharyya` gives the lower and d = `kl` the upper bound. They meet where all
        components are the same or far apart.

        Reference: Kolchinsky and Tracey, "Estimating mixture entropy with pairwise distances", Entropy 19, 2017.
        """
        m = self._double()
        entropies = -log_vmf_normalizer(m.kappa, self.dim) - m.kappa * vmf_mean_resultant(m.kappa, self.dim)
        within = (m.weights * entropies).sum()
        used = m.weights > 0
        lower, upper = (
            float(within - (m.weights * (similarity @ m.weights).log())[used].sum())
            for similarity in (m.bhattacharyya(), (-m.kl()).exp())
        )
        return lower, upper

    @classmethod
    def from_head(cls, head: nn.Module, temperature: float | None = None) -> VMFMixture:
        """The mixture that a prototype head is: kappa_k = ||w_k|| / temperature, and directions w_k / ||w_k||.

        A head with log C_p gives equal weights, by Eq. 6. One without (`normalizer="none"`, plain DINO) is the mixture
        with weights proportional to 1 / C_p(kappa_k). Either way `responsibilities` of the head's features are
        softmax(logits / temperature).

        Args:
            head: a module with one prototype head inside, also in wrappers; under FSDP2 every rank must call.
            temperature: tau; None is the head's own.

        >>> from vmf_heads import VMFPrototypeHead
        >>> mixture = VMFMixture.from_head(VMFPrototypeHead(384, 100, hidden_dim=64, bottleneck_dim=32))
        >>> mixture.num_components, mixture.dim
        (100, 32)
        """
        found = find_head(head, "head")
        tau = found.temperature if temperature is None else positive("temperature", temperature)
        weight = found.last_layer.gathered()
        norms = torch.linalg.vector_norm(weight, dim=1)
        # A prototype that is 0 has kappa 0, and any direction.
        directions = torch.where(norms[:, None] > 0, weight, torch.ones_like(weight))
        weights = torch.ones_like(norms)
        if found.normalizer == "none":
            weights = (-log_vmf_normalizer(norms.double() / tau, weight.shape[1], relative=True)).softmax(0)
        return cls(weights, directions, norms / tau)

    @torch.no_grad()
    def to_head(self, head: nn.Module, temperature: float | None = None) -> None:
        """Make the prototypes of a head this mixture: w_k = temperature * kappa_k * mu_k, in place.

        A head has no weights. In Eq. 7 `log_center = -mixture.weights.log()` stands for them: targets with that centre
        are the mixture's responsibilities.

        Args:
            head: a module with one prototype head of K prototypes in dimension p inside, with whole parameters.
            temperature: tau; None is the head's own.

        Raises:
            ValueError: the head has another number of prototypes or another dimension.
            RuntimeError: FSDP shards the prototypes: write them before it wraps the model.
        """
        found = find_head(head, "head")
        tau = found.temperature if temperature is None else positive("temperature", temperature)
        layer = found.last_layer
        if (layer.num_prototypes, layer.dim) != (self.num_components, self.dim):
            raise ValueError(
                f"`head` (of {layer.num_prototypes} prototypes in dimension {layer.dim}) must have the mixture's "
                f"{self.num_components} components in dimension {self.dim}"
            )
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise RuntimeError("`head` must have whole prototypes, and here FSDP shards them: call before it wraps")
        if isinstance(layer, Prototypes):
            # The lengths of v do not change the prototypes, but how fast they turn: a head's own stay.
            lengths = torch.linalg.vector_norm(layer.weight_v, dim=1, keepdim=True)
            layer.weight_v.copy_(self.directions.to(layer.weight_v) * torch.where(lengths > 0, lengths, 1))
            layer.weight_g.copy_(tau * self.kappa[:, None])
        else:
            layer.weight.copy_(tau * self.kappa[:, None] * self.directions)

    def _double(self, other: VMFMixture | None = None) -> VMFMixture:
        """`other`, or this mixture, in float64 on this device."""
        mixture = self if other is None else other
        if mixture.dim != self.dim:
            raise ValueError(f"`other` (of dimension {mixture.dim}) must have the dimension p (={self.dim})")
        return mixture.to(self.directions.device, torch.float64)


def bhattacharyya_coefficient(a: Tensor, kappa_a: Tensor, b: Tensor, kappa_b: Tensor) -> Tensor:
    """The overlaps (K, L) of components with directions a (K, p), b (L, p) and their kappa, in float64."""
    p = a.shape[1]
    kappa_a = kappa_a[:, None]
    square = (kappa_a - kappa_b) ** 2 + 2 * kappa_a * kappa_b * (1 + a @ b.T).clamp(min=0)
    log_mean = log_vmf_normalizer(square.sqrt() / 2, p, relative=True)
    log_a, log_b = (log_vmf_normalizer(kappa, p, relative=True) for kappa in (kappa_a, kappa_b))
    return ((log_a + log_b) / 2 - log_mean).clamp(max=0).exp()
