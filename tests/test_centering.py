"""ProbabilityCentering: Eq. 9 literally, in log space, over micro-batches and ranks; its state; its errors."""

import copy
import math

import pytest
import torch

import vmf_reference
from devices import DEVICES
from gloo import run_on_ranks
from vmf_heads import ProbabilityCentering
from vmf_heads._memory import CHUNK_BYTES

K = 12
LOG_C = torch.linspace(-3, 2, K)
CENTER_ON = pytest.mark.parametrize("center_on", ["scores", "responsibilities"])


def literal(momentum: float = 0.9) -> ProbabilityCentering:
    """Eq. 9 as it is printed, which needs no log C_p."""
    return ProbabilityCentering(K, momentum, center_on="scores")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("momentum", "temperature"), [(0.9, 0.07), (0.5, 0.04), (0.0, 0.1), (1.0, 0.1)])
def test_equation_9(momentum, temperature, device):
    centering = literal(momentum).to(device)
    want = torch.zeros(K, dtype=torch.float64)
    for _ in range(3):
        scores = torch.rand(7, K)
        want = vmf_reference.next_center(want, scores.double(), temperature, momentum)
        centering.update_(scores.to(device), temperature)
    torch.testing.assert_close(centering.log_center.cpu(), want.float(), rtol=1e-5, atol=1e-6)
    logits = torch.randn(2, 5, K, device=device)
    torch.testing.assert_close(centering(logits), logits - centering.log_center, rtol=0, atol=0)


def test_responsibilities_include_the_log_normalizer():
    """The reading of appendix A.4: the softmax of Eq. 9 with log C_p inside."""
    scores = torch.rand(7, K)
    printed, by_default = literal(), ProbabilityCentering(K)
    for centering in (printed, by_default):
        centering.update_(scores, 0.07, log_normalizer=LOG_C)
    assert by_default.center_on == "responsibilities"
    for centering, inside in ((printed, scores.double()), (by_default, scores.double() + 0.07 * LOG_C)):
        want = vmf_reference.next_center(torch.zeros(K).double(), inside, 0.07, 0.9)
        torch.testing.assert_close(centering.log_center, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 3.0, 100.0])
def test_a_void_prototype_keeps_a_finite_centre(norm):
    """At cosine -1, norm 3, temperature 0.04 its probability is 0 in float32, and log 0 would stay for ever."""
    scores = torch.full((6, K), norm)
    scores[:, 4] = -norm
    assert norm < 3 or (scores / 0.04).softmax(dim=1)[:, 4].eq(0).all()
    centering = literal()
    for _ in range(200):
        centering.update_(scores, temperature=0.04)
    assert centering.log_center.isfinite().all()
    assert centering.log_center[4] < centering.log_center[3]
    floor = math.log(torch.finfo(torch.float64).tiny)
    want = max(-2 * norm / 0.04 - math.log(K - 1), floor)
    assert centering.log_center[4].item() == pytest.approx(want, rel=1e-4)
    assert (scores / 0.04 - centering.log_center).softmax(dim=1).isfinite().all()


@CENTER_ON
@pytest.mark.parametrize("sizes", [(10,), (4, 6), (1, 0, 9)])
def test_micro_batches_equal_one_batch(sizes, center_on):
    scores, bias = torch.rand(10, K), torch.linspace(-1, 1, K)
    whole, parts = (ProbabilityCentering(K, center_on=center_on) for _ in range(2))
    whole.update_(scores, 0.05, log_normalizer=bias)
    for chunk in scores.split(sizes):
        parts.accumulate_(chunk, 0.05, log_normalizer=bias)
        assert parts.log_center.eq(0).all()  # until commit_
    parts.commit_()
    torch.testing.assert_close(parts.log_center, whole.log_center)
    before = parts.log_center.clone()
    parts.commit_()  # nothing accumulated since
    torch.testing.assert_close(parts.log_center, before, rtol=0, atol=0)


def test_the_statistics_of_a_loss_are_those_of_its_scores():
    """`prototype_cross_entropy` returns log sum_b softmax_k and the number of rows."""
    scores = torch.rand(10, K)
    from_scores, from_loss = literal(), literal()
    for chunk in scores.split((3, 7)):
        from_scores.accumulate_(chunk, 0.05)
        from_loss.accumulate_log_sum_((chunk / 0.05).softmax(dim=1).sum(dim=0).log(), len(chunk))
    for centering in (from_scores, from_loss):
        centering.commit_()
    torch.testing.assert_close(from_loss.log_center, from_scores.log_center)


def test_all_leading_dimensions_are_rows(monkeypatch):
    scores = torch.rand(3, 5, K)
    flat, deep, chunked, single, same_single = (literal() for _ in range(5))
    flat.update_(scores.flatten(0, 1), 0.05)
    deep.update_(scores, 0.05)
    torch.testing.assert_close(deep.log_center, flat.log_center, rtol=0, atol=0)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * K * 4 * 3)  # four rows at a time
    chunked.update_(scores, 0.05)
    torch.testing.assert_close(chunked.log_center, flat.log_center)
    single.update_(scores[0, 0], 0.05)
    same_single.update_(scores[0, :1], 0.05)
    torch.testing.assert_close(single.log_center, same_single.log_center, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_centre_is_float32_whatever_the_scores_are(dtype):
    scores = torch.rand(6, K).to(dtype)
    centering, want = literal(), literal()
    with torch.autocast("cpu", torch.bfloat16):
        centering.update_(scores, 0.05)
    want.update_(scores.float(), 0.05)
    assert centering.log_center.dtype == torch.float32
    torch.testing.assert_close(centering.log_center, want.log_center)


SPLITS = [(5, 5), (9, 1), (10, 0), (0, 10)]


def centres_of_rank(rank: int) -> dict[str, torch.Tensor]:
    scores = torch.rand(2, 10, K, generator=torch.Generator().manual_seed(3))
    bias = torch.linspace(-1, 1, K)
    centres = {}
    for sizes in SPLITS:
        for center_on in ("scores", "responsibilities"):
            centering = ProbabilityCentering(K, center_on=center_on)
            for batch in scores:
                centering.update_(batch.split(sizes)[rank], 0.05, log_normalizer=bias)
            centres[f"{sizes} {center_on}"] = centering.log_center
    return centres


def test_ranks_with_unequal_batches_have_the_centre_of_one_process():
    ranks = run_on_ranks(centres_of_rank)
    scores = torch.rand(2, 10, K, generator=torch.Generator().manual_seed(3))
    for center_on in ("scores", "responsibilities"):
        alone = ProbabilityCentering(K, center_on=center_on)
        for batch in scores:
            alone.update_(batch, 0.05, log_normalizer=torch.linspace(-1, 1, K))
        for sizes in SPLITS:
            for centres in ranks:
                torch.testing.assert_close(centres[f"{sizes} {center_on}"], alone.log_center)


def test_state_dict_round_trip():
    centering, other = literal(), literal()
    centering.update_(torch.rand(4, K), 0.05)
    state = centering.state_dict()
    assert list(state) == ["log_center"]
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other.log_center, centering.log_center, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, K), (1, 1, K)])
def test_dinos_centre_is_converted_with_a_warning(shape):
    """softmax((z - center) / tau) = softmax(z / tau - center / tau): exact, once tau is known."""
    center = torch.randn(shape)
    centering = literal()
    centering.load_state_dict({"center": center}, strict=True)
    for use in (lambda: centering(torch.zeros(2, K)), centering.commit_):
        with pytest.raises(RuntimeError, match=r"a DINO `center` was loaded.*call `convert_logit_center_"):
            use()

    resumed = literal()  # a checkpoint written while the conversion is pending
    resumed.load_state_dict(centering.state_dict(), strict=True)
    with pytest.warns(UserWarning, match=r"logit `center` was loaded.*divided by the teacher temperature 0.04"):
        resumed.convert_logit_center_(0.04)
    z = torch.randn(5, K)
    got, want = resumed(z / 0.04).softmax(dim=1), ((z - center.flatten()) / 0.04).softmax(dim=1)
    torch.testing.assert_close(got, want)
    assert list(resumed.state_dict()) == ["log_center"]
    resumed.convert_logit_center_(0.04)  # done already: no second warning, which would be an error here


def test_asking_for_the_offset_of_a_pending_centre_changes_nothing():
    """Any temperature may be asked for, and none of them becomes the one of the conversion."""
    center = torch.randn(1, K)
    centering = literal()
    centering.load_state_dict({"center": center})
    before = {name: tensor.clone() for name, tensor in centering.state_dict().items()}
    assert set(before) == {"log_center", "logit_center"}
    for temperature in (0.04, 0.07):  # a warning of a conversion would be an error here
        torch.testing.assert_close(centering.offset(temperature), center.flatten() / temperature)
    torch.testing.assert_close(dict(centering.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`temperature` \(=0\) must be a finite number > 0"):
        centering.offset(0)

    with pytest.warns(UserWarning, match="divided by the teacher temperature 0.05"):
        centering.accumulate_(torch.zeros(2, K), 0.05)
    torch.testing.assert_close(centering.offset(0.07), center.flatten() / 0.05)  # it no longer has a temperature
    centering.commit_()
    torch.testing.assert_close(centering.log_center, 0.9 * center.flatten() / 0.05 - 0.1 * math.log(K))


def test_a_log_centre_supersedes_a_pending_one():
    centering = literal()
    centering.load_state_dict({"center": torch.randn(1, K)})
    centering.load_state_dict({"log_center": torch.full((K,), -2.0)}, strict=True)
    torch.testing.assert_close(centering(torch.zeros(1, K)), torch.full((1, K), 2.0))


def test_deepcopy():
    centering = literal()
    other = copy.deepcopy(centering)
    centering.update_(torch.rand(4, K), 0.05)
    assert other.log_center.eq(0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: ProbabilityCentering(0), ValueError, r"`num_prototypes` \(=0\) must be an integer >= 1"),
        (lambda c: ProbabilityCentering(K, 1.5), ValueError, r"`momentum` \(=1.5\) must be in \[0, 1\]"),
        (lambda c: ProbabilityCentering(K, float("nan")), ValueError, r"`momentum` \(=nan\) must be in \[0, 1\]"),
        (lambda c: ProbabilityCentering(K, center_on="raw"), ValueError, r"`center_on` \(='raw'\) must be one of"),
        (
            lambda c: c(torch.zeros(2, K + 1)),
            ValueError,
            r"`logits` \(of shape \(2, 13\)\) must end in",
        ),
        (lambda c: c.update_(torch.zeros(2, 1), 0.1), ValueError, r"`scores` \(of shape \(2, 1\)\) must end in"),
        (lambda c: c.update_(torch.zeros(2, K), 0), ValueError, r"`temperature` \(=0\) must be a finite number > 0"),
        (lambda c: c.accumulate_log_sum_(torch.zeros(3), 1), ValueError, r"`log_sum` \(of shape \(3,\)\) must end in"),
        (
            lambda c: ProbabilityCentering(K).update_(torch.zeros(2, K), 0.1),
            ValueError,
            r"`log_normalizer` \(=None\) must be given when `center_on`",
        ),
        (lambda c: c.load_state_dict({"center": torch.zeros(1, 5)}), RuntimeError, "size mismatch for logit_center"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(literal())


def test_a_state_without_the_centre_leaves_a_pending_one():
    centering = ProbabilityCentering(3)
    centering.load_state_dict({"center": torch.ones(1, 3)})
    centering.load_state_dict({}, strict=False)
    assert centering.logit_center is not None
