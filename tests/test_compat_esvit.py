"""compat.esvit: EsViT's own losses at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere, fused and not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vmf_reference
from vmf_heads.compat.esvit import DDINOLoss, DINOHead, DINOLoss
from vmf_heads.prototypes import weight_norm

K, P, NCROPS, BATCH, SIZES = 24, 8, 4, 3, (6, 4)
SCHEDULE = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "nepochs": 5}
FUSED = pytest.mark.parametrize("fused", [False, True])
MIXTURES = [
    share * torch.eye(BATCH) + (1 - share) * torch.eye(BATCH)[[2, 0, 1]] for share in (0.5, 0.6, 0.8, 1.0)
]  # not symmetric: which index is the teacher's counts


class Model(nn.Module):
    """What EsViT's networks return: views, regions, features of regions, numbers of regions."""

    def __init__(self, lowest: float, norms: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(10, 16)
        self.head, self.head_dense = (DINOHead(16, K, hidden_dim=12, bottleneck_dim=P) for _ in range(2))
        for head in (self.head, self.head_dense):
            if norms:
                head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).unsqueeze(1)

    def features(self, crops: list[Tensor]) -> list[Tensor]:
        """(B, T, 16) of each crop."""
        return [self.backbone(crop) for crop in crops]

    def forward(self, crops: list[Tensor]) -> tuple:
        features = self.features(crops)
        views, regions = torch.cat([y.mean(dim=1) for y in features]), torch.cat([y.flatten(0, 1) for y in features])
        sizes = [features[0].shape[1], *([features[-1].shape[1]] if len(features) > 2 else [])]
        return self.head(views), self.head_dense(regions), regions, sizes


def models(*, norms: bool = True) -> tuple[Model, Model]:
    return Model(0.3, norms), Model(0.5, norms).requires_grad_(False)


def batch(ncrops: int = NCROPS) -> list[Tensor]:
    return [torch.randn(BATCH, SIZES[view >= 2], 10) for view in range(ncrops)]


def probabilities(head: DINOHead, y: Tensor, temperature: float, center: Tensor, vmf: bool) -> Tensor:
    """log P of features (..., 16), Eq. 6 and 7."""
    w = weight_norm(head.last_layer.weight_v, head.last_layer.weight_g[:, 0])
    logits = F.normalize(head.mlp(y), dim=-1) @ w.T / temperature
    if vmf:
        logits = logits + vmf_reference.with_gradient(head.last_layer.norms, P, temperature)
    return (logits - center).log_softmax(dim=-1)


def reference(
    student: Model, teacher: Model, crops: list[Tensor], temperature: float, centers: list[Tensor], vmf: bool = True
) -> Tensor:
    """EsViT's formula, pair by pair and image by image, for any probabilities."""
    ours, theirs = student.features(crops), teacher.features(crops[:2])
    total = torch.zeros((), dtype=torch.float64)
    for u in range(2):
        for v in range(len(crops)):
            if u == v:
                continue
            target = probabilities(teacher.head, theirs[u].mean(dim=1), temperature, centers[0], vmf).exp()
            log_p = probabilities(student.head, ours[v].mean(dim=1), 0.1, torch.zeros(K), vmf)
            total = total - 0.5 * (target * log_p).sum(dim=1).mean()
            regions = probabilities(teacher.head_dense, theirs[u], temperature, centers[1], vmf).exp()
            log_p = probabilities(student.head_dense, ours[v], 0.1, torch.zeros(K), vmf)
            for image in range(BATCH):
                similarity = F.normalize(ours[v][image], dim=1) @ F.normalize(theirs[u][image], dim=1).T
                for region, nearest in enumerate(similarity.argmax(dim=1)):
                    size = len(similarity)
                    cross_entropy = -(regions[image, nearest] * log_p[image, region]).sum()
                    total = total + 0.5 * cross_entropy / (size * BATCH)
    return total / (2 * (len(crops) - 1))


@FUSED
@pytest.mark.parametrize("ncrops", [2, NCROPS])
def test_regions_are_those_of_the_equations(ncrops, fused):
    """Loss and gradients in float64, with a centre from the second step on, and with global crops alone."""
    student, teacher = (model.double() for model in models())
    exact = copy.deepcopy(student), copy.deepcopy(teacher)
    loss = DDINOLoss(K, ncrops, **SCHEDULE, fused=fused).double()
    loss.attach(student, teacher)
    zeros = torch.zeros(K, dtype=torch.float64)
    for epoch, temperature in ((0, 0.04), (4, 0.07)):
        crops = [crop.double() for crop in batch(ncrops)]
        centers = [loss.state_dict().get(name, zeros) for name in ("log_center", "log_center_grid")]
        want = reference(*exact, crops, temperature, [center.clone() for center in centers])
        got = loss(student(crops), teacher(crops[:2]), epoch)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
        got.backward()
        want.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[0].get_parameter(name).grad, rtol=1e-5, atol=1e-9)
    assert list(loss.state_dict()) == ["log_center", "log_center_grid"]


@FUSED
def test_at_norm_one_with_logit_centring_the_targets_have_esvits_centres(fused):
    student, teacher = models(norms=False)
    loss = DDINOLoss(K, NCROPS, **SCHEDULE, fused=fused, centering="logit")
    centers = {"center": torch.randn(1, K) / 10, "center_grid": torch.randn(1, K) / 10}
    loss.load_state_dict(centers, strict=True)
    loss.attach(student, teacher)
    crops = batch()
    temperature = 0.04
    exact = [copy.deepcopy(model).double() for model in (student, teacher)]
    offsets = [center.double()[0] / temperature for center in centers.values()]
    want = reference(*exact, [crop.double() for crop in crops], temperature, offsets, vmf=False)
    torch.testing.assert_close(loss(student(crops), teacher(crops[:2]), 0).double(), want, rtol=1e-5, atol=0)
    of_teacher = [exact[1].features([crop.double() for crop in crops[:2]])]
    scores = exact[1].head_dense
    mean = torch.cat([F.normalize(scores.mlp(y), dim=-1) @ scores.last_layer.weight.T for y in of_teacher[0]]).mean(
        (0, 1)
    )
    want_center = 0.9 * centers["center_grid"][0].double() + 0.1 * mean
    torch.testing.assert_close(loss.state_dict()["center_grid"][0].double(), want_center, rtol=1e-4, atol=1e-6)


@FUSED
def test_mixtures_are_esvits_formula(fused):
    student, teacher = (model.double() for model in models())
    exact = copy.deepcopy(student), copy.deepcopy(teacher)
    loss = DINOLoss(K, NCROPS, **SCHEDULE, fused=fused).double()
    loss.attach(student, teacher, head="head")
    teacher.head_dense.attach_output("scores")  # serves a loss of its own
    crops = [crop.double() for crop in batch()]
    mixtures = [matrix.double() for matrix in MIXTURES]
    zeros = torch.zeros(K)
    q = [probabilities(exact[1].head, y.mean(dim=1), 0.04, zeros, True).exp() for y in exact[1].features(crops[:2])]
    log_p = [probabilities(exact[0].head, y.mean(dim=1), 0.1, zeros, True) for y in exact[0].features(crops)]
    terms = [-(mixtures[v] * (q[u] @ log_p[v].T)).sum(dim=-1).mean() for u in range(2) for v in range(NCROPS) if u != v]
    want = sum(terms) / len(terms)
    got = loss(student(crops)[0], teacher(crops[:2])[0], 0, mixtures)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    got.backward()
    want.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and "head_dense" not in name:
            torch.testing.assert_close(parameter.grad, exact[0].get_parameter(name).grad, rtol=1e-5, atol=1e-9)
    unmixed = [torch.eye(BATCH, dtype=torch.float64)] * NCROPS
    values = [loss(student(crops)[0], teacher(crops[:2])[0], 0, m, commit=False) for m in (unmixed, None)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)


def test_mixtures_have_no_effect_on_regions_and_that_is_said():
    student, teacher = models()
    loss = DDINOLoss(K, NCROPS, **SCHEDULE, center_momentum=1.0)
    loss.attach(student, teacher)
    crops = batch()
    want = loss(student(crops), teacher(crops[:2]), 0)
    with pytest.warns(UserWarning, match="`targets_mixup` has no effect in DDINOLoss"):
        got = loss(student(crops), teacher(crops[:2]), 0, MIXTURES)
    assert torch.equal(got, want)


def test_a_centre_may_be_updated_alone_and_micro_batches_make_one_update():
    student, teacher = models()
    losses = [DDINOLoss(K, NCROPS, **SCHEDULE) for _ in range(3)]
    for loss in losses:
        loss.attach(student, teacher)
    crops = batch()
    for part in range(BATCH):
        micro = [crop[part : part + 1] for crop in crops]
        losses[0](student(micro), teacher(micro[:2]), 0, commit=part == BATCH - 1)
    of_teacher = teacher(crops[:2])
    losses[1](student(crops), of_teacher, 0)
    losses[2].update_center(*of_teacher[:2], 0)
    for other in losses[1:]:
        torch.testing.assert_close(other.state_dict(), losses[0].state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: ((s[0][1:], *s[1:]), t), r"`student_output\[0\]` \(of shape \(11, 24\)\) must be \(12, 24\)"),
        (lambda s, t: ((s[0], s[1][1:], *s[2:]), t), r"`student_output\[1\]` \(of shape \(59, 24\)\) .* 60 rows"),
        (lambda s, t: (s, (t[0], t[1], t[2][1:], t[3])), r"`teacher_output\[2\]` \(of 35 rows\) must have 36 rows"),
    ],
)
def test_bad_shapes_change_nothing(change, message):
    student, teacher = models()
    loss = DDINOLoss(K, NCROPS, **SCHEDULE)
    loss.attach(student, teacher)
    crops = batch()
    with pytest.raises(ValueError, match=message):
        loss(*change(student(crops), teacher(crops[:2])), 0)
    assert not any(center.any() for center in loss.state_dict().values())


def test_mixtures_must_be_one_for_each_crop():
    student, teacher = models()
    loss = DINOLoss(K, NCROPS, **SCHEDULE)
    loss.attach(student, teacher, head="head")
    teacher.head_dense.attach_output("scores")  # serves a loss of its own
    crops = batch()
    with pytest.raises(ValueError, match=r"`targets_mixup` \(of shapes .*\) must hold a matrix \(B, B\) for each of"):
        loss(student(crops)[0], teacher(crops[:2])[0], 0, MIXTURES[:3])


def test_attach_finds_both_heads_or_changes_nothing():
    student, teacher = models()
    del teacher.head_dense
    with pytest.raises(ValueError, match=r"`head` \(='head_dense'\) must be the name of a submodule of `teacher`"):
        DDINOLoss(K, NCROPS, **SCHEDULE).attach(student, teacher)
    assert not student.head.is_attached
