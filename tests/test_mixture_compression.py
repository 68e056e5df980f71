"""compress_mixture: targets change by no more than it says, by the whole (N, K) table, and duplicates become one."""

import pytest
import torch
from torch.nn import functional as F

from vmf_heads import VMFPrototypeHead
from vmf_heads.centering import teacher_targets
from vmf_heads.mixture import VMFMixture, compress_mixture
from vmf_heads.mixture import compression as module


def redundant(copies: int = 4, noise: float = 0.02) -> VMFMixture:
    """Ten components of different kappa and weight, each in several copies that nearly agree; and five in a void."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(10, 6, generator=generator), dim=1).repeat(copies, 1)
    directions = directions + noise * torch.randn(10 * copies, 6, generator=generator)
    void = -F.normalize(directions.sum(0, keepdim=True), dim=1).expand(5, 6)
    weights = torch.cat([torch.linspace(1, 3, 10 * copies), torch.full((5,), 1e-6)])
    kappa = torch.cat([torch.linspace(20, 60, 10).repeat(copies), torch.full((5,), 30.0)])
    return VMFMixture(weights, torch.cat([directions, void]), kappa)


def literal(old: VMFMixture, new: VMFMixture, component: torch.Tensor, features: torch.Tensor) -> float:
    """Half the sum of absolute differences of two distributions over groups and what was left out, row by row."""
    r, s = old.responsibilities(features), new.responsibilities(features)
    total = 0.0
    for row in range(len(features)):
        for g in range(new.num_components):
            total += abs(sum(r[row, k] for k in range(len(component)) if component[k] == g) - s[row, g])
        total += sum(r[row, k] for k in range(len(component)) if component[k] < 0)
    return float(total) / 2 / len(features)


@pytest.mark.parametrize("bound", [0.003, 0.03])
def test_targets_change_by_less_than_the_bound(bound, monkeypatch):
    monkeypatch.setattr(module, "rows_per_chunk", lambda *_, **__: 5)
    mixture = redundant()
    features, _ = mixture.sample(12, torch.Generator().manual_seed(1))
    found = compress_mixture(mixture, features, bound)
    assert found.total_variation < bound
    assert found.total_variation == pytest.approx(
        literal(mixture, found.mixture, found.component, features), rel=1e-3, abs=1e-6
    )
    assert (found.component[-5:] == -1).all()  # the void
    assert found.mixture.num_components == int(found.component.max()) + 1 < mixture.num_components


def test_copies_become_one_component_with_their_weight():
    mixture = redundant()
    features, _ = mixture.sample(2000, torch.Generator().manual_seed(1))
    found = compress_mixture(mixture, features, 0.02)
    assert found.mixture.num_components == 10
    assert all(len(set(found.component[i:40:10].tolist())) == 1 for i in range(10))
    weights = torch.stack([mixture.weights[i:40:10].sum() for i in range(10)])
    torch.testing.assert_close(found.mixture.weights[found.component[:10]], weights, rtol=1e-4, atol=1e-5)


def test_distinct_components_stay_as_they_are():
    mixture = VMFMixture(torch.rand(6) + 1, torch.eye(6), torch.tensor([200.0, 300.0, 400.0, 200.0, 1000.0, 500.0]))
    features, _ = mixture.sample(300, torch.Generator().manual_seed(1))
    found = compress_mixture(mixture, features)
    for name in ("weights", "directions", "kappa"):
        torch.testing.assert_close(getattr(found.mixture, name)[found.component], getattr(mixture, name))
    assert found.total_variation < 1e-6


def test_a_smaller_head_gives_the_targets_of_the_larger_one():
    """Eq. 7 with the centre of the teacher, and with the one that the weights of the groups make."""
    torch.manual_seed(0)
    large = VMFPrototypeHead(8, 40, hidden_dim=16, bottleneck_dim=6)
    small_of = redundant()
    VMFMixture(torch.ones(40), small_of.directions[:40], small_of.kappa[:40]).to_head(large)
    log_center = 0.3 * torch.randn(40)
    mixture = VMFMixture.from_head(large)
    mixture = VMFMixture((-log_center).softmax(0), mixture.directions, mixture.kappa)
    features, _ = mixture.sample(500, torch.Generator().manual_seed(1))
    found = compress_mixture(mixture, features, 0.02)

    small = VMFPrototypeHead(8, found.mixture.num_components, hidden_dim=16, bottleneck_dim=6)
    found.mixture.to_head(small)

    def targets(head: VMFPrototypeHead, center: torch.Tensor) -> torch.Tensor:
        return teacher_targets(
            head.last_layer(features), 0.1, log_normalizer=head.log_normalizer(0.1), log_center=center
        )

    grouped = torch.zeros(500, found.mixture.num_components)
    grouped.index_add_(1, found.component.clamp(min=0), targets(large, log_center) * (found.component >= 0))
    assert found.mixture.num_components <= 10
    distance = (grouped - targets(small, -found.mixture.weights.log())).abs().sum(1).mean().item() / 2
    assert distance < 0.02


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.eye(6)[0], {}, r"`features` \(of shape \(6,\)\) must have shape \(N >= 1, 6\)"),
        (torch.eye(5), {}, r"`features` \(of shape \(5, 5\)\) must have shape \(N >= 1, 6\)"),
        (torch.eye(6), {"total_variation": 1.5}, r"`total_variation` \(=1.5\) must lie between 0 and 1"),
        (torch.eye(6), {"total_variation": -1.0}, r"`total_variation` \(=-1.0\) must be a finite number > 0"),
    ],
)
def test_arguments_are_checked(features, options, message):
    with pytest.raises(ValueError, match=message):
        compress_mixture(redundant(), features, **options)
