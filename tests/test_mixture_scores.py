"""density_scores: what each column says, by the whole (N, K) table."""

import pytest
import torch
from torch.nn import functional as F

from vmf_heads.mixture import VMFMixture, density_scores
from vmf_heads.mixture import scores as module


def test_scores_are_those_of_the_whole_table(monkeypatch):
    monkeypatch.setattr(module, "rows_per_chunk", lambda *_, **__: 4)
    generator = torch.Generator().manual_seed(0)
    mixture = VMFMixture(torch.rand(6), torch.randn(6, 5, generator=generator), torch.linspace(1, 40, 6))
    y = F.normalize(torch.randn(2, 7, 5, generator=generator), dim=-1)
    scores = density_scores(mixture, y)
    responsibilities = mixture.responsibilities(y)
    torch.testing.assert_close(scores.log_prob, mixture.log_prob(y))
    assert torch.equal(scores.component, responsibilities.argmax(-1))
    torch.testing.assert_close(scores.responsibility, responsibilities.amax(-1))
    assert torch.equal(scores.kappa, mixture.kappa[scores.component])


def test_the_density_tells_what_was_not_seen_and_the_winner_does_not():
    """Rows away from every component have a low density, though one component takes them for certain."""
    mixture = VMFMixture(torch.ones(2), torch.eye(8)[:2], torch.tensor([60.0, 30.0]))
    seen, _ = mixture.sample(500, torch.Generator().manual_seed(0))
    unseen, _ = VMFMixture(torch.ones(1), -torch.eye(8)[:1], torch.tensor([60.0])).sample(
        500, torch.Generator().manual_seed(1)
    )
    usual, unusual = density_scores(mixture, seen), density_scores(mixture, unseen)
    assert usual.log_prob.min() > unusual.log_prob.max()
    assert unusual.responsibility.median() > 0.9


def test_the_wrong_dimension_is_refused():
    mixture = VMFMixture(torch.ones(1), torch.eye(3)[:1], torch.ones(1))
    with pytest.raises(ValueError, match=r"`y` \(of shape \(2, 4\)\) must end in p \(=3\)"):
        density_scores(mixture, torch.eye(4)[:2])
