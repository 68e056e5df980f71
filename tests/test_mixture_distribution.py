"""VMFMixture: against SciPy for one component, against sums over components, integrals and heads for several."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

from vmf_heads import VMFPrototypeHead, log_vmf_normalizer, vmf_mean_resultant
from vmf_heads.centering import teacher_targets
from vmf_heads.compat.dinov3 import DINOHead
from vmf_heads.mixture import VMFMixture
from vmf_heads.mixture import distribution as module


def random_mixture(components: int, p: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> VMFMixture:
    generator = torch.Generator().manual_seed(seed)
    kappa = torch.logspace(0, 2, components, dtype=dtype)
    return VMFMixture(
        torch.rand(components, generator=generator, dtype=dtype),
        torch.randn(components, p, generator=generator, dtype=dtype),
        kappa,
    )


def points(n: int, p: int, seed: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("p", [2, 3, 64])
@pytest.mark.parametrize("kappa", [0.5, 20.0, 300.0])
def test_one_component_is_scipys_distribution(p, kappa):
    direction = points(1, p)
    y = torch.cat([points(20, p, seed=2), direction, -direction])
    mixture = VMFMixture(torch.ones(1), direction, torch.tensor([kappa]))
    want = scipy.stats.vonmises_fisher(direction[0].numpy(), kappa).logpdf(y.numpy())
    torch.testing.assert_close(mixture.log_prob(y), torch.from_numpy(want), rtol=1e-11, atol=1e-11)


def test_density_and_responsibilities_are_sums_over_components(monkeypatch):
    monkeypatch.setattr(module, "rows_per_chunk", lambda *_, **__: 3)
    mixture, y = random_mixture(5, 7), points(10, 7)
    each = [VMFMixture(torch.ones(1), mixture.directions[k : k + 1], mixture.kappa[k : k + 1]) for k in range(5)]
    joint = torch.stack([w * f.log_prob(y).exp() for w, f in zip(mixture.weights, each, strict=True)], dim=1)
    torch.testing.assert_close(mixture.log_prob(y).exp(), joint.sum(1))
    torch.testing.assert_close(mixture.responsibilities(y), joint / joint.sum(1, keepdim=True))
    shaped = mixture.log_prob(y.reshape(2, 5, 7))
    torch.testing.assert_close(shaped, mixture.log_prob(y).reshape(2, 5))
    assert mixture.log_prob(y[:0]).shape == (0,)


def test_log_prob_is_differentiable():
    mixture, y = random_mixture(3, 4), points(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(mixture.log_prob, y)


def test_float32_is_close_to_float64():
    mixture, y = random_mixture(50, 256), points(100, 256)
    got = mixture.to(torch.float32).log_prob(y.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), mixture.log_prob(y), rtol=0, atol=2e-4)


@pytest.mark.parametrize("p", [2, 3, 256])
def test_samples_have_the_moments_of_their_component(p):
    """<mu, y> has mean A and variance A'; what is left is uniform around mu. Bounds of five standard errors."""
    kappa = torch.tensor([0.0, 0.3, 10.0, 1e3, 1e7], dtype=torch.float64)
    n = 20_000 if p < 100 else 4000
    mixture = VMFMixture(torch.ones(5), points(5, p), kappa)
    y, component = mixture.sample(5 * n, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(5 * n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = kappa.clone().requires_grad_()
    resultant = vmf_mean_resultant(x, p)
    (variance,) = torch.autograd.grad(resultant.sum(), x)
    for k in range(5):
        own, mu = y[component == k], mixture.directions[k]
        assert abs(len(own) - n) < 5 * math.sqrt(n)
        rest = 0.5 * (own - mu).square().sum(1)  # 1 - <mu, y>
        error = (rest.mean() - (1 - resultant[k].detach())) / (variance[k] / len(own)).sqrt()
        assert abs(error) < 5
        spread = rest.var() / variance[k]
        kurtosis = ((rest - rest.mean()) / rest.std()).pow(4).mean()
        assert abs(spread - 1) < 5 * ((kurtosis - 1) / len(own)).sqrt()
        tangent = own - (own @ mu)[:, None] * mu
        mean = F.normalize(tangent, dim=1).mean(0)
        assert mean.square().sum() * len(own) < 1 + 5 * math.sqrt(2 / (p - 1)) + 1


def test_samples_repeat_with_their_generator():
    mixture = random_mixture(4, 5, torch.float32)
    (a, i), (b, j) = (mixture.sample(100, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(i, j)
    assert a.dtype == torch.float32
    assert not torch.equal(a, mixture.sample(100, torch.Generator().manual_seed(4))[0])


def test_overlaps_are_the_integrals_they_stand_for():
    """On a circle, by the trapezoidal rule."""
    mixture = VMFMixture(
        torch.ones(3),
        torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64),
        torch.tensor([3.0, 10, 0]),
    )
    other = random_mixture(2, 2)
    angle = torch.arange(4000, dtype=torch.float64) * (2 * math.pi / 4000)
    y = torch.stack([angle.cos(), angle.sin()], dim=1)

    def densities(m: VMFMixture) -> torch.Tensor:
        return (m.kappa * (y @ m.directions.T) + log_vmf_normalizer(m.kappa, 2)).T

    for second in (None, other):
        f, g = densities(mixture), densities(second or mixture)
        kl = (f[:, None].exp() * (f[:, None] - g)).sum(-1) * (2 * math.pi / 4000)
        overlap = ((f[:, None] + g) / 2).exp().sum(-1) * (2 * math.pi / 4000)
        torch.testing.assert_close(mixture.kl(second), kl, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixture.bhattacharyya(second), overlap, rtol=1e-9, atol=1e-9)


def test_entropy_bounds_hold_and_meet_for_components_far_apart():
    close, far = random_mixture(4, 3), VMFMixture(torch.tensor([1.0, 3]), torch.eye(3)[:2], torch.tensor([1e4, 1e3]))
    for mixture in (close, far.to(torch.float64)):
        lower, upper = mixture.entropy_bounds()
        sampled = -mixture.log_prob(mixture.sample(50_000, torch.Generator().manual_seed(0))[0])
        error = 5 * sampled.std().item() / math.sqrt(50_000)
        assert lower - error < sampled.mean() < upper + error
        assert upper - lower < (1.5 if mixture is close else 1e-6)


@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_a_head_and_its_mixture_agree(normalizer):
    torch.manual_seed(0)
    head = VMFPrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=5, temperature=0.2, normalizer=normalizer).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.1, 3)
        head.last_layer.weight_g[0] *= -1
    x = torch.randn(7, 6, dtype=torch.float64)
    mixture = VMFMixture.from_head(nn.Sequential(head))
    want = (head(x) / 0.2).softmax(1)
    torch.testing.assert_close(mixture.responsibilities(head.features(x)), want)
    copy = VMFPrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=5, temperature=0.2, normalizer=normalizer).double()
    lengths = copy.last_layer.weight_v.norm(dim=1)
    mixture.to_head(copy)
    torch.testing.assert_close(copy.last_layer.gathered(), head.last_layer.gathered())
    torch.testing.assert_close(copy.last_layer.weight_v.norm(dim=1), lengths)
    cooler = VMFMixture.from_head(head, 0.1)
    torch.testing.assert_close(cooler.kappa, 2 * mixture.kappa)


def test_a_centre_stands_for_the_weights():
    mixture = random_mixture(9, 5)
    head = VMFPrototypeHead(6, 9, hidden_dim=8, bottleneck_dim=5).double()
    mixture.to_head(head, temperature=0.05)
    features = head.features(torch.randn(7, 6, dtype=torch.float64))
    targets = teacher_targets(
        features @ head.last_layer.gathered().T,
        0.05,
        log_normalizer=head.log_normalizer(0.05),
        log_center=-mixture.weights.log(),
    )
    torch.testing.assert_close(targets, mixture.responsibilities(features))


def test_a_linear_head_takes_a_mixture():
    head, mixture = DINOHead(6, 4, hidden_dim=8, bottleneck_dim=5), random_mixture(4, 5, torch.float32)
    mixture.to_head(head, temperature=0.1)
    torch.testing.assert_close(VMFMixture.from_head(head, 0.1).kappa, mixture.kappa)


def test_saved_as_tensors(tmp_path):
    mixture = random_mixture(3, 4)
    torch.save(vars(mixture), tmp_path / "mixture.pt")
    loaded = VMFMixture(**torch.load(tmp_path / "mixture.pt", weights_only=True))
    y = points(5, 4)
    torch.testing.assert_close(loaded.log_prob(y), mixture.log_prob(y))


ONE = torch.ones(1)
UP = torch.tensor([[1.0, 0.0]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VMFMixture([1.0], UP, ONE), TypeError, r"`weights` \(of list\) must be a floating tensor"),
        (lambda: VMFMixture(ONE, UP[0], ONE), ValueError, r"`directions` \(of shape \(2,\)\) must have shape \(K >= 1"),
        (lambda: VMFMixture(ONE, 0 * UP, ONE), ValueError, "`directions` must have rows of finite length > 0"),
        (lambda: VMFMixture(ONE, UP, torch.ones(2)), ValueError, r"`kappa` \(of shape \(2,\)\) must have shape \(1,\)"),
        (lambda: VMFMixture(ONE, UP, ONE * math.inf), ValueError, "`kappa` must be finite and >= 0"),
        (lambda: VMFMixture(-ONE, UP, ONE), ValueError, "`weights` must be finite and >= 0"),
        (lambda: VMFMixture(0 * ONE, UP, ONE), ValueError, "`weights` must not all be 0"),
        (lambda: VMFMixture(ONE, UP, ONE).log_prob(torch.ones(2, 3)), ValueError, r"must end in p \(=2\)"),
        (lambda: VMFMixture(ONE, UP, ONE).kl(random_mixture(1, 3)), ValueError, r"`other` \(of dimension 3\)"),
        (
            lambda: VMFMixture(ONE, UP, ONE).to_head(VMFPrototypeHead(4, 3, hidden_dim=4, bottleneck_dim=2)),
            ValueError,
            r"`head` \(of 3 prototypes in dimension 2\) must have the mixture's 1 components in dimension 2",
        ),
        (lambda: VMFMixture.from_head(nn.Linear(2, 2)), ValueError, r"`head` \(a Linear\) must contain exactly one"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sharded_prototypes_are_refused(monkeypatch):
    head = VMFPrototypeHead(4, 1, hidden_dim=4, bottleneck_dim=2)
    monkeypatch.setattr(module, "is_sharded", lambda _: True)
    with pytest.raises(RuntimeError, match="FSDP shards them: call before it wraps"):
        VMFMixture(ONE, UP, ONE).to_head(head)


def test_scipys_samples_and_ours_have_one_distribution():
    direction, kappa, n = points(1, 8), 12.0, 20_000
    ours = (
        VMFMixture(ONE, direction, torch.tensor([kappa])).sample(n, torch.Generator().manual_seed(0))[0] @ direction[0]
    )
    distribution = scipy.stats.vonmises_fisher(direction[0].numpy(), kappa)
    theirs = distribution.rvs(n, random_state=np.random.default_rng(0)) @ direction[0].numpy()
    assert scipy.stats.ks_2samp(ours.numpy(), theirs).pvalue > 1e-3
