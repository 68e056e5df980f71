"""fit_vmf_mixture: what it recovers, that it never falls, what it refuses, and that ranks fit what one process fits."""

import math
import sys

import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from gloo import run_on_ranks
from vmf_heads import VMFPrototypeHead, _memory, vmf_mean_resultant
from vmf_heads.mixture import OnlineEM, VMFMixture, _steps, fit_vmf_mixture, vmf_concentration, warm_start_
from vmf_heads.mixture import fit as fit_module
from vmf_heads.mixture._split_merge import split_and_merge


def known(components: int, p: int, kappa: tuple[float, float], dtype: torch.dtype = torch.float64) -> VMFMixture:
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(components, p, generator=generator, dtype=dtype)
    weights = torch.linspace(1, 3, components, dtype=dtype)
    return VMFMixture(weights, directions, torch.linspace(*kappa, components, dtype=dtype))


def draw(truth: VMFMixture, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return truth.sample(n, torch.Generator().manual_seed(seed))


def matched(fitted: VMFMixture, truth: VMFMixture) -> torch.Tensor:
    """For each true component the fitted one of the nearest direction; each is taken once."""
    index = (truth.directions @ fitted.directions.to(truth.directions).T).argmax(1)
    assert len(index.unique()) == truth.num_components
    return index


@pytest.mark.parametrize("p", [2, 3, 40])
def test_one_component_is_scipys_fit(p):
    features, _ = draw(known(1, p, (25.0, 25.0)), 500)
    fit = fit_vmf_mixture(features, 1)
    direction, kappa = scipy.stats.vonmises_fisher.fit(features.numpy())
    torch.testing.assert_close(fit.mixture.directions[0], torch.from_numpy(direction))
    assert fit.mixture.kappa.item() == pytest.approx(kappa, rel=1e-9)
    assert fit.log_likelihood == pytest.approx(fit.mixture.log_prob(features).mean().item(), rel=1e-12)
    assert fit.converged


def test_the_truth_is_recovered_within_the_cramer_rao_bound():
    """Errors in units of their standard error, of components that hardly overlap: n rows of a component give kappa
    with variance 1 / (n A'), the direction with variance 1 / (n kappa A) along each tangent, the weight binomially."""
    truth, n, p = known(8, 24, (60.0, 400.0)), 40_000, 24
    features, _ = draw(truth, n)
    fits = [fit_vmf_mixture(features, 8, tolerance=1e-6, seed=seed) for seed in range(4)]
    fit = max(fits, key=lambda found: found.log_likelihood)  # EM finds local maxima
    index = matched(fit.mixture, truth)
    rows = n * truth.weights
    kappa = truth.kappa.clone().requires_grad_()
    resultant = vmf_mean_resultant(kappa, p)
    (slope,) = torch.autograd.grad(resultant.sum(), kappa)
    assert ((fit.mixture.kappa[index] - truth.kappa).abs() * (rows * slope).sqrt()).max() < 4
    chi_square = (fit.mixture.directions[index] - truth.directions).square().sum(1) * rows * truth.kappa
    chi_square = chi_square * resultant.detach()  # p - 1 degrees of freedom
    assert ((chi_square - (p - 1)).abs() / math.sqrt(2 * (p - 1))).max() < 5
    error = fit.mixture.weights[index] - truth.weights
    assert (error.abs() / (truth.weights * (1 - truth.weights) / n).sqrt()).max() < 4
    assert fit.log_likelihood > truth.log_prob(features).mean()


@pytest.mark.parametrize("max_kappa", [None, 150.0])
@pytest.mark.parametrize("p", [2, 3, 64])
def test_no_pass_of_full_batches_lowers_the_likelihood(p, max_kappa):
    features, _ = draw(known(6, p, (5.0, 300.0)), 3000)
    fit = fit_vmf_mixture(features, 9, tolerance=0.0, max_iterations=60, max_kappa=max_kappa, split_merge_rounds=0)
    assert fit.moved == 0
    gains = torch.tensor(fit.log_likelihoods).diff()
    assert (gains > -1e-11).all()
    assert gains[0] > 0
    if max_kappa is not None:
        assert fit.mixture.kappa.max() <= max_kappa


def test_split_and_merge_leave_a_local_maximum():
    """Two components on one cluster and one on two others: EM stays there, and a move does not."""
    truth = known(4, 12, (80.0, 120.0))
    features, _ = draw(truth, 2000)
    first, second, third, fourth = truth.directions
    directions = torch.stack([first + 0.1 * second, first - 0.1 * second, second, third + fourth])
    start = VMFMixture(torch.ones(4), directions, torch.tensor([80.0, 80, 80, 8]))
    stuck = fit_vmf_mixture(features, 4, init=start, split_merge_rounds=0)
    free = fit_vmf_mixture(features, 4, init=start)
    matched(free.mixture, truth)
    assert (stuck.moved, free.moved) == (0, 1)
    assert free.log_likelihood > truth.log_prob(features).mean() > stuck.log_likelihood + 0.5


def test_a_round_that_does_not_gain_is_taken_back(monkeypatch):
    truth = known(4, 12, (80.0, 120.0))
    features, _ = draw(truth, 2000)
    alone = fit_vmf_mixture(features, 4, init=truth, split_merge_rounds=0)
    worse = VMFMixture(torch.ones(4), truth.directions[[0, 0, 1, 1]], truth.kappa)
    monkeypatch.setattr(fit_module, "split_and_merge", lambda *_: (worse, 1))
    fit = fit_vmf_mixture(features, 4, init=truth)
    assert fit.moved == 0
    assert fit.log_likelihoods[: len(alone.log_likelihoods)] == pytest.approx(alone.log_likelihoods, rel=1e-12)
    assert fit.log_likelihood == pytest.approx(fit.mixture.log_prob(features).mean().item(), rel=1e-12)


def test_a_fit_that_runs_out_of_passes_has_not_converged():
    features, _ = draw(known(4, 12, (80.0, 120.0)), 2000)
    fits = [fit_vmf_mixture(features, 4, max_iterations=count) for count in (1, 2, 3, 4, 5, 6, 7, 100)]
    assert [fit.converged for fit in fits][-1]
    for fit in fits:
        assert fit.log_likelihood == pytest.approx(fit.mixture.log_prob(features).mean().item(), rel=1e-12)
        if fit.converged:
            assert fit.log_likelihoods[-1] - fit.log_likelihoods[-2] < 1e-4
    assert not any(fit.converged for fit in fits[:3])


def test_nothing_is_moved_where_nothing_is_to_be_gained():
    truth = known(6, 12, (200.0, 300.0))
    features, _ = draw(truth, 3000)
    good = fit_vmf_mixture(features, 6, init=truth, split_merge_rounds=0)
    generator = torch.Generator().manual_seed(0)
    moved, moves = split_and_merge(good.mixture, features, len(features), good.max_kappa, 1e-3, generator)
    assert moved is good.mixture
    assert moves == 0


def test_a_pass_is_the_m_step_of_the_textbook():
    truth = known(3, 5, (4.0, 30.0))
    features, _ = draw(truth, 400)
    start = VMFMixture(torch.ones(3), truth.directions + 0.3, torch.full((3,), 8.0))
    fit = fit_vmf_mixture(features, 3, init=start, max_iterations=2, tolerance=0)
    r = start.to(torch.float64).responsibilities(features)
    total = r.T @ features
    torch.testing.assert_close(fit.mixture.weights, r.mean(0))
    torch.testing.assert_close(fit.mixture.directions, F.normalize(total, dim=1))
    torch.testing.assert_close(fit.mixture.kappa, vmf_concentration(total.norm(dim=1) / r.sum(0), 5))
    want = [m.log_prob(features).mean().item() for m in (start.to(torch.float64), fit.mixture)]
    assert fit.log_likelihoods == pytest.approx(want, rel=1e-12)


def test_chunks_do_not_change_the_fit(monkeypatch):
    features, _ = draw(known(3, 5, (4.0, 30.0)), 500)
    whole = fit_vmf_mixture(features, 3)
    monkeypatch.setattr(_steps, "rows_per_chunk", lambda *_, **__: 17)
    chunked = fit_vmf_mixture(features, 3)
    torch.testing.assert_close(chunked.mixture.kappa, whole.mixture.kappa)
    torch.testing.assert_close(chunked.mixture.directions, whole.mixture.directions)


def test_no_tensor_of_rows_by_components_exists(monkeypatch):
    """The largest tensor that any operation of an E-step makes holds no more than one chunk."""
    monkeypatch.setitem(_memory.CHUNK_BYTES, "cpu", 2**22)
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    mixture = known(256, 4, (4.0, 30.0), torch.float32)
    features, _ = draw(mixture, 20_000)
    with Watch():
        _steps.expectation(mixture, features)
    assert largest <= 2**22 / 4 < 20_000 * 256 / 4


def with_empty_components(truth: VMFMixture) -> VMFMixture:
    """Two broad components near the first two true ones, and two where no data are."""
    away = -truth.directions.mean(dim=0, keepdim=True).expand(2, -1)
    kappa = torch.tensor([5.0, 5, 2000, 2000], dtype=torch.float64)
    return VMFMixture(torch.ones(4), torch.cat([truth.directions[:2], away]), kappa)


def test_empty_components_are_moved_to_the_data():
    truth = known(4, 12, (80.0, 120.0))
    features, _ = draw(truth, 2000)
    fit = fit_vmf_mixture(features, 4, init=with_empty_components(truth))
    assert fit.moved == 2
    assert fit.mixture.weights.min() > 0.05
    assert fit.log_likelihood > fit_vmf_mixture(features, 2).log_likelihood + 1


def test_places_for_empty_components_lie_far_from_the_components_and_from_each_other():
    e = torch.eye(3)
    features = torch.cat([e[:1].repeat(100, 1), e[1:2].repeat(20, 1), e[2:].repeat(20, 1)])
    mixture = VMFMixture(torch.ones(1), e[:1], torch.tensor([10.0]))
    places = _steps.distant_rows(mixture, features, torch.Generator().manual_seed(0))
    assert len(places) == _steps.PLACES < 40
    assert not (places @ e[0]).any()
    assert places[0] @ places[1] == 0


def test_kappa_is_bounded_by_the_dispersion_of_the_data():
    """Ten copies of each of three points: without a bound the likelihood is infinite."""
    features = torch.eye(6)[:3].repeat(10, 1)
    fit = fit_vmf_mixture(features, 3)
    least = (1 - features.mean(0).norm()) / 1000
    assert fit.max_kappa == pytest.approx(vmf_concentration(least.double(), 6, complement=True).item(), rel=1e-5)
    torch.testing.assert_close(fit.mixture.kappa, torch.full((3,), fit.max_kappa))
    assert math.isfinite(fit.log_likelihood)


def test_as_many_components_as_rows_and_more_than_distinct_rows():
    features = F.normalize(torch.randn(6, 3), dim=1)
    assert fit_vmf_mixture(features, 6, max_kappa=50.0).mixture.num_components == 6
    assert fit_vmf_mixture(features[:1].repeat(5, 1), 3).mixture.kappa.isfinite().all()


@pytest.mark.parametrize("batch_size", [None, 64])
def test_the_same_seed_gives_the_same_fit(batch_size):
    features, _ = draw(known(4, 6, (4.0, 40.0), torch.float32), 1000)
    fits = [fit_vmf_mixture(features, 5, batch_size=batch_size, seed=seed, max_iterations=2) for seed in (1, 1, 2)]
    assert torch.equal(fits[0].mixture.kappa, fits[1].mixture.kappa)
    assert torch.equal(fits[0].mixture.directions, fits[1].mixture.directions)
    assert not torch.equal(fits[0].mixture.kappa, fits[2].mixture.kappa)


def test_mini_batches_come_close_to_full_batches():
    truth = known(6, 16, (40.0, 200.0), torch.float32)
    features, _ = draw(truth, 12_000)
    noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    start = VMFMixture(torch.ones(6), truth.directions + 0.1 * noise, torch.full((6,), 50.0))
    full = fit_vmf_mixture(features, 6, init=start)
    online = fit_vmf_mixture(features, 6, init=start, batch_size=400, max_iterations=5)
    got = online.mixture.log_prob(features).mean().item()
    assert full.log_likelihood - 0.02 < got <= full.log_likelihood + 1e-4
    index = matched(online.mixture, truth.to(torch.float32))
    torch.testing.assert_close(online.mixture.kappa[index], truth.kappa, rtol=0.1, atol=0)


def test_online_em_follows_features_that_move():
    """With exponent 0 the statistics are a moving average: after a rotation the mixture turns with the data."""
    before = known(2, 8, (60.0, 60.0))
    after = VMFMixture(before.weights, before.directions + before.directions.roll(1, dims=1), before.kappa)
    assert (before.directions * after.directions).sum(1).max() < 0.95
    online = OnlineEM(before, max_kappa=1e4, memory_rows=400, exponent=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        online.update_(after.sample(100, generator)[0])
    assert (online.mixture.directions * after.directions).sum(1).min() > 0.99
    assert online.step == 100


def fits_of_rank(rank: int | None) -> list[dict[str, torch.Tensor]]:
    """Full batches from a given start, from k-means++ and with empty components; online; a head; all rows or a part."""
    truth = known(4, 12, (80.0, 120.0))
    everything, _ = draw(truth, 900)
    features = everything if rank is None else everything[:300] if rank == 0 else everything[300:]
    fits = [
        fit_vmf_mixture(features, 4, init=truth, max_iterations=4),
        fit_vmf_mixture(features, 4, tolerance=1e-7),
        fit_vmf_mixture(features, 4, init=with_empty_components(truth)),
        fit_vmf_mixture(features, 4, batch_size=100, max_iterations=2),
    ]
    online = OnlineEM(truth, max_kappa=1e4)
    for batch in everything.split(100)[:3]:
        online.update_(batch if rank is None else batch[:30] if rank == 0 else batch[30:])
    found = [{"log_likelihood": fit.log_likelihood, "moved": fit.moved} | vars(fit.mixture) for fit in fits]
    torch.manual_seed(0)
    head = VMFPrototypeHead(12, 4, hidden_dim=24, bottleneck_dim=12).double()
    warm_start_(head, features)
    return [*found, vars(online.mixture), dict(head.state_dict())]


@pytest.mark.slow
def test_two_ranks_fit_what_one_process_fits():
    one, (first, second) = fits_of_rank(None), run_on_ranks(fits_of_rank)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)
    for index in (0, 4):  # the same start: the same mixture
        for name in ("weights", "directions", "kappa"):
            torch.testing.assert_close(first[index][name], one[index][name])
    assert first[0]["log_likelihood"] == pytest.approx(one[0]["log_likelihood"], rel=1e-12)
    assert first[1]["log_likelihood"] == pytest.approx(one[1]["log_likelihood"], abs=1e-3)  # other starts, one optimum
    assert first[2]["moved"] == 2  # components that are empty on all ranks together
    assert first[3]["log_likelihood"] > first[1]["log_likelihood"] - 1
    for name in ("mlp.0.weight", "mlp.0.bias", "mlp.4.weight"):  # principal directions of the rows of all ranks
        torch.testing.assert_close(first[5][name], one[5][name])


FEATURES = torch.eye(4).repeat(5, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((FEATURES.int(), 2), TypeError, r"`features` \(of torch.int32\) must be a tensor of float16"),
        ((FEATURES[0], 2), ValueError, r"`features` \(of shape \(4,\)\) must have shape \(N, p >= 2\)"),
        ((2 * FEATURES, 2), ValueError, r"`features` must have rows of length 1, but some have length 2"),
        ((FEATURES * math.nan, 2), ValueError, r"`features` must have rows of length 1, but some have length nan"),
        ((FEATURES, 0), ValueError, r"`num_components` \(=0\) must be an integer >= 1"),
        ((FEATURES, 21), ValueError, r"`num_components` \(=21\) must be at most the number of rows .* \(=20\)"),
        ((FEATURES, 2, {"batch_size": 0}), ValueError, r"`batch_size` \(=0\) must be an integer >= 1"),
        ((FEATURES, 2, {"max_kappa": -1.0}), ValueError, r"`max_kappa` \(=-1.0\) must be a finite number > 0"),
        (
            (FEATURES, 3, {"init": known(2, 4, (1.0, 2.0))}),
            ValueError,
            r"`init` \(of 2 components in dimension 4\) must have `num_components` \(=3\)",
        ),
    ],
)
def test_errors(arguments, error, message):
    options = arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(error, match=message):
        fit_vmf_mixture(*arguments[:2], **options)


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 1.5])
def test_an_exponent_that_does_not_converge_is_refused(exponent):
    with pytest.raises(ValueError, match=r"`exponent` \(=.*\) must be 0, or lie in \(0.5, 1\]"):
        OnlineEM(known(2, 4, (1.0, 2.0)), max_kappa=10.0, exponent=exponent)


def test_progress_needs_tqdm(monkeypatch, capsys):
    fit_vmf_mixture(FEATURES, 2, progress=True)
    assert "vMF mixture" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"`progress` \(=True\) needs tqdm"):
        fit_vmf_mixture(FEATURES, 2, progress=True)
