"""compat.msn: MSN's own loss for prototypes of norm 1, a float64 reference of the vMF predictions elsewhere, guards."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import vmf_reference
from gloo import run_on_ranks
from vmf_heads.compat._sinkhorn import sinkhorn_knopp
from vmf_heads.compat.msn import init_msn_loss

K, P, BATCH, VIEWS, TAU = 12, 8, 6, 3, 0.1
SWITCHES = list(itertools.product([False, True], repeat=3))  # me_max, use_entropy, use_sinkhorn


def original_sinkhorn(q: Tensor) -> Tensor:
    """Three rounds of dividing by the sums over samples, then over prototypes."""
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def original(logits: Tensor, labels: Tensor, t: float, me_max: bool, entropy: bool, sinkhorn: bool) -> list[Tensor]:
    """MSN's formulas in probabilities, from the logits (VIEWS * BATCH + BATCH, K) of anchors, then targets."""
    probs = logits.softmax(dim=1) @ labels
    probs, targets = probs[: VIEWS * BATCH], probs[VIEWS * BATCH :].detach() ** (1 / t)
    targets = targets / targets.sum(dim=1, keepdim=True)
    targets = torch.cat([original_sinkhorn(targets) if sinkhorn else targets] * VIEWS)
    mean = probs.mean(dim=0)
    zero = probs.new_zeros(())
    return [
        torch.mean(torch.sum(torch.log(probs ** (-targets)), dim=1)),
        math.log(len(mean)) - torch.sum(torch.log(mean ** (-mean))) if me_max else zero,
        torch.mean(torch.sum(torch.log(probs ** (-probs)), dim=1)) if entropy else zero,
        targets,
    ]


def labels(smoothing: float) -> Tensor:
    return torch.eye(K) * (1 - smoothing) + smoothing / K


def views() -> tuple[Tensor, Tensor]:
    """(anchors that carry gradients, targets); not of norm 1."""
    return torch.randn(VIEWS * BATCH, P).requires_grad_(), torch.randn(BATCH, P) * 2


def cosines(anchors: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.normalize(torch.cat([anchors, targets]), dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("me_max", "use_entropy", "use_sinkhorn"), SWITCHES)
def test_at_norm_one_it_is_msns_loss(me_max, use_entropy, use_sinkhorn, smoothing):
    """Value, targets, logs and gradient of the anchors; MSN's own prototypes may have any norm, which it drops."""
    anchors, targets = views()
    prototypes = torch.nn.functional.normalize(torch.randn(K, P), dim=1)
    msn = init_msn_loss(VIEWS, TAU, me_max, return_preds=True)
    *got, logs, t = msn(
        anchors, targets, prototypes, labels(smoothing), T=0.25, use_entropy=use_entropy, use_sinkhorn=use_sinkhorn
    )
    stock = torch.nn.functional.normalize(prototypes * torch.linspace(0.1, 4, K)[:, None], dim=1)
    logits = cosines(anchors, targets) @ stock.T / TAU
    *want, want_t = original(logits, labels(smoothing), 0.25, me_max, use_entropy, use_sinkhorn)
    torch.testing.assert_close([torch.as_tensor(x) for x in got], want, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(t, want_t, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(sum(got), anchors)
    (expected,) = torch.autograd.grad(sum(want), anchors)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert logs["np"] == len(set(want_t.argmax(dim=1).tolist()))
    torch.testing.assert_close(logs["max_t"], want_t.max(dim=1).values.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs["min_t"], want_t.min(dim=1).values.mean(), rtol=1e-4, atol=1e-6)


def reference(anchors: Tensor, targets: Tensor, prototypes: Tensor, *switches) -> list[Tensor]:
    """With log C_p of Eq. 5 from SciPy, which has no gradient."""
    log_c = vmf_reference.log_normalizer(prototypes.norm(dim=1).detach() / TAU, P)
    logits = cosines(anchors, targets) @ prototypes.T / TAU + log_c
    return original(logits, labels(0.1).double(), 0.25, *switches)


@pytest.mark.parametrize(("me_max", "use_entropy", "use_sinkhorn"), SWITCHES)
def test_vmf_predictions_in_float64(me_max, use_entropy, use_sinkhorn):
    """Values, and the gradient of the prototypes by finite differences along their own and along random directions."""
    anchors, targets = (v.detach() for v in views())
    prototypes = nn.Parameter(nn.functional.normalize(torch.randn(K, P)) * torch.linspace(0.2, 4, K)[:, None])
    msn = init_msn_loss(VIEWS, TAU, me_max, return_preds=True)
    *got, _, t = msn(anchors, targets, prototypes, labels(0.1), use_entropy=use_entropy, use_sinkhorn=use_sinkhorn)
    exact = [x.detach().double() for x in (anchors, targets, prototypes)]
    *want, want_t = reference(*exact, me_max, use_entropy, use_sinkhorn)
    torch.testing.assert_close([torch.as_tensor(x, dtype=torch.float64) for x in got], want, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(t.double(), want_t, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(sum(got), prototypes)
    for direction in (exact[2], torch.randn_like(exact[2])):
        difference = 0
        for h in (1e-6, -1e-6):
            log_c = vmf_reference.log_normalizer((exact[2] + h * direction).norm(dim=1) / TAU, P)
            at_target = cosines(*exact[:2])[VIEWS * BATCH :] @ exact[2].T / TAU
            at_target += vmf_reference.log_normalizer(exact[2].norm(dim=1) / TAU, P)  # the targets stay as they are
            at_anchor = cosines(*exact[:2])[: VIEWS * BATCH] @ (exact[2] + h * direction).T / TAU + log_c
            value = original(
                torch.cat([at_anchor, at_target]), labels(0.1).double(), 0.25, me_max, use_entropy, use_sinkhorn
            )
            difference += sum(value[:3]) / (2 * h)
        torch.testing.assert_close((gradient.double() * direction).sum(), difference, rtol=2e-4, atol=1e-5)


def test_log_space_where_probabilities_underflow():
    """Prototypes of norm 40 at tau 0.1: MSN's formula gives inf or nan, here the loss and its gradient are finite."""
    anchors, targets = views()
    prototypes = nn.Parameter(40 * nn.functional.normalize(torch.randn(K, P)))
    naive = original(cosines(anchors, targets) @ prototypes.T / TAU, labels(0.0), 0.25, True, True, False)
    assert not all(x.isfinite() for x in naive[:3])
    ploss, rloss, sloss, _ = init_msn_loss(VIEWS, TAU)(anchors, targets, prototypes, labels(0.0), use_entropy=True)
    assert ploss > 87  # -log of the smallest normal float32
    (ploss + rloss + sloss).backward()
    assert prototypes.grad.isfinite().all()
    assert anchors.grad.isfinite().all()


def test_half_precision_inputs_are_computed_in_float32():
    anchors, targets = (v.detach() for v in views())
    prototypes = torch.randn(K, P)
    msn = init_msn_loss(VIEWS)
    rounded = [x.bfloat16() for x in (anchors, targets, prototypes)]
    want = msn(*(x.float() for x in rounded), labels(0.0))[0]
    torch.testing.assert_close(msn(*rounded, labels(0.0))[0], want, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(msn(*(x.float() for x in rounded), labels(0.0))[0], want, rtol=1e-6, atol=0)


def test_prototypes_stay_the_callers_tensor():
    """A raw tensor with a gradient, which the training script all-reduces and its optimiser moves."""
    anchors, targets = views()
    prototypes = nn.Parameter(torch.randn(K, P))
    before = prototypes.detach().clone()
    init_msn_loss(VIEWS)(anchors, targets, prototypes, labels(0.0))[0].backward()
    torch.testing.assert_close(prototypes.detach(), before, rtol=0, atol=0)
    assert prototypes.grad.norm(dim=1).gt(0).all()
    radial = (prototypes.grad * before).sum(dim=1)
    assert radial.abs().gt(1e-6).any()  # the norms are learnt; MSN's own gradient has no radial part


def test_me_max_may_be_off_and_the_number_of_results_follows():
    anchors, targets = views()
    result = init_msn_loss(VIEWS, me_max=False)(anchors, targets, torch.randn(K, P), labels(0.0))
    assert result[1:3] == (0.0, 0.0)
    assert len(result) == 4


def rank_loss(rank: int) -> dict[str, Tensor | float]:
    """One rank's half of the batch; SK and me-max reach over the ranks."""
    torch.manual_seed(3)
    anchors, targets, prototypes = torch.randn(VIEWS, BATCH, P), torch.randn(BATCH, P), torch.randn(K, P)
    mine = slice(None) if rank < 0 else slice(BATCH // 2 * rank, BATCH // 2 * (rank + 1))
    anchors = anchors[:, mine].flatten(0, 1).requires_grad_()
    msn = init_msn_loss(VIEWS, return_preds=True)
    ploss, rloss, _, _, t = msn(anchors, targets[mine], prototypes, labels(0.0), use_sinkhorn=True)
    (gradient,) = torch.autograd.grad(ploss + rloss, anchors)
    return {"ploss": ploss.item(), "rloss": rloss.item(), "targets": t, "gradient": gradient}


def test_two_ranks_equal_one_process():
    """me-max is that of the global mean on every rank; gradients and losses average to those of one process."""
    alone, ranks = rank_loss(-1), run_on_ranks(rank_loss)
    assert [r["rloss"] for r in ranks] == pytest.approx([alone["rloss"]] * 2, rel=1e-5)
    assert sum(r["ploss"] for r in ranks) / 2 == pytest.approx(alone["ploss"], rel=1e-5)
    for name, scale in (("targets", 1), ("gradient", 0.5)):  # each rank's mean is over half as many rows
        joined = torch.cat([r[name].unflatten(0, (VIEWS, -1)) for r in ranks], dim=1).flatten(0, 1)
        torch.testing.assert_close(joined * scale, alone[name], rtol=1e-4, atol=1e-6)


def test_sinkhorn_equals_the_division_of_rows_and_columns_and_ignores_log_c():
    logits = torch.randn(20, K) * 5
    want = original_sinkhorn(logits.double().exp())
    torch.testing.assert_close(sinkhorn_knopp(logits).double(), want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sinkhorn_knopp(logits + 30 * torch.randn(K)), sinkhorn_knopp(logits), rtol=1e-3, atol=0)
    huge = sinkhorn_knopp(logits * 1000)
    assert huge.isfinite().all()
    torch.testing.assert_close(huge.sum(dim=1), torch.ones(20))
    with pytest.raises(ValueError, match=r"`n_iterations` \(=0\) must be an integer >= 1"):
        sinkhorn_knopp(logits, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"anchor_views": torch.zeros(4, P)},
            r"`anchor_views` \(of 4 rows\) must have `num_views` \(=3\) rows for each",
        ),
        ({"anchor_views": torch.zeros(18, 7)}, r"`anchor_views` \(of shape \(18, 7\)\) must be \(N, p\) with p \(=8\)"),
        ({"target_views": torch.zeros(6)}, r"`target_views` \(of shape \(6,\)\) must be \(N, p\)"),
        ({"prototypes": torch.zeros(K)}, r"`prototypes` \(of shape \(12,\)\) must be \(K, p\) with p >= 2"),
        (
            {"proto_labels": torch.zeros(3, 3)},
            r"`proto_labels` \(of shape \(3, 3\)\) must have a row for each of the K",
        ),
        ({"T": 0}, r"`T` \(=0\) must be a finite number > 0"),
    ],
)
def test_bad_inputs(change, message):
    good = {
        "anchor_views": torch.zeros(VIEWS * BATCH, P),
        "target_views": torch.zeros(BATCH, P),
        "prototypes": torch.zeros(K, P),
        "proto_labels": labels(0.0),
    }
    with pytest.raises(ValueError, match=message):
        init_msn_loss(VIEWS)(**{**good, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0}, r"`tau` \(=0\) must be a finite number > 0"),
        ({"num_views": 0}, r"`num_views` \(=0\) must be an integer >= 1"),
    ],
)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        init_msn_loss(**options)
