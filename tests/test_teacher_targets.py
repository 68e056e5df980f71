"""`teacher_targets` and what every centre does with a head's output: Eq. 7 and 8 literally, scores or features."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import vmf_reference
from devices import DEVICES
from gloo import run_on_ranks
from vmf_heads import HeadOutput, ProbabilityCentering
from vmf_heads._memory import CHUNK_BYTES
from vmf_heads.centering import Centering, LogitCentering, make_centering, teacher_targets
from vmf_heads.prototypes import prototype_log_normalizer

K, P, TAU = 12, 5, 0.05
LOG_C = torch.linspace(-2, 1, K)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.04, 0.1])
def test_equation_7(temperature, device):
    """With SciPy's log C_p of uneven norms, float64."""
    norms = torch.linspace(0.3, 4, K).double()
    w = F.normalize(torch.randn(K, P).double(), dim=1) * norms[:, None]
    scores, center = F.normalize(torch.randn(6, P).double(), dim=1) @ w.T, torch.randn(K).double()
    want = vmf_reference.teacher(scores, norms, P, temperature, center)
    log_c = prototype_log_normalizer(norms, P, temperature)
    on_device = (x.to(device) for x in (scores, log_c, center))
    scores, log_c, center = on_device
    got = teacher_targets(scores, temperature, log_normalizer=log_c, log_center=center)
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("log_center", [None, torch.randn(K)], ids=["no centre", "centre"])
@pytest.mark.parametrize("log_normalizer", [None, LOG_C], ids=["plain DINO", "vMF"])
def test_absent_terms_are_zeros(log_normalizer, log_center):
    scores = torch.randn(2, 3, K)
    logits = scores / TAU
    logits = logits if log_normalizer is None else logits + log_normalizer
    logits = logits if log_center is None else logits - log_center
    got = teacher_targets(scores, TAU, log_normalizer=log_normalizer, log_center=log_center)
    torch.testing.assert_close(got, logits.softmax(dim=-1))
    assert got.shape == (2, 3, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_cast_up_before_the_division(dtype):
    """float16 ends at 65504, which a score over 0.0001 passes; bfloat16 has steps of 0.5 at 100."""
    scores = (torch.rand(4, K) * 10).to(dtype)
    temperature = 0.0001 if dtype is torch.float16 else 0.05
    got = teacher_targets(scores, temperature, log_normalizer=LOG_C, log_center=LOG_C.flip(0))
    assert got.dtype == torch.float32
    want = (scores.double() / temperature + LOG_C - LOG_C.flip(0)).softmax(dim=1)
    torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-6)


def test_targets_carry_no_gradient():
    scores, log_c = torch.randn(2, K, requires_grad=True), LOG_C.clone().requires_grad_()
    assert not teacher_targets(scores, TAU, log_normalizer=log_c).requires_grad


@pytest.mark.parametrize(
    ("temperature", "error"), [(0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.1", TypeError)]
)
def test_the_temperature_is_a_number_above_zero(temperature, error):
    with pytest.raises(error, match=r"`temperature` \(=.*\) must be a finite number > 0"):
        teacher_targets(torch.zeros(2, K), temperature)


CENTRES = {
    "Eq. 8": partial(LogitCentering, (1, K), 0.9),
    "Eq. 9, scores": partial(ProbabilityCentering, K, center_on="scores"),
    "Eq. 9, responsibilities": partial(ProbabilityCentering, K, center_on="responsibilities"),
}


@pytest.mark.parametrize("scales", [None, torch.linspace(-1, 3, K)], ids=["prototypes", "directions and scales"])
@pytest.mark.parametrize("shape", [(9,), (2, 4)], ids=str)
@pytest.mark.parametrize("make", CENTRES.values(), ids=CENTRES)
def test_features_and_prototypes_do_as_well_as_their_scores(make, shape, scales, monkeypatch):
    output = HeadOutput(F.normalize(torch.randn(*shape, P), dim=-1), torch.randn(K, P), scales)
    from_scores, from_output = make(), make()
    from_scores.accumulate_(output.features @ output.prototypes.T, TAU, log_normalizer=LOG_C)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * K * 2 * 4)  # two rows at a time
    from_output.accumulate_(output, TAU, log_normalizer=LOG_C)
    for centering in (from_scores, from_output):
        centering.commit_()
    assert from_scores.offset(TAU).abs().max() > 0.01
    torch.testing.assert_close(from_output.offset(TAU), from_scores.offset(TAU), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", CENTRES.values(), ids=CENTRES)
def test_micro_batches_count_at_the_commit(make):
    scores = torch.randn(10, K)
    whole, parts = make(), make()
    whole.accumulate_(scores, TAU, log_normalizer=LOG_C)
    whole.commit_()
    for chunk in scores.split((1, 0, 9)):
        parts.accumulate_(chunk, TAU, log_normalizer=LOG_C)
        assert parts.offset(TAU).eq(0).all()
    parts.commit_()
    torch.testing.assert_close(parts.offset(TAU), whole.offset(TAU))
    parts.commit_()  # nothing accumulated since: nothing changes
    torch.testing.assert_close(parts.offset(TAU), whole.offset(TAU))


@pytest.mark.parametrize("shape", [(1, K), (1, 1, K)], ids=str)
def test_equation_8(shape):
    """DINO's own line, on logits with log C_p in units of scores, at temperatures that change."""
    centering, want = LogitCentering(shape, 0.9), torch.zeros(K)
    for temperature in (0.04, 0.07):
        scores = torch.randn(7, K)
        centering.accumulate_(scores, temperature, log_normalizer=LOG_C)
        centering.commit_()
        want = want * 0.9 + (scores + temperature * LOG_C).mean(dim=0) * 0.1
    assert centering.center.shape == shape
    assert list(centering.state_dict()) == ["center"]
    torch.testing.assert_close(centering.center.flatten(), want)
    torch.testing.assert_close(centering.offset(0.07), want / 0.07)


def centre_of_rank(rank: int) -> list[torch.Tensor]:
    scores = torch.rand(10, K, generator=torch.Generator().manual_seed(3))
    centres = []
    for sizes in ((5, 5), (9, 1), (0, 10)):
        centering = LogitCentering((1, K), 0.9)
        centering.accumulate_(scores.split(sizes)[rank], TAU, log_normalizer=LOG_C)
        centering.commit_()
        centres.append(centering.center)
    return centres


def test_equation_8_over_ranks_with_unequal_batches():
    alone = LogitCentering((1, K), 0.9)
    scores = torch.rand(10, K, generator=torch.Generator().manual_seed(3))
    alone.accumulate_(scores, TAU, log_normalizer=LOG_C)
    alone.commit_()
    for centres in run_on_ranks(centre_of_rank):
        for center in centres:
            torch.testing.assert_close(center, alone.center)


def made(**options: object) -> Centering:
    arguments = {"centering": "probability", "center_on": "scores", "process_group": None}
    return make_centering((1, 1, K), 0.8, **arguments | options)


def test_the_centre_that_is_named_is_made():
    probability = made(center_on="responsibilities")
    assert isinstance(probability, ProbabilityCentering)
    assert (probability.momentum, probability.center_on) == (0.8, "responsibilities")
    assert probability.log_center.shape == (K,)
    logit = made(centering="logit")
    assert isinstance(logit, LogitCentering)
    assert logit.center.shape == (1, 1, K)
    with pytest.raises(ValueError, match=r"`centering` \(='mean'\) must be one of 'probability', 'logit'"):
        made(centering="mean")
    with pytest.raises(ValueError, match=r"`center_momentum` \(=1.5\) must be in \[0, 1\]"):
        make_centering((K,), 1.5, centering="logit", center_on="scores", process_group=None)
