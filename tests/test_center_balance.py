"""What each centre of the teacher balances at its fixed point (docs/evidence.md)."""

import pytest
import torch
from benchmarks.mixture.arms import Centre
from torch import Tensor, nn
from torch.nn.functional import normalize

from vmf_heads.compat.dino import DINOHead, DINOLoss

B, K, P, TAU = 300, 40, 16, 0.1


@pytest.fixture
def heads() -> tuple[DINOHead, DINOHead]:
    """Student and teacher of prototypes whose norms differ by a factor of six."""
    torch.manual_seed(0)
    pair = tuple(DINOHead(P, K, nlayers=1, bottleneck_dim=P).double() for _ in range(2))
    for head in pair:
        head.mlp = nn.Identity()
        head.last_layer.weight_g.data.uniform_(0.5, 3.0)
    return pair


@pytest.fixture
def features() -> Tensor:
    return normalize(torch.randn(B, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)


def settled(heads: tuple[DINOHead, DINOHead], features: Tensor, center_on: str) -> Tensor:
    """The targets (B, K) of Eq. 7 when the centre has come to rest on these features."""
    loss = DINOLoss(K, 2, TAU, TAU, 0, 1, TAU, center_momentum=0.0, center_on=center_on).double()
    loss.attach(*heads)
    output = heads[1](features)
    loss.update_center(output, 0)
    return loss.targets(output, 0)


def parts(heads: tuple[DINOHead, DINOHead], features: Tensor) -> tuple[Tensor, Tensor]:
    """<w, y>/tau (B, K) and log C_p (K,), both up to a constant."""
    layer = heads[1].last_layer
    return features @ layer.weight.detach().T / TAU, heads[1].log_normalizer(TAU).detach()


def test_scores_make_the_mean_target_proportional_to_the_constant(heads, features) -> None:
    """mean_b (Z_b / S_b) P_bk = C_p(kappa_k), with Z and S the sums that Eq. 7 and Eq. 9 normalise by."""
    scores, log_c = parts(heads, features)
    log_center = scores.softmax(1).mean(0).log()
    log_weight = (scores + log_c - log_center).logsumexp(1) - scores.logsumexp(1)
    found = (settled(heads, features, "scores") * log_weight.exp()[:, None]).mean(0)
    torch.testing.assert_close(found, log_c.exp(), rtol=1e-5, atol=0)


def test_responsibilities_make_all_mean_targets_equal(heads, features) -> None:
    """mean_b (Z_b / R_b) P_bk = 1, and the weights Z_b / R_b average to K: a weighted mean target of 1 / K each."""
    scores, log_c = parts(heads, features)
    log_center = (scores + log_c).softmax(1).mean(0).log()
    weight = ((scores + log_c - log_center).logsumexp(1) - (scores + log_c).logsumexp(1)).exp()
    found = (settled(heads, features, "responsibilities") * weight[:, None]).mean(0)
    torch.testing.assert_close(found, torch.ones(K, dtype=torch.float64), rtol=1e-5, atol=0)
    assert weight.mean().item() == pytest.approx(K)


def test_the_readings_differ_in_what_a_concentrated_prototype_gets(heads, features) -> None:
    """By rank, the mean target falls with kappa under the printed reading; the other keeps all within a factor."""
    order = heads[1].last_layer.norms.argsort()
    by_reading = {name: settled(heads, features, name).mean(0)[order] for name in ("scores", "responsibilities")}
    printed, responsibilities = by_reading.values()
    assert printed[: K // 2].sum() > 0.95
    assert 0.3 < responsibilities[: K // 2].sum() < 0.7
    assert printed.min() * K < 1e-2
    assert 0.3 < responsibilities.min() * K < responsibilities.max() * K < 3


def test_balanced_targets_do_not_see_the_constant(heads, features) -> None:
    """The centre that makes the mean target exactly uniform cancels log C_p exactly: no centre can do both."""
    scores, log_c = (x[None] for x in parts(heads, features))
    results = []
    for constant in (log_c, torch.zeros_like(log_c)):
        centre = Centre("targets", (1, K), momentum=0.5)
        centre.value = centre.value.double()
        for _ in range(300):
            targets = (scores + (constant - centre.value)[:, None]).softmax(-1)
            centre.update_(scores, constant, targets)
        torch.testing.assert_close(targets.mean(1), torch.full((1, K), 1 / K, dtype=torch.float64))
        results.append(targets)
    torch.testing.assert_close(*results)
