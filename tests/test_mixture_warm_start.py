"""warm_start_: an MLP that keeps directions, prototypes that are the mixture, and the loss that theory predicts."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vmf_heads import HeadOutput, VMFPrototypeHead, prototype_cross_entropy, prototype_report
from vmf_heads.compat.ibot import iBOTHead
from vmf_heads.head import PrototypeHead
from vmf_heads.mixture import VMFMixture, warm_start_
from vmf_heads.mixture._sampling import sample_vmf
from vmf_heads.mlp import projection_mlp
from vmf_heads.prototypes import LinearPrototypes, Prototypes

P, IN_DIM = 12, 30
# Components along both ends of each axis: their mean is 0, so that the head's subtraction of it leaves the mixture.
TRUTH = VMFMixture(torch.ones(2 * P), torch.cat([torch.eye(P), -torch.eye(P)]), torch.linspace(20, 60, 2 * P))


def backbone(y: torch.Tensor) -> torch.Tensor:
    """Features (N, 30) that hold unit vectors (N, 12) at another scale, rotated, with a mean far from 0."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(IN_DIM, P, generator=generator))[0]
    return 3 * y @ basis.T + 5 * torch.randn(IN_DIM, generator=generator)


def drawn(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of each image: two unit vectors of one component."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.arange(rows) % TRUTH.num_components
    one, other = (sample_vmf(TRUTH.directions[component], TRUTH.kappa[component], generator) for _ in range(2))
    return one.float(), other.float()


def loss_of(head: VMFPrototypeHead, x: torch.Tensor, other: torch.Tensor) -> float:
    """The library's loss per row, of both views at the student's temperature."""
    w = head.last_layer.weight
    student, teacher = (HeadOutput(head.features(view), w, None) for view in (other, x))
    loss, _, rows = prototype_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.1)
    return loss.item() / rows


def new_head(seed: int = 1, **options) -> VMFPrototypeHead:
    torch.manual_seed(seed)
    return VMFPrototypeHead(IN_DIM, 2 * P, hidden_dim=64, bottleneck_dim=P, **options)


def test_the_head_uses_all_prototypes_and_its_loss_is_that_of_the_mixture():
    """-sum r(y) log r(y') of the true responsibilities r, for two views y and y'."""
    one, other = drawn(2400)
    theory = -(TRUTH.responsibilities(one) * TRUTH.log_joint(other).log_softmax(1)).sum(1).mean().item()
    assert 0.01 < theory < 0.1 * math.log(2 * P)
    x, x2 = backbone(one), backbone(other)
    head = new_head()
    assert prototype_report(head, head.features(x)).used < P
    fit = warm_start_(head, x)
    assert loss_of(head, x, x2) == pytest.approx(theory, rel=0.05)
    assert prototype_report(head, head.features(x)).used == 2 * P
    found = VMFMixture.from_head(head)
    torch.testing.assert_close(found.directions, fit.mixture.directions)
    torch.testing.assert_close(found.kappa, fit.mixture.kappa)
    assert found.kappa.sort().values.log().sub(TRUTH.kappa.log()).abs().max() < 0.2


@pytest.mark.parametrize(
    ("layers", "hidden", "p", "kept"),
    [(1, 0, 6, 6), (2, 33, 6, 6), (4, 33, 6, 6), (3, 8, 6, 4), (3, 64, 16, 10)],
    ids=["linear", "a unit without a partner", "deep", "narrow hidden layers", "wide"],
)
def test_the_mlp_is_the_projection_onto_principal_directions(layers, hidden, p, kept):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 10, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.2, 10) + 7
    centred = (x - x.mean(0)).numpy()
    y = F.normalize(torch.from_numpy(centred @ np.linalg.svd(centred)[2][:kept].T), dim=1)
    for act in (nn.GELU, nn.ReLU, nn.SiLU, lambda: nn.GELU("tanh")):
        mlp = projection_mlp(10, max(hidden, 1), p, layers, act=act)
        head = PrototypeHead(10, mlp, LinearPrototypes(p, 5)).double()
        warm_start_(head, x, max_iterations=1)
        torch.testing.assert_close(head.features(x) @ head.features(x).T, y @ y.T)
        if layers > 1:  # on a scale on which an activation bends
            assert mlp[0](x).square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_without_a_bias_directions_are_those_of_the_features():
    x = torch.randn(300, 10, dtype=torch.float64) + 1
    head = VMFPrototypeHead(10, 5, hidden_dim=32, bottleneck_dim=10, mlp_bias=False).double()
    warm_start_(head, x, max_iterations=1)
    torch.testing.assert_close(head.features(x) @ head.features(x).T, F.normalize(x) @ F.normalize(x).T)


@pytest.mark.parametrize(("norm", "least"), [("bn", 0.9), ("ln", 0.99)])
def test_normalised_layers_keep_directions_about(norm, least):
    x = backbone(drawn(1200)[0])
    torch.manual_seed(0)
    head = iBOTHead(IN_DIM, 2 * P, hidden_dim=512, bottleneck_dim=P, norm=norm, shared_head=True)
    warm_start_(head, x, max_iterations=5)
    y = F.normalize(x - x.mean(0))
    pairs = torch.stack([(head.features(x) @ head.features(x).T).flatten(), (y @ y.T).flatten()])
    assert torch.corrcoef(pairs)[0, 1] > least
    assert prototype_report(head.last_layer.weight, head.features(x)).used == 2 * P


def test_keep_leaves_the_mlp_and_a_seed_decides_the_rest():
    x = backbone(drawn(480)[0])
    heads = [new_head() for _ in range(3)]
    before = [parameter.clone() for parameter in heads[0].mlp.parameters()]
    fits = [
        warm_start_(head, x, mlp="keep", seed=seed, max_iterations=3)
        for head, seed in zip(heads, (0, 0, 1), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, heads[0].mlp.parameters(), strict=True))
    same, other = ([head.state_dict() for head in pair] for pair in (heads[:2], heads[1:]))
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert not torch.equal(other[0]["last_layer.weight_v"], other[1]["last_layer.weight_v"])
    # The random MLP keeps the mean that all rows share: the fit is far more concentrated than 1 / temperature.
    assert (heads[0].features(x) @ heads[0].features(x).T).min() > 0.9
    assert fits[0].mixture.kappa.median() > 1000


def test_kappa_with_a_given_median_keeps_its_order_also_in_a_teacher():
    x = backbone(drawn(480)[0])
    teacher = new_head().requires_grad_(False)
    fit = warm_start_(teacher, x, median_kappa=10.0, temperature=0.05, max_iterations=3)
    norms = teacher.last_layer.norms
    assert norms.median() == pytest.approx(0.5)
    torch.testing.assert_close(norms / norms[0], fit.mixture.kappa / fit.mixture.kappa[0])


@pytest.mark.parametrize("options", [{"norm_last_layer": True}, {"normalizer": "none"}])
def test_heads_that_hold_no_mixture_get_the_directions_alone(options):
    x = backbone(drawn(480)[0])
    head = new_head(**options)
    fit = warm_start_(head, x, max_iterations=1)
    assert torch.equal(head.last_layer.weight_g, torch.ones(2 * P, 1))
    torch.testing.assert_close(F.normalize(head.last_layer.weight), fit.mixture.directions)


X = torch.randn(40, IN_DIM, generator=torch.Generator().manual_seed(0))
TANH = PrototypeHead(IN_DIM, projection_mlp(IN_DIM, 8, 4, act=nn.Tanh), Prototypes(4, 5))


@pytest.mark.parametrize(
    ("head", "features", "options", "error", "message"),
    [
        (None, X.int(), {}, TypeError, r"`features` \(of torch.int32\) must be a floating tensor"),
        (None, X[0], {}, ValueError, r"`features` \(of shape \(30,\)\) must have shape \(N, `in_dim` \(=30\)\)"),
        (None, X[:, 1:], {}, ValueError, r"`features` \(of shape \(40, 29\)\) must have shape"),
        (None, X * math.nan, {}, ValueError, r"`features` must be finite"),
        (None, X[:23], {}, ValueError, r"`features` \(of 23 rows\) must have at least a row for each of the 24"),
        (None, X[:1].expand(40, -1), {}, ValueError, r"`features` must have rows that differ"),
        (None, X, {"mlp": "random"}, ValueError, r"`mlp` \(='random'\) must be one of 'isometric', 'keep'"),
        (None, X, {"median_kappa": 0.0}, ValueError, r"`median_kappa` \(=0.0\) must be a finite number > 0"),
        (None, X, {"max_iterations": 0}, ValueError, r"`max_iterations` \(=0\) must be an integer >= 1"),
        (TANH, X, {}, ValueError, r"`mlp` \(='isometric'\) needs .* and here is a Tanh; mlp='keep' takes any head"),
        (nn.Linear(2, 2), X, {}, ValueError, r"`head` \(a Linear\) must contain exactly one prototype head"),
    ],
)
def test_arguments_are_checked_before_the_head_changes(head, features, options, error, message):
    head = new_head() if head is None else head
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(error, match=message):
        warm_start_(head, features, **options)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
