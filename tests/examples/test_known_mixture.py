"""examples/known_mixture.py shows what it claims, in a small setting."""

import math
from pathlib import Path

import pytest
import torch

from examples import known_mixture
from vmf_heads import vmf_mean_resultant


def test_in_a_tenth_of_the_steps_dino_vmf_uses_its_prototypes(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(known_mixture, "POINTS", 200)
    monkeypatch.setattr(known_mixture, "STARTS", 2)
    results = known_mixture.main(steps=150, seeds=1, output=tmp_path / "picture.png")
    dino, l2, vmf, likelihood = (runs[0] for runs in results.values())
    assert vmf.used.float().mean() > 0.8 > dino.used.float().mean()
    assert math.isnan(l2.rank_correlation)
    assert likelihood.rank_correlation > 0.8
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_dino_vmf_orders_the_concentrations_and_dino_does_the_opposite(tmp_path: Path) -> None:
    results = known_mixture.main(seeds=1, output=tmp_path / "picture.png")
    dino, _, vmf, likelihood = (runs[0] for runs in results.values())
    assert vmf.used.float().mean() > 0.9 > 0.5 > dino.used.float().mean()
    assert vmf.rank_correlation > 0.4 > -0.3 > dino.rank_correlation
    assert vmf.purity > 0.95 > dino.purity
    torch.testing.assert_close(likelihood.kappa, likelihood.true_kappa, rtol=0.3, atol=0)


@pytest.mark.parametrize(("p", "kappa"), [(2, 3.0), (16, 0.5), (16, 40.0), (256, 1000.0)])
def test_concentration_inverts_the_mean_resultant(p: int, kappa: float) -> None:
    resultant = vmf_mean_resultant(torch.tensor([kappa], dtype=torch.float64), p)
    assert known_mixture.concentration(resultant, p).item() == pytest.approx(kappa, rel=1e-5)


@pytest.mark.parametrize("p", [2, 3, 64])
def test_samples_lie_on_the_sphere_around_their_means(p: int) -> None:
    kappa, means = torch.tensor([1.0, 50.0]), torch.eye(p)[:2]
    points = known_mixture.sample_vmf(means, kappa, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(points.norm(dim=2), torch.ones(2, 20_000))
    cosine = torch.einsum("cnp,cp->c", points, means) / 20_000
    torch.testing.assert_close(cosine, vmf_mean_resultant(kappa, p), atol=0.01, rtol=0)
    sideways = points.mean(1) - cosine[:, None] * means
    assert sideways.norm(dim=1).max() < 0.03, "every direction around the mean is equally likely"
